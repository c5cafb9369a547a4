"""Memory that runs out while a function is recorded or replayed: nothing is left of it, and the next call is right."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Gpu, static_recorder
from test_transform import Carry, Store, bump, captured, carry, store, usable
from torch import Tensor

from mllm.state import State, donate, is_donated, state, tensor
from mllm.transform import capture, eager_recorder

NO_MEMORY = "CUDA out of memory. Tried to allocate 1 GB"
WAYS = ("in the run before", "in the recording", "when it is made executable")


class Failing:
    """`bump`, which runs out of memory in its `at`-th call from now, when it has written half of what it writes."""

    def __init__(self) -> None:
        self.at = -1
        self.seen: list[weakref.ref[Tensor]] = []

    def __call__(self, pool: Store, batch: Carry, x: Tensor, times: int = 1) -> tuple[Store, Carry, Tensor]:
        self.seen += [weakref.ref(batch.at), weakref.ref(x)]
        self.at -= 1
        if self.at == -1:
            pool = donate(pool, to="bump")
            pool.data[:1].add_(1000)
            raise torch.OutOfMemoryError(NO_MEMORY)
        return bump(pool, batch, x, times)

    __name__ = "bump"


def arm(fn: Failing, gpu: Gpu, way: str) -> None:
    """Let the next recording fail."""
    fn.at = {"in the run before": 0, "when it is made executable": -1}.get(way, 1)
    gpu.full = way == "when it is made executable"


def fail(step: Callable[..., Any], *args: Any) -> None:
    """A call that runs out of memory: what it raises is what ran out, whatever else went wrong after it."""
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        step(*args)
    assert isinstance(caught.value, torch.OutOfMemoryError) or "CUDA error" in str(caught.value)
    del caught
    gc.collect()  # what pytest holds of it


@pytest.mark.parametrize("way", WAYS)
def test_a_recording_that_fails_leaves_nothing_and_the_next_one_is_right(way: str) -> None:
    gpu, fn = Gpu(), Failing()
    step = captured(gpu.record, fn)
    for _ in range(2):
        pool, batch = store(1, 2), carry(5, 6)
        arm(fn, gpu, way)
        fail(step, pool, batch, torch.ones(2))
        assert not is_donated(pool)
        assert pool.data.tolist() == ([1001, 2] if way == "in the run before" else [2, 3])  # what had been written
        assert batch.at.tolist() == [5, 6]
        assert len(step.recordings) == 0  # type: ignore[attr-defined]
        assert (gpu.stream.name, gpu.underway, +gpu.users) == ("home", set(), {})
        assert [ref() for ref in fn.seen if ref() is not None] == []
    usable(step, pool, batch, torch.ones(2))
    assert len(step.recordings) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", WAYS)
def test_a_recording_that_fails_among_others_costs_them_nothing(way: str) -> None:
    gpu, fn = Gpu(), Failing()
    step = captured(gpu.record, fn)
    pool, batch, _ = step(store(0), carry(0), torch.ones(1))
    arm(fn, gpu, way)
    fail(step, pool, batch, torch.ones(1), 2)
    written = pool.data.tolist()
    pool, batch, out = step(pool, batch, torch.ones(1))  # a replay
    assert (out.tolist(), batch.at.tolist()) == ([(written[0] + 1) * 10 + 1], [2])
    for times in (2, 3, 2, 1, 3):
        before, at = pool.data.tolist()[0], batch.at.tolist()[0]
        pool, batch, out = step(pool, batch, torch.ones(1), times)
        assert out.tolist() == [(before + times) * 10 + at]
    assert len(step.recordings) == 3  # type: ignore[attr-defined]
    assert len(set(gpu.pools)) == (2 if way == "when it is made executable" else 1)  # they share its memory
    assert sum(gpu.users.values()) == 3
    del step
    gc.collect()
    assert +gpu.users == {}


def test_a_failure_that_somebody_keeps_does_not_disturb_the_next_recording() -> None:
    """The traceback holds the graph, and tensors in its memory."""
    gpu, fn, kept = Gpu(), Failing(), []
    step = captured(gpu.record, fn)
    pool, batch = store(1), carry(5)
    for way in WAYS * 2:
        arm(fn, gpu, way)
        with pytest.raises(RuntimeError, match="out of memory") as caught:
            step(pool, batch, torch.ones(1))
        kept.append(caught.value)
    usable(step, pool, batch, torch.ones(1))
    kept.clear()
    del caught
    gc.collect()
    assert sum(gpu.users.values()) == 1


@pytest.mark.parametrize("way", WAYS)
def test_what_a_failed_run_launched_is_waited_for(way: str) -> None:
    """It reads buffers whose memory is given to others next, and writes to the pool."""
    gpu, fn = Gpu(), Failing()
    arm(fn, gpu, way)
    fail(captured(gpu.record, fn), store(0), carry(0), torch.ones(1))
    assert gpu.waits == [("side", "home"), ("home", "side")]


def test_an_error_of_another_kind_goes_through() -> None:
    gpu, calls = Gpu(), itertools.count()

    def interrupted(x: Tensor) -> Tensor:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return x + 1

    step = capture(interrupted, recorder=gpu.record)
    with pytest.raises(KeyboardInterrupt):
        step(torch.ones(1))
    assert (gpu.stream.name, gpu.underway) == ("home", set())
    assert [step(torch.ones(1)).tolist() for _ in range(3)] == [[2]] * 3


def test_no_number_of_failures_makes_anything_grow() -> None:
    gpu, fn = Gpu(), Failing()
    step = captured(gpu.record, fn)

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def run(count: int) -> None:
        for i in range(count):
            arm(fn, gpu, WAYS[i % 3])
            with contextlib.suppress(RuntimeError):
                step(store(*range(i % 7 + 1)), carry(*range(i % 7 + 1)), torch.ones(i % 7 + 1))
        gpu.pools.clear()
        gpu.waits.clear()
        fn.seen.clear()

    run(8)
    before = held()
    run(200)
    assert held() <= before
    assert (len(step.recordings), gpu.underway, +gpu.users) == (0, set(), {})  # type: ignore[attr-defined]


# a replay


@pytest.mark.parametrize("recorder", [eager_recorder, static_recorder])
def test_a_replay_that_fails_has_taken_its_arguments_and_the_next_is_right(recorder: Any) -> None:
    fn = Failing()
    step = captured(recorder, fn)
    pool, batch, _ = step(store(0), carry(0), torch.ones(1))
    kept = Store(data=pool.data)  # as the loop keeps the pool: what was written is nobody's
    fn.at = 0
    fail(step, pool, batch, torch.ones(1))
    assert is_donated(pool)
    assert is_donated(batch)
    written = kept.data.tolist()[0]
    _, batch, out = step(kept, carry(7), torch.ones(1))
    assert (out.tolist(), batch.at.tolist()) == ([(written + 1) * 10 + 7], [8])
    assert len(step.recordings) == 1  # type: ignore[attr-defined]


@state
class Pair(State):
    one: Tensor = tensor("B")
    two: Tensor = tensor("B")


def test_an_argument_that_was_copied_in_half_is_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that lay there before, which would not be copied otherwise."""

    def fn(pool: Store, batch: Carry, x: Pair) -> tuple[Store, Carry, Tensor]:
        return bump(pool, batch, x.one * 10 + x.two)

    def pair(number: float) -> Pair:
        return Pair(one=torch.tensor([number]), two=torch.tensor([number]))

    step = captured(eager_recorder, fn)
    old, new = pair(1), pair(2)
    pool, batch, _ = step(store(0), carry(0), old)
    copy, copies = Tensor.copy_, itertools.count()

    def copy_once(to: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if next(copies):
            raise torch.OutOfMemoryError(NO_MEMORY)
        return copy(to, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", copy_once)
        fail(step, pool, batch, new)
    for x, total in ((old, 22), (new, 44)):
        pool, batch, _ = step(pool, batch, x)
        assert pool.data.tolist() == [total]
    with monkeypatch.context() as patch:  # the carried one, of which only that half is there now
        patch.setattr(Tensor, "copy_", lambda *args, **kwargs: fail_now())
        fail(step, pool, carry(5), new)
    pool, batch, out = step(pool, carry(3), new)
    assert (out.tolist(), batch.at.tolist()) == ([663], [4])


def fail_now() -> None:
    raise torch.OutOfMemoryError(NO_MEMORY)
