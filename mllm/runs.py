"""Requests that hold a row, and the tokens that are on their way to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor

from mllm.completion import Piece
from mllm.requests import Request
from mllm.tokenizer import TextStream


@define(eq=False)
class Run:
    """A request that holds a row: what was made of it so far. As the loop and what a model keeps, it changes in place."""

    request: Request
    row: int
    text: TextStream | None
    tokens: list[int] = field(factory=list)

    @property
    def wanted(self) -> int:
        """Tokens that are still to come, at most."""
        return self.request.new_tokens - len(self.tokens)

    def push(self, token: int, end_tokens: Sequence[int]) -> Piece:
        """Take the next token, and say what it completes and whether it is the last."""
        if token < 0:
            return self.fail(f"the logits after {self.request.length + len(self.tokens)} tokens are not finite")
        self.tokens.append(token)
        reason = None
        if token in end_tokens:
            reason = "stop"
        elif len(self.tokens) == self.request.new_tokens:
            reason = self.request.limit_reason
        text = ""
        if self.text is not None:
            text = self.text.push(token) + (self.text.flush() if reason else "")
        return Piece(index=self.request.index, token=token, text=text, finish_reason=reason)

    def fail(self, error: str) -> Piece:
        """End the request here, and only it."""
        text = self.text.flush() if self.text else ""
        return Piece(index=self.request.index, token=-1, text=text, finish_reason="error", error=error)


class Read:
    """The tokens of one step on their way to the host: [B] of `rows`, padding behind them.

    On a GPU they travel on a stream of their own, so that the next step does not wait for the copy.
    """

    def __init__(self, tokens: Tensor, rows: Sequence[int], stream: torch.cuda.Stream | None) -> None:
        self.rows = rows
        self.there = self.tokens = tokens  # kept until they have been read
        self.done: torch.cuda.Event | None = None
        if stream is not None:
            self.there = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.there.copy_(tokens, non_blocking=True)
            self.done = stream.record_event()

    def get(self) -> list[tuple[int, int]]:
        """(row, token) of each row; waits for the step."""
        if self.done is not None:
            self.done.synchronize()
        return list(zip(self.rows, self.there.tolist(), strict=False))
