"""Every op of the device's table but that of whole steps at the model's shapes, each against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch

from benchmarks import points
from benchmarks.op_cases import Arguments
from benchmarks.session import Case
from mllm import state
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE

OPS = [f.name for f in attrs.fields(Ops) if f.name != "whole_"]  # all of a step, which is a case of test_decode
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # max |a - b| / max |b| after one op


def double(tree: Any) -> Any:
    """The same arguments in float64, and copied, so that an op that writes does not write twice."""
    return state.map_leaves(lambda t: t.double() if t.dtype in CLOSE else t.clone(), tree)


def settled(out: Any) -> Any:
    """A residual stream whose table adds to it later, with that added."""
    if not hasattr(out, "parts"):
        return out
    shift = 0.0 if out.bias is None else out.bias
    return out.x + (out.parts.sum(0) + shift).to(out.x.dtype)


def whole(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn with a product made that its table leaves to the next op, whose time is this op's here."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = fn(*args, **kwargs)
        if hasattr(out, "made"):
            return out.made()
        if hasattr(out, "parts") or not isinstance(out, tuple):
            return out
        return tuple(part.made() if hasattr(part, "made") else part for part in out)

    return run


@pytest.mark.parametrize("op", OPS)
@pytest.mark.benchmark(group="kernels")
def test_kernels(case: Case, batch: int, op: str) -> None:
    model = case.session.model
    try:
        arguments = Arguments(model, batch)
        made = arguments.of(op)
    except points.TooLargeError as error:
        pytest.skip(str(error))
    fn = whole(getattr(arguments.table(op), op))
    fresh = made.args

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """An op that writes gets its own copies each time, or a sum would grow without bound."""
        nonlocal fresh
        if made.writes:
            fresh = tuple(state.clone(arg) if i in made.writes else arg for i, arg in enumerate(made.args))
        return fresh, made.kwargs

    out = case.time(fn, setup, work=made.work)
    case.note(batch_size=batch, op=op)
    if op in ("plan", "vision_plan"):  # the table's own business; attend_ and attend_images show whether it is right
        return
    # the same numbers again, but with the plans of the reference table: a plan is its own table's business
    plain = attrs.evolve(model, ops=REFERENCE, decode_ops=None, vision_ops=None)
    same = Arguments(plain, batch).of(op)
    exact = double(same.args) if op != "sample" else state.clone(same.args)
    expected = getattr(REFERENCE, op)(*exact, **made.kwargs)
    written = [fresh[i] for i in made.writes]
    for got, want in zip(state.leaves((settled(out), written)), state.leaves((expected, [exact[i] for i in made.writes])),
                         strict=True):  # fmt: skip
        if got.is_floating_point():
            assert points.relative(got, want) <= CLOSE[model.dtype]
        else:
            assert torch.equal(got, want)
