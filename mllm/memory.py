"""How much KV pool a run gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mllm import requests
from mllm.cache import KVPool
from mllm.errors import PromptError
from mllm.model import Model
from mllm.requests import Request
from mllm.table import RequestTable

PAGE_SIZE = {"cpu": 16, "cuda": 64}
"""Tokens in a page: few waste less of a row's last page, many let a kernel read longer runs."""


def allocate(
    model: Model, made: Sequence[Request], *, rows: int, max_total_tokens: int | None
) -> tuple[KVPool, RequestTable]:
    """A KV pool and a request table, as large as the `rows` largest requests need or as `max_total_tokens` allows.

    Raises `ValueError` for a limit below one page.
    """
    page_size = PAGE_SIZE.get(model.device.type, 64)
    needed = sorted((-(-request.slots // page_size) for request in made), reverse=True)
    pages = sum(needed[:rows])
    requests.check_limit("max_total_tokens", max_total_tokens, page_size)
    if max_total_tokens is not None:
        pages = min(pages, max_total_tokens // page_size)
    pool = KVPool.empty(model.config.text, pages=pages, page_size=page_size, device=model.device, dtype=model.dtype)
    return pool, RequestTable.empty(rows=rows, pages=pages, page_size=page_size, row_pages=needed[0])


def fit(request: Request, table: RequestTable) -> Request:
    """The request, cut to what one row can hold of it. Raises `PromptError` where that is not even its prompt."""
    if request.slots <= table.row_tokens:
        return request
    if request.length > table.row_tokens:
        what = requests.describe(request.layout)
        raise PromptError(f"prompts[{request.index}]: {what} exceed the KV pool of {table.row_tokens} tokens")
    return request.cut_to(table.row_tokens)


def decode_shape(device: torch.device, rows: int, pages: int) -> tuple[int, int]:
    """Rows and listed pages of a decode batch that has `rows` rows, the longest with `pages` pages.

    A CPU computes what it is given, so rows are not padded, and pages are listed in powers of two so that growing
    rows need few recordings. A GPU's kernels look at each row's length, so its batches list every page a row can
    have; rows are padded to powers of two, which cost a recording each.
    """
    if device.type == "cpu":
        return rows, _power_of_two(pages)
    return _power_of_two(rows), 2**31 - 1


def _power_of_two(count: int) -> int:
    """The first power of two from `count` on."""
    return 1 << (count - 1).bit_length()
