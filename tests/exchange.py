"""A model with other ops, whichever of its tables serves a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve

from mllm.kernels.ops import Ops
from mllm.kernels.tables import Tables
from mllm.model import Model


def in_every_table(model: Model, change: Callable[[Ops], Ops]) -> Model:
    """The model with `change` of every table of its ops: `model.ops`, and those by the size of a batch, which a GPU
    takes where it can. It records anew, since it has a shelf of its own."""
    return evolve(model, **{name: changed(getattr(model, name), change) for name in Tables._fields})


def changed(table: Ops | Callable[[int], Ops] | None, change: Callable[[Ops], Ops]) -> Any:
    """`change` of one of a model's tables, whichever form it has."""
    if table is None or isinstance(table, Ops):
        return table and change(table)
    return lambda size: change(table(size))
