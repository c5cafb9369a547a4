"""The request table: which row of it is whose, and which pages of the KV pool each row owns.

It lives on the host and is donated by the stages that change it (`mllm.stages.table`). Its invariants, which
hold between any two stages:

    free[:n_free]                    page ids that nobody owns, a stack
    pages[r, :held[r]]               page ids that row r owns, in token order; SINK beyond
    length[r] <= held[r] * S         every token whose KV is in the pool has a slot
    live[r] or held[r] == 0          a dead row owns nothing
    n_free + sum(held) == P - 1      no page is lost, none is owned twice
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.cache import SINK
from mllm.state import State, state, tensor


@state
class RequestTable(State):
    """Rows, pages and lengths of the requests that run. `page_size` is S, the tokens of a page."""

    pages: Tensor = tensor("R N", torch.int32)
    held: Tensor = tensor("R", torch.int32)
    length: Tensor = tensor("R", torch.int32)
    live: Tensor = tensor("R", torch.bool)
    free: Tensor = tensor("P-1", torch.int32)
    n_free: int
    page_size: int

    @classmethod
    def empty(cls, *, rows: int, pages: int, page_size: int, row_pages: int | None = None) -> RequestTable:
        """A table of `rows` dead rows over a pool of `pages` usable pages.

        A row can list at most `row_pages` pages (None: all of them), which bounds the context of a request.
        """
        listed = pages if row_pages is None else min(row_pages, pages)
        return cls(
            pages=torch.full((rows, listed), SINK, dtype=torch.int32, device="cpu"),
            held=torch.zeros(rows, dtype=torch.int32, device="cpu"),
            length=torch.zeros(rows, dtype=torch.int32, device="cpu"),
            live=torch.zeros(rows, dtype=torch.bool, device="cpu"),
            free=torch.arange(pages, 0, -1, dtype=torch.int32, device="cpu"),  # page 1 is on top of the stack
            n_free=pages,
            page_size=page_size,
        )

    @property
    def row_tokens(self) -> int:
        """The longest context that one row can hold, in tokens."""
        return self.pages.shape[1] * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens need."""
        return -(-tokens // self.page_size)
