"""Sample: logits to tokens."""

from __future__ import annotations

from torch import Tensor

from mllm.batch import SamplingBatch
from mllm.kernels.ops import Ops


def sample(logits: Tensor, sampling: SamplingBatch, lengths: Tensor, *, ops: Ops) -> Tensor:
    """The next token of each row: i32 [B] from logits f32 [B V] and `lengths` i32 [B], the tokens of its context.

    The noise is a pure function of the row's seed, its length and the vocabulary index, so a row draws the same
    tokens whoever shares its batch. A row with a NaN or an infinity among its logits gets -1, and no other row
    notices.
    """
    return ops.sample(logits, sampling, lengths)
