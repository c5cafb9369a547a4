"""capture: what it returns is what the function would, whatever a recording overwrites; refusals cost nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
from graphs import Gpu, static_recorder
from hypothesis import given
from hypothesis import strategies as st
from running import Running, start
from tiny import Tiny, examples, four_prompts
from torch import Tensor

from mllm import stages
from mllm.cache import KVPool
from mllm.errors import CaptureError, DonatedError
from mllm.sampling import Sampling, sampling_batch
from mllm.state import State, clone, donate, is_donated, leaves, state, tensor
from mllm.transform import Recorder, capture, eager_recorder

RECORDERS: dict[str, Callable[[], Recorder]] = {
    "eager": lambda: eager_recorder, "static": lambda: static_recorder, "graphs": lambda: Gpu().record,
}  # fmt: skip


@pytest.fixture(params=RECORDERS)
def recorder(request: pytest.FixtureRequest) -> Any:
    return RECORDERS[request.param]()


@state
class Store(State):
    data: Tensor = tensor("B")


@state
class Carry(State):
    at: Tensor = tensor("B")


def store(*numbers: float) -> Store:
    return Store(data=torch.tensor(numbers, dtype=torch.float32))


def carry(*numbers: float) -> Carry:
    return Carry(at=torch.tensor(numbers, dtype=torch.float32))


def bump(pool: Store, batch: Carry, x: Tensor, times: int = 1) -> tuple[Store, Carry, Tensor]:
    """pool += x; batch += 1; the result depends on all three."""
    pool, batch = donate(pool, to="bump"), donate(batch, to="bump")
    pool.data.add_(x * times)
    result = pool.data * 10 + batch.at
    batch.at.add_(1)
    return pool, batch, result


def captured(recorder: Any, fn: Callable[..., Any] = bump, **more: Any) -> Callable[..., Any]:
    return capture(fn, **{"donate": ("pool",), "carry": ("batch",), "recorder": recorder, **more})


def test_the_static_recorder_shows_what_is_not_copied_out() -> None:
    buffers = {"x": torch.ones(1)}
    first, replay = static_recorder(lambda: (buffers["x"], buffers["x"] * 2))
    one = replay()
    assert (first[0] is buffers["x"], one[0] is buffers["x"]) == (True, True)
    buffers["x"].fill_(5)
    assert replay()[1] is one[1]  # the same memory, as of a graph
    assert (first[1].tolist(), one[1].tolist()) == ([2], [10])


# the rules, on a toy


def test_many_steps_equal_the_function_itself(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, their_pool, their_batch = store(0, 0), carry(5, 6), store(0, 0), carry(5, 6)
    for i in range(8):
        x = torch.tensor([i, 2.0 * i])
        pool, batch, got = step(pool, batch, x)
        their_pool, their_batch, want = bump(their_pool, their_batch, x)
        for a, b in ((got, want), (pool.data, their_pool.data), (batch.at, their_batch.at)):
            assert torch.equal(a, b)
    assert len(step.recordings) == 1  # type: ignore[attr-defined]


def test_the_result_of_a_call_survives_later_calls(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch = store(0), carry(0)
    held = []
    for i in range(5):
        pool, batch, out = step(pool, batch, torch.tensor([float(i)]))
        held.append((out, out.clone()))
    assert all(torch.equal(a, b) for a, b in held)
    assert len({a.data_ptr() for a, _ in held}) == 5


def test_the_pool_stays_where_it_lies(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch = store(1, 2), carry(0, 0)
    address = pool.data.data_ptr()
    for _ in range(3):
        pool, batch, _ = step(pool, batch, torch.ones(2))
        assert pool.data.data_ptr() == address
    assert pool.data.tolist() == [4, 5]


def test_what_it_takes_is_dead_and_says_who_took_it(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, x = store(0), carry(0), torch.ones(1)
    for _ in range(2):  # the recording call and a replay
        old = pool, batch
        pool, batch, _ = step(pool, batch, x)
        for dead in old:
            with pytest.raises(DonatedError, match="captured bump"):
                leaves(dead)
    assert x.tolist() == [1]


def test_another_argument_is_copied_in_each_time_and_never_written(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch = store(0), carry(0)
    x = torch.ones(1)
    for number in (1.0, 5.0, 7.0):
        x.fill_(number)  # the same tensor with other numbers
        pool, batch, _ = step(pool, batch, x)
        assert x.tolist() == [number]
    assert pool.data.tolist() == [13]


def test_an_argument_that_comes_back_is_a_result_like_any_other(recorder: Any) -> None:
    """At the first call, too, where it is one of the recording's buffers."""

    def fn(pool: Store, batch: Carry, x: Tensor) -> tuple[Store, Carry, Tensor]:
        pool, batch, _ = bump(pool, batch, x)
        return pool, batch, x

    step = captured(recorder, fn)
    pool, batch, held = store(0), carry(0), []
    for number in (1.0, 2.0, 3.0):
        pool, batch, out = step(pool, batch, torch.tensor([number]))
        held.append(out)
    assert [out.tolist() for out in held] == [[1], [2], [3]]


def test_a_carry_from_elsewhere_is_copied_in_and_left_alone(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, _ = step(store(0), carry(0), torch.zeros(1))
    fresh = carry(100)
    mine = fresh.at
    pool, after, out = step(pool, fresh, torch.zeros(1))
    assert (out.tolist(), after.at.tolist()) == ([100], [101])
    assert mine.tolist() == [100]  # its own tensor was copied, not written
    assert is_donated(fresh)
    with pytest.raises(DonatedError, match="with another batch"):
        _ = batch.at  # the one that lay in the buffers was still held: dead, and it says so
    _, _, out = step(pool, after, torch.zeros(1))
    assert out.tolist() == [101]


def test_a_carry_that_nobody_holds_any_more_may_be_replaced(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, _ = step(store(0), carry(0), torch.zeros(1))
    del batch
    gc.collect()
    for start_at in (3.0, 9.0):
        pool, _, out = step(pool, carry(start_at), torch.zeros(1))
        assert out.tolist() == [start_at]


def test_a_carry_may_go_on_through_the_function_itself_in_between(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, _ = step(store(0), carry(0), torch.zeros(1))
    pool, batch, _ = bump(pool, batch, torch.ones(1))  # eager, on the recording's own buffers
    pool, batch, out = step(pool, batch, torch.ones(1))
    assert (out.tolist(), batch.at.tolist()) == ([22], [3])


def test_a_state_among_the_other_arguments_is_read_whenever_it_is_a_new_one(recorder: Any) -> None:
    def fn(pool: Store, batch: Carry, x: Store) -> tuple[Store, Carry, Tensor]:
        return bump(pool, batch, x.data)

    step = captured(recorder, fn)
    pool, batch = store(0), carry(0)
    one, two = store(1), store(2)
    for x in (one, one, two, one, two, two):
        pool, batch, _ = step(pool, batch, x)
        assert not is_donated(x)
    assert pool.data.tolist() == [9]


def test_what_the_caller_has_done_with_is_let_go_of_and_nothing_is_no_sign_of_it(recorder: Any) -> None:
    def fn(pool: Store, batch: Carry, x: Store | None) -> tuple[Store, Carry, Tensor]:
        return bump(pool, batch, torch.zeros(1) if x is None else x.data)

    step = captured(recorder, fn)
    x = store(1)
    pool, batch, _ = step(store(0), carry(0), x)
    gone = ref(x)
    del x
    assert gone() is None
    pool, _, _ = step(pool, batch, None)
    assert pool.data.tolist() == [1]


def test_each_size_has_a_recording_of_its_own(recorder: Any) -> None:
    def fn(pool: Store, batch: Carry) -> tuple[Store, Carry, Tensor]:
        pool, batch = donate(pool, to="fn"), donate(batch, to="fn")
        pool.data[: len(batch.at)].add_(batch.at)
        return pool, batch, pool.data.sum()

    step = captured(recorder, fn)
    pool = store(0, 0, 0)
    carries = {n: carry(*[1.0] * n) for n in (1, 2, 3)}
    for n in (1, 3, 2, 3, 1, 2):
        pool, carries[n], total = step(pool, carries[n])
    assert len(step.recordings) == 3  # type: ignore[attr-defined]
    assert (pool.data.tolist(), total.tolist()) == ([6, 4, 2], 12)


def test_plain_values_are_part_of_the_signature(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch = store(0), carry(0)
    for times in (1, 10, 1):
        pool, batch, _ = step(pool, batch, torch.ones(1), times=times)
    assert pool.data.tolist() == [12]
    assert len(step.recordings) == 2  # type: ignore[attr-defined]


def test_arguments_by_name_and_by_place_are_the_same_call(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, _ = step(store(0), carry(0), torch.ones(1))
    pool, batch, _ = step(x=torch.ones(1), batch=batch, pool=pool, times=1)
    assert len(step.recordings) == 1  # type: ignore[attr-defined]
    for wrong, more in (
        ((pool, batch), {}),
        ((pool, batch, 1, 1, 1), {}),
        ((pool, batch, 1), {"x": 1}),
        ((), {"y": 1}),
    ):
        with pytest.raises(TypeError):
            step(*wrong, **more)
    assert not is_donated(pool)


def test_a_list_that_changed_is_another_argument_though_all_others_are_in_place(recorder: Any) -> None:
    def fn(pool: Store, batch: Carry, many: list[int]) -> tuple[Store, Carry, Tensor]:
        return bump(pool, batch, torch.full((1,), float(sum(many))))

    step = captured(recorder, fn)
    pool, batch, many = store(0), carry(0), [1]
    for _ in range(3):
        pool, batch, _ = step(pool, batch, many)
        many.append(1)
    assert len(step.recordings) == 3  # type: ignore[attr-defined]
    assert pool.data.tolist() == [6]


# what it refuses


def test_what_a_failed_copy_left_is_not_taken_for_nothing(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(pool: Store, batch: Carry, x: Store | None) -> tuple[Store, Carry, Tensor]:
        return bump(pool, batch, torch.zeros(1) if x is None else x.data)

    step = captured(recorder, fn)
    pool, batch, _ = step(store(0), carry(0), store(1))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(pool, batch, store(5))
    pool, batch, _ = step(pool, batch, None)
    assert len(step.recordings) == 2  # type: ignore[attr-defined]
    assert pool.data.tolist() == [1]


def test_a_dead_state_among_the_other_arguments_is_refused_though_it_lies_there(recorder: Any) -> None:
    def fn(pool: Store, batch: Carry, x: Store) -> tuple[Store, Carry, Tensor]:
        return bump(pool, batch, x.data)

    step = captured(recorder, fn)
    x = store(1)
    pool, batch, _ = step(store(0), carry(0), x)
    kept = donate(x, to="another stage")
    with pytest.raises(DonatedError, match="another stage"):
        step(pool, batch, x)
    pool, batch, _ = step(pool, batch, kept)
    assert pool.data.tolist() == [2]


def usable(step: Callable[..., Any], pool: Store, batch: Carry, x: Tensor) -> None:
    """After a refusal nothing was taken, and the next good call computes what it should."""
    assert not is_donated(pool)
    assert not is_donated(batch)
    before, at = pool.data.clone(), batch.at.clone()
    pool, batch, out = step(pool, batch, x)
    assert torch.equal(pool.data, before + x)
    assert torch.equal(out, (before + x) * 10 + at)
    assert torch.equal(batch.at, at + 1)


def test_a_foreign_pool_is_refused(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, _ = step(store(0), carry(0), torch.ones(1))
    foreign = store(50)
    with pytest.raises(CaptureError, match=r"captured with another pool: tensor 0 .* capture again"):
        step(foreign, batch, torch.ones(1))
    assert foreign.data.tolist() == [50]
    assert not is_donated(foreign)
    usable(step, pool, batch, torch.ones(1))


def test_a_foreign_pool_with_a_foreign_carry_and_input_is_refused_before_anything_is_copied(recorder: Any) -> None:
    step = captured(recorder)
    pool, batch, _ = step(store(0), carry(0), torch.ones(1))
    with pytest.raises(CaptureError):
        step(store(50), carry(9), torch.full((1,), 7.0))
    usable(step, pool, batch, torch.ones(1))


def test_a_signature_beyond_the_limit_is_refused_and_names_the_argument(recorder: Any) -> None:
    step = captured(recorder, limit=1)
    pool, batch, _ = step(store(0), carry(0), torch.ones(1))
    with pytest.raises(CaptureError, match=r"bump has 1 recordings.*: times differs"):
        step(pool, batch, torch.ones(1), times=2)
    with pytest.raises(CaptureError, match=r"x differs"):
        step(pool, batch, torch.ones(1).double())
    with pytest.raises(CaptureError, match=r"batch, x differs"):
        step(pool, carry(1, 2), torch.ones(2))
    usable(step, pool, batch, torch.ones(1))


def test_a_pool_taken_before_is_refused_and_the_batch_lives(recorder: Any) -> None:
    step = captured(recorder)
    old = store(0)
    pool, batch, _ = step(old, carry(0), torch.ones(1))
    with pytest.raises(DonatedError, match="captured bump"):
        step(old, batch, torch.ones(1))
    usable(step, pool, batch, torch.ones(1))


def test_a_batch_taken_before_is_refused_and_the_pool_lives(recorder: Any) -> None:
    step = captured(recorder)
    old = carry(0)
    pool, batch, _ = step(store(0), old, torch.ones(1))
    with pytest.raises(DonatedError, match="captured bump"):
        step(pool, old, torch.ones(1))
    usable(step, pool, batch, torch.ones(1))


@pytest.mark.parametrize("kept", ["pool", "batch", "both", "all", "copy"])
def test_a_function_that_does_not_hand_back_what_it_takes_is_refused(recorder: Any, kept: str) -> None:
    def loses(pool: Store, batch: Carry, x: Tensor) -> Any:
        pool, batch, out = bump(pool, batch, x)
        return {"pool": (batch, out), "batch": (pool, out), "both": (out,), "all": None,
                "copy": (clone(pool), batch, out)}[kept]  # fmt: skip

    step = captured(recorder, loses)
    pool, batch = store(0), carry(0)
    with pytest.raises(CaptureError, match="loses does not hand back"):
        step(pool, batch, torch.ones(1))
    assert not is_donated(pool)
    assert not is_donated(batch)
    assert len(step.recordings) == 0  # type: ignore[attr-defined]


def test_a_function_that_fails_takes_nothing(recorder: Any) -> None:
    def fails(pool: Store, batch: Carry, x: Tensor) -> Any:
        raise RuntimeError("no memory")

    step = captured(recorder, fails)
    pool, batch = store(3), carry(4)
    with pytest.raises(RuntimeError, match="no memory"):
        step(pool, batch, torch.ones(1))
    usable(captured(recorder), pool, batch, torch.ones(1))


def test_a_name_that_is_no_argument_or_a_limit_of_none_is_refused_when_it_is_captured() -> None:
    with pytest.raises(CaptureError, match=r"bump has no argument \['pooll'\]; it has \['pool', "):
        capture(bump, donate=("pooll",))
    with pytest.raises(CaptureError, match="limit=0: bump needs at least one recording"):
        capture(bump, limit=0)


# the decode step of a model

Serve = Callable[[KVPool, Any, Any], tuple[KVPool, Any, Tensor]]


def prepared(model: Tiny, *, new: int = 24) -> Running:
    run = start(model.ours, four_prompts(model), new=new, page_size=4)
    for i, request in enumerate(run.requests):
        if request.length > 1:
            run.prefill([(i, 0, request.length - 1)])
    return run


def drawn(run: Running, which: list[int], temperature: float) -> Any:
    rows = [Sampling(temperature=temperature, seed=i) for i in which]
    return sampling_batch(rows, size=len(rows), device="cpu")


@examples(12)
@given(data=st.data(), name=st.sampled_from(sorted(RECORDERS)))
def test_captured_decode_with_changing_batches_equals_the_stages(
    vision_model: Tiny, data: st.DataObject, name: str
) -> None:
    """Rows come and go, temperatures change: every turn makes a new batch and runs a few steps on it."""
    config, ops, weights = vision_model.ours.config, vision_model.ours.ops, vision_model.ours.weights
    step = partial(stages.step, weights, config=config, ops=ops)
    graph = capture(step, donate=("pool",), carry=("batch",), recorder=RECORDERS[name]())
    turns = [
        (data.draw(st.lists(st.sampled_from(range(4)), min_size=1, unique=True)), data.draw(st.integers(1, 4)),
         data.draw(st.sampled_from([0.0, 1.5])))
        for _ in range(5)
    ]  # fmt: skip

    def serve(fn: Serve) -> tuple[list[list[list[int]]], Tensor]:
        run = prepared(vision_model)
        last = {i: int(r.layout.tokens[-1]) for i, r in enumerate(run.requests)}
        out = []
        held: list[tuple[Tensor, list[int]]] = []
        for which, count, temperature in turns:
            batch = run.decode_batch([last[i] for i in which], which=which)
            sampling = drawn(run, which, temperature)
            steps = []
            for _ in range(count):
                run.pool, batch, tokens = fn(run.pool, batch, sampling)
                run.table = stages.commit(run.table, [run.rows[i] for i in which], [1] * len(which))
                steps.append(tokens.tolist())
                held.append((tokens, tokens.tolist()))
            last.update(zip(which, steps[-1], strict=True))
            out.append(steps)
        assert all(tensor.tolist() == numbers for tensor, numbers in held)  # results are not overwritten
        return out, run.pool.keys.clone()

    want, their_keys = serve(step)
    got, our_keys = serve(graph)
    assert got == want
    assert torch.equal(our_keys, their_keys)


def test_a_model_s_step_refuses_another_pool_and_goes_on(vision_model: Tiny, recorder: Any) -> None:
    model = vision_model.ours
    run, other = prepared(vision_model), prepared(vision_model)
    step = capture(partial(stages.step, model.weights, config=model.config, ops=model.ops),
                   donate=("pool",), carry=("batch",), recorder=recorder)  # fmt: skip
    sampling = drawn(run, [0, 1, 2, 3], 0.0)
    batch = run.decode_batch([int(r.layout.tokens[-1]) for r in run.requests])
    run.pool, batch, first = step(run.pool, batch, sampling)
    with pytest.raises(CaptureError, match="step was captured with another pool"):
        step(other.pool, batch, sampling)
    assert not is_donated(other.pool)
    run.pool, batch, second = step(run.pool, batch, sampling)
    again = other.decode_batch([int(r.layout.tokens[-1]) for r in other.requests])
    for tokens in (first, second):
        other.pool, again, want = stages.step(
            model.weights, other.pool, again, sampling, config=model.config, ops=model.ops
        )
        assert torch.equal(tokens, want)
