"""Attention of long prompts on Hopper: FlashInfer's FA3, planned on the host once for all layers.

For heads that `flash_hopper` does not take, such as those of 256. Beyond some thousands of tokens it is 1.5 times as fast
as `flash`, but the plan reads the batch's bounds on the host, so it cannot be recorded, and its kernels compile at first
use (a minute or two, kept in ~/.cache/flashinfer). `generate` prefills fewer tokens at a time (`budget.PREFILL_TOKENS`),
so only who calls the stages comes here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mllm.batch import ForwardBatch, upload_all
from mllm.config import TextConfig
from mllm.errors import MissingPackageError
from mllm.kernels.flash import LOG2E

WORKSPACE_BYTES = 128 * 2**20
"""Room for what FlashInfer plans; the size that its documentation recommends."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T H D], keys, values [P S K D] -> [T A]


def plan(batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype) -> Attend:
    """Attention of the batch, to be called in every layer with queries that are times scale and log2(e).

    Raises `MissingPackageError` without FlashInfer.
    """
    try:
        import flashinfer
    except ImportError as error:
        needs = f"a prefill of {len(batch.tokens)} tokens at once, which could be in smaller chunks, needs"
        raise MissingPackageError.of(error, needs=needs, install="'mllm-runtime[cuda]'") from error
    device = batch.tokens.device
    counts, lengths = (torch.tensor(column, device="cpu") for column in zip(*batch.rows(), strict=True))
    held = (lengths + page_size - 1) // page_size
    listed = torch.cat(
        [row * batch.pages.shape[1] + torch.arange(n, device="cpu") for row, n in enumerate(held.tolist())]
    )
    (listed,) = upload_all([listed], device)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa3")
    wrapper.plan(
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        torch.nn.functional.pad(held.cumsum(0), (1, 0)).int(),
        batch.pages.flatten()[listed],
        ((lengths - 1) % page_size + 1).int(),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        page_size,
        causal=True,
        sm_scale=1 / LOG2E,
        q_data_type=dtype,
        kv_data_type=dtype,
    )

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = wrapper.run(q, (keys, values))
        return out.flatten(1)

    return attend
