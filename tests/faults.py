"""Faults injected at the boundaries of the stages, as `mllm.generate` calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from attrs import define, field, frozen

from mllm import stages

CALLED = ("admit", "vit", "prefill", "sample", "step", "commit", "release")
"""The stages that the loop calls; `decode`, the other `sample` and `advance` run inside `step`."""


@frozen
class Boundary:
    """Before or after the `call`-th call (from 0) of a stage."""

    stage: str
    call: int
    after: bool


@define
class Faults:
    """Watches every call of a stage, and raises `error` at one boundary if it is told to."""

    passed: list[Boundary] = field(factory=list)
    at: Boundary | None = None
    error: BaseException | None = None
    counts: Counter[str] = field(factory=Counter)

    def walk(self, call: Callable[[], Any]) -> tuple[Any, list[Boundary]]:
        """What `call` returns without a fault, and every boundary it passed."""
        self.clear()
        return call(), list(self.passed)

    def arm(self, at: Boundary, error: BaseException) -> None:
        """Raise `error` when the boundary is passed next, counted from now on."""
        self.clear()
        self.at, self.error = at, error

    def clear(self) -> None:
        self.passed.clear()
        self.counts.clear()
        self.at = self.error = None

    def wrap(self, name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = self.counts[name]
            self.counts[name] += 1
            self.cross(Boundary(name, number, after=False))
            out = stage(*args, **kwargs)
            self.cross(Boundary(name, number, after=True))
            return out

        return call

    def cross(self, boundary: Boundary) -> None:
        self.passed.append(boundary)
        if boundary == self.at and self.error is not None:
            raise self.error


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Every stage that the loop calls, watched; see `Faults`."""
    made = Faults()
    for name in CALLED:
        monkeypatch.setattr(stages, name, made.wrap(name, getattr(stages, name)))
    return made
