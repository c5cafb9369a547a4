"""Decode: one token for every row, and the bookkeeping that makes it the carry of a loop."""

from __future__ import annotations

from torch import Tensor

from mllm.batch import ForwardBatch, SamplingBatch
from mllm.cache import KVPool
from mllm.config import Config
from mllm.kernels.ops import Ops
from mllm.stages.decoder import forward
from mllm.stages.sample import sample
from mllm.state import check_alive, donate
from mllm.weights import Weights


def decode(weights: Weights, pool: KVPool, batch: ForwardBatch, *, config: Config, ops: Ops) -> tuple[KVPool, Tensor]:
    """Run the newest token of each of B rows. Takes `pool`; returns it and the logits f32 [B V]."""
    check_alive(batch)
    pool = donate(pool, to="decode")
    return pool, forward(weights.text, pool, batch, None, config=config.text, ops=ops)


def advance(batch: ForwardBatch, tokens: Tensor, *, page_size: int, ops: Ops) -> ForwardBatch:
    """Make `tokens` i32 [B] the newest of each row. Takes `batch`; returns it one position and one slot further.

    The pages that `batch` lists must reach that far; padding rows stay where they are.
    """
    batch = donate(batch, to="advance")
    ops.advance_(batch, tokens, page_size=page_size)
    return batch


def step(
    weights: Weights, pool: KVPool, batch: ForwardBatch, sampling: SamplingBatch, *, config: Config, ops: Ops
) -> tuple[KVPool, ForwardBatch, Tensor]:
    """decode, sample, advance: the body of the decode loop, and what one CUDA graph holds.

    Takes `pool` and `batch`; returns both and the tokens i32 [B], -1 for a row whose logits are not finite.
    """
    check_alive(batch, sampling)
    pool, logits = decode(weights, pool, batch, config=config, ops=ops)
    tokens = sample(logits, sampling, batch.lengths, ops=ops)
    batch = advance(batch, tokens, page_size=pool.keys.shape[2], ops=ops)
    return pool, batch, tokens
