"""Sampling noise without a generator: a pure function of a row's seed, its position and the vocabulary index.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is counter based, so a row
draws the same numbers whoever shares its batch, on every device, and in a kernel without any state.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds: four words from two key words and four counter words, all int64 tensors holding 32-bit values."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(c0, _ROUND[0])
        high1, low1 = _multiply(c2, _ROUND[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in 16-bit halves so that int64 never overflows."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise f32 [B V]: the argmax of logits plus it is a draw from their softmax.

    The key is the row's seed [B]; the counter is (vocabulary index, position [B], 0, 0).
    """
    index = torch.arange(vocabulary, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    seed, position = seed.unsqueeze(1), position.long().unsqueeze(1)
    word = philox((seed & _MASK, (seed >> 32) & _MASK), (index, position, zero, zero))[0]
    # 23 bits and a half fit a float32; of 24 the largest rounds to 1, and its noise is infinite
    uniform = ((word >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
