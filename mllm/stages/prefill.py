"""Prefill: any chunk of any prompts onto the KV pool."""

from __future__ import annotations

from torch import Tensor

from mllm.batch import ForwardBatch, VisionTokens
from mllm.cache import KVPool
from mllm.config import Config
from mllm.kernels.ops import Ops
from mllm.stages.decoder import forward
from mllm.state import check_alive, donate
from mllm.weights import Weights


def prefill(
    weights: Weights,
    pool: KVPool,
    batch: ForwardBatch,
    vision: VisionTokens | None = None,
    *,
    config: Config,
    ops: Ops,
) -> tuple[KVPool, Tensor]:
    """Run T prompt tokens of B rows. Takes `pool`; returns it and the logits f32 [Q V] at `batch.last`.

    `vision` holds the features of the batch's image tokens (None without any). A prompt may come in any number
    of chunks, cut anywhere: a chunk attends to what earlier ones left in the pool, and its image tokens bring
    their deepstack features along.
    """
    check_alive(batch, vision)
    pool = donate(pool, to="prefill")
    return pool, forward(weights.text, pool, batch, vision, config=config.text, ops=ops)
