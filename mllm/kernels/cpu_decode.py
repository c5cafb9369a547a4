"""The op tables of CPUs in float32: kernels that numba compiles when this module is first imported.

That takes some ten seconds on the first import of all; numba keeps the machine code for later processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor

from mllm.kernels import cpu, cpu_attend, cpu_linear, cpu_step, reference

FEW = 64
"""Rows up to which our products are 1.2 to 3 times as fast as MKL's on an AMD core. With more it depends on the maker."""

DECODE = attrs.evolve(
    cpu.CPU,
    plan=cpu_attend.plan,
    norm_linear=cpu_linear.norm_linear,
    attend_=cpu_attend.attend_,
    linear_add=cpu_linear.linear_add,
    norm_gate=cpu_linear.norm_gate,
    head=cpu_linear.head,
    sample=cpu_step.sample,
    advance_=cpu_step.advance_,
)


def _by_rows(few: Callable[..., Any], many: Callable[..., Any]) -> Callable[..., Any]:
    def op(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (few if len(x) <= FEW else many)(x, *args, **kwargs)

    return op


def _head(x: Tensor, last: Tensor | None, norm: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    logits: Tensor = _norm_linear(x if last is None else x.index_select(0, last), norm, weight, eps=eps)[1]
    return logits


_norm_linear = _by_rows(cpu_linear.norm_linear, cpu.norm_linear)
PROMPT = attrs.evolve(
    cpu.CPU,
    norm_linear=_norm_linear,
    linear_add=_by_rows(cpu_linear.linear_add, reference.linear_add),
    norm_gate=_by_rows(cpu_linear.norm_gate, cpu.norm_gate),
    head=_head,
)
