"""The KV pool: keys and values of every live token, in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.config import TextConfig
from mllm.state import State, state, tensor

SINK = 0
"""Page 0 belongs to nobody: padding rows of a batch write there, and no row is ever given it."""
PAGE_SIZE = {"cpu": 16, "cuda": 64}
"""Tokens in a page: few waste less of a row's last page, many let a kernel read longer runs."""


@state
class KVPool(State):
    """Device memory of all keys and values; donated by every stage that writes it.

    Slot `p * S + s` is slot s of page p. What a slot holds that no row owns is unspecified, but finite or not,
    it is never read as somebody's context.
    """

    keys: Tensor = tensor("L P S K D")
    values: Tensor = tensor("L P S K D")

    @classmethod
    def empty(
        cls, config: TextConfig, *, pages: int, page_size: int, device: str | torch.device, dtype: torch.dtype
    ) -> KVPool:
        """A pool of `pages` usable pages of `page_size` tokens; the sink comes on top."""
        shape = (config.num_hidden_layers, pages + 1, page_size, config.num_key_value_heads, config.head_dim)
        return cls(
            keys=torch.zeros(shape, dtype=dtype, device=device), values=torch.zeros(shape, dtype=dtype, device=device)
        )


def bytes_per_token(config: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of KV pool that one token takes: 2 * L * K * D elements."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
