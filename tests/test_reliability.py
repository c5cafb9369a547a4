"""What goes wrong while requests run: it ends the request it belongs to or the call, and nothing after it notices."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import random
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from attrs import evolve
from faults import CALLED, Boundary, Faults
from PIL import Image
from tiny import IMAGE, Broken, Tiny, four_prompts, picture, words

import mllm
from mllm import buckets, budget, segments, stages
from mllm.cache import KVPool
from mllm.completion import Completion
from mllm.sampling import Sampling
from mllm.shelf import Shelf
from mllm.table import RequestTable

NEW = [5, 3, 6, 4]
DEVICE_STAGES = (
    "vit",
    "prefill",
    "sample",
    "step",
)  # memory that runs out in one fails requests; in the others, the call


def four(model: Tiny, **options: Any) -> list[Completion]:
    """Text, an image, three images and text, three rows at a time, so that one waits for a row."""
    return mllm.generate(model.ours, four_prompts(model), max_new_tokens=NEW, max_running_requests=3, **options)


@pytest.fixture(params=[1, 2])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens are read at once as on a CPU, or one step behind as on a GPU, whose batches are padded and list every page."""
    if request.param == 2:
        monkeypatch.setitem(importlib.import_module("mllm.loop").AHEAD, False, 2)
        size = buckets.decode_size
        monkeypatch.setattr(buckets, "decode_size", lambda pads, *counts: size(True, *counts))
    return int(request.param)


# a fault at any boundary of any stage


def test_the_walk_passes_every_stage_that_the_loop_calls(vision_model: Tiny, faults: Faults) -> None:
    _, boundaries = faults.walk(lambda: four(vision_model))
    assert {b.stage for b in boundaries} == set(CALLED)
    assert len(boundaries) > 40


@pytest.mark.parametrize("error", [RuntimeError("fault"), KeyboardInterrupt(), MemoryError(), SystemExit(3)], ids=repr)
def test_an_exception_at_any_boundary_ends_the_call_and_the_next_one_is_right(
    vision_model: Tiny, faults: Faults, error: BaseException
) -> None:
    want, boundaries = faults.walk(lambda: four(vision_model))
    ending = [b for b in boundaries if not (isinstance(error, MemoryError) and b.stage in DEVICE_STAGES)]
    assert len(ending) > 15
    for boundary in ending:
        faults.arm(boundary, error)
        with pytest.raises(type(error)) as caught:
            four(vision_model)
        assert caught.value is error
        faults.clear()
        assert four(vision_model) == want, boundary


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("stage", DEVICE_STAGES)
def test_memory_that_runs_out_at_any_boundary_fails_the_batch_and_the_others_get_their_tokens(
    vision_model: Tiny, faults: Faults, ahead: int, stage: str, error: type[Exception]
) -> None:
    want, boundaries = faults.walk(lambda: four(vision_model))
    mine = [b for b in boundaries if b.stage == stage]
    assert len(mine) >= 4
    for boundary in mine:
        faults.arm(boundary, error("out of memory. Tried to allocate 1 GB"))
        outs = four(vision_model)
        failed = [o for o in outs if o.finish_reason == "error"]
        assert 1 <= len(failed) <= (1 if stage == "vit" else 3), boundary
        for out, whole in zip(outs, want, strict=True):
            assert out.tokens == whole.tokens[: len(out.tokens)]
            assert out == whole or (out in failed and "Tried to allocate 1 GB" in (out.error or "")), boundary
        faults.clear()
        assert four(vision_model) == want


def test_pages_are_conserved_when_memory_runs_out_at_any_boundary(
    vision_model: Tiny, faults: Faults, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, boundaries = faults.walk(lambda: four(vision_model))
    tables: list[RequestTable] = []
    for name in ("admit", "commit", "release"):
        stage = getattr(stages, name)

        def watch(table: RequestTable, *args: Any, stage: Callable[..., Any] = stage) -> Any:
            out = stage(table, *args)
            tables.append(out[0] if isinstance(out, tuple) else out)
            owned = tables[-1].pages[tables[-1].pages > 0].tolist()
            free = tables[-1].free[: tables[-1].n_free].tolist()
            assert sorted(free + owned) == list(range(1, len(tables[-1].free) + 1))
            return out

        monkeypatch.setattr(stages, name, watch)
    for boundary in boundaries:
        if boundary.stage in DEVICE_STAGES:
            faults.arm(boundary, torch.OutOfMemoryError("no memory"))
            four(vision_model)
            assert (tables[-1].n_free, bool(tables[-1].live.any())) == (len(tables[-1].free), False), boundary


def test_a_pool_that_stays_between_calls_is_whole_after_a_fault_or_goes(
    vision_model: Tiny, faults: Faults, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose recordings belong to one pool: whatever a fault left in it, the next call is right."""
    put = Shelf.put
    monkeypatch.setattr(Shelf, "put", lambda shelf, lease, keep: put(shelf, lease, keep=True))
    model = evolve(vision_model.ours)  # with a shelf of its own

    def run() -> list[Completion]:
        return mllm.generate(model, four_prompts(vision_model), max_new_tokens=NEW, max_running_requests=3)

    want, boundaries = faults.walk(run)
    assert model.shelf.kept is not None
    stayed = 0
    for error, boundary in itertools.product((RuntimeError("fault"), torch.OutOfMemoryError("no memory")), boundaries):
        faults.arm(boundary, error)
        with contextlib.suppress(RuntimeError):
            run()
        stayed += model.shelf.kept is not None
        faults.clear()
        assert run() == want, boundary
    assert 0 < stayed < 2 * len(boundaries)
    some = model.shelf.kept
    pieces = mllm.stream(model, four_prompts(vision_model), max_new_tokens=4)
    next(pieces)
    assert model.shelf.kept is None  # a second call meanwhile gets a pool of its own
    assert run() == want
    pieces.close()  # type: ignore[attr-defined]
    assert model.shelf.kept is some
    assert run() == want


def test_a_chunked_prompt_that_runs_out_of_memory_leaves_the_queue_whole(
    text_model: Tiny, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of its chunks is dropped; prompts that share a batch with them are not."""
    cut = segments.cut
    monkeypatch.setattr(segments, "cut", lambda admitted, *, limit: cut(admitted, limit=5))
    prompts = [mllm.Prompt(words(n, n)) for n in (4, 23, 7, 2)]
    want, boundaries = faults.walk(lambda: mllm.generate(text_model.ours, prompts, max_new_tokens=4))
    prefills = [b for b in boundaries if b.stage == "prefill"]
    assert len(prefills) == 2 * 8  # 36 tokens in batches of 5
    for boundary in prefills:
        faults.arm(boundary, torch.OutOfMemoryError("no memory"))
        outs = mllm.generate(text_model.ours, prompts, max_new_tokens=4)
        failed = [o for o in outs if o.error]
        assert 1 <= len(failed) <= 3
        assert all(out in failed or out == whole for out, whole in zip(outs, want, strict=True))


def test_a_stream_whose_next_piece_fails_has_given_what_came_before(vision_model: Tiny, faults: Faults) -> None:
    def run() -> list[mllm.Piece]:
        return list(mllm.stream(vision_model.ours, four_prompts(vision_model), max_new_tokens=4))

    want, boundaries = faults.walk(run)
    for boundary in boundaries[::5]:
        faults.arm(boundary, RuntimeError("fault"))
        got: list[mllm.Piece] = []
        pieces = mllm.stream(vision_model.ours, four_prompts(vision_model), max_new_tokens=4)
        with pytest.raises(RuntimeError, match="fault"):
            got.extend(pieces)
        assert got == want[: len(got)]
        assert list(pieces) == []  # it is over


def test_no_call_holds_memory_once_it_is_over_however_it_ended(vision_model: Tiny, faults: Faults) -> None:
    """Device memory is back where it was: nothing refers to the pool any more."""
    pools: list[weakref.ref[torch.Tensor]] = []
    empty = KVPool.empty

    def remember(*args: Any, **kwargs: Any) -> KVPool:
        made = empty(*args, **kwargs)
        pools.append(weakref.ref(made.keys))
        return made

    _, boundaries = faults.walk(lambda: four(vision_model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVPool, "empty", remember)
        for boundary in boundaries[::3]:
            faults.arm(boundary, RuntimeError("fault"))
            with pytest.raises(RuntimeError, match="fault"):
                four(vision_model)
        faults.clear()
        four(vision_model)
        pieces = mllm.stream(vision_model.ours, four_prompts(vision_model))
        next(pieces)
        del pieces
    assert len(pools) == len(boundaries[::3]) + 2
    gc.collect()
    assert [ref() for ref in pools if ref() is not None] == []


@pytest.mark.parametrize("aborts", [460])
def test_streams_abandoned_at_random_leave_nothing_behind(
    vision_model: Tiny, ahead: int, aborts: int, pytestconfig: pytest.Config
) -> None:
    """4,600 with --thorough: what one of the peers' leaks needed to show."""
    rng = random.Random(0)
    prompts = four_prompts(vision_model)
    want = mllm.generate(vision_model.ours, prompts, max_new_tokens=4)
    for _ in range(aborts * (10 if pytestconfig.getoption("--thorough") else 1)):
        rows, stop = rng.randint(1, 4), rng.randint(0, 15)
        some = rng.sample(prompts, rng.randint(1, 4))
        pieces = mllm.stream(vision_model.ours, some, max_new_tokens=rng.randint(1, 4), max_running_requests=rows)
        for piece in itertools.islice(pieces, stop):
            index = next(i for i, p in enumerate(prompts) if p is some[piece.index])
            assert piece.token in want[index].tokens
        pieces.close()  # type: ignore[attr-defined]
    assert mllm.generate(vision_model.ours, prompts, max_new_tokens=4) == want


def test_the_features_of_a_request_that_failed_do_not_outlive_it(vision_model: Tiny, faults: Faults) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        join = segments.join

        def remember(*args: Any) -> Any:
            out = join(*args)
            made.append(weakref.ref(out.embed))
            return out

        patch.setattr(segments, "join", remember)
        prompts = [mllm.Prompt([IMAGE], [picture(16, 16)]), mllm.Prompt(words(5))]
        faults.arm(Boundary("prefill", 0, after=True), torch.OutOfMemoryError("no memory"))
        pieces = mllm.stream(vision_model.ours, prompts, max_new_tokens=9, max_running_requests=1)
        assert [next(pieces).finish_reason for _ in range(2)] == ["error", None]
        faults.clear()
        gc.collect()
        assert [ref() for ref in made] == [None]


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_a_row_that_breaks_while_the_next_step_runs_changes_no_token_of_the_others(
    vision_model: Tiny, ahead: int, turn: int
) -> None:
    """One step behind, the host learns of it when the row has gone on already."""
    calls, ops = itertools.count(), vision_model.ours.ops
    want = four(vision_model)

    def head(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = ops.head(*args, **kwargs)
        if next(calls) == turn:
            logits[0, 7] = float("inf")
        return logits

    model = evolve(vision_model.ours, ops=evolve(ops, head=head), decode_ops=None)
    outs = mllm.generate(model, four_prompts(vision_model), max_new_tokens=NEW, max_running_requests=3)
    assert [out.finish_reason for out in outs].count("error") == 1
    for out, whole in zip(outs, want, strict=True):
        assert out == whole or ("not finite" in (out.error or "") and out.tokens == whole.tokens[: len(out.tokens)])


# what belongs to one request stays there


def test_a_bad_picture_among_good_ones_changes_no_token_of_the_others(vision_model: Tiny, faults: Faults) -> None:
    """Wherever it stands, however many rows, and whether it shares the batch of a prompt in chunks."""

    prompts = [*four_prompts(vision_model), mllm.Prompt(words(9, 5))]
    want = mllm.generate(vision_model.ours, prompts, max_new_tokens=5)
    for at, rows in itertools.product(range(6), (1, 3, None)):
        bad = mllm.Prompt([IMAGE, 3, IMAGE], [picture(8, 8), Broken("broken at 0x7f3a5c2b10")])
        some = [*prompts[:at], bad, *prompts[at:]]
        outs = mllm.generate(vision_model.ours, some, max_new_tokens=5, max_running_requests=rows)
        failed = outs.pop(at)
        assert (failed.finish_reason, failed.tokens) == ("error", ())
        assert "0x" not in (failed.error or "")  # an address would help whoever breaks in
        assert outs == want


def test_equal_tokens_with_different_pictures_are_different_prompts(vision_model: Tiny) -> None:
    """A cache by token ids would answer the second with the first one's picture; also by bytes without a shape."""
    tokens = [1, IMAGE, 2]
    noise = picture(32, 16)
    turned = Image.frombytes("RGB", (16, 32), noise.tobytes())
    prompts = [mllm.Prompt(tokens, [p]) for p in (noise, turned, Image.new("RGB", (32, 16)), noise)]
    a, b, c, again = (scores[-1] for scores in mllm.score(vision_model.ours, prompts))
    assert torch.equal(a, again)
    assert min(float((a - x).abs().max()) for x in (b, c)) > 0.1
    outs = mllm.generate(vision_model.ours, prompts, max_new_tokens=12)
    assert outs[0] == outs[3]
    assert len({out.tokens for out in outs}) > 1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (199, 1), (1, 200), (3, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P"])
def test_a_picture_of_one_pixel_or_one_line_runs(vision_model: Tiny, size: tuple[int, int], mode: str) -> None:
    out = mllm.generate(vision_model.ours, [mllm.Prompt([1, IMAGE], [Image.new(mode, size)])], max_new_tokens=2)[0]
    assert (len(out.tokens), out.finish_reason) == (2, "length")


# nothing grows


def test_a_thousand_shapes_leave_memory_flat(vision_model: Tiny) -> None:
    """Prompts, pictures, batches and settings of sizes never seen before: no cache keeps one for each."""
    sizes = itertools.product(range(1, 26), range(1, 5), range(1, 11))

    def run(count: int) -> None:
        for width, height, length in itertools.islice(sizes, count):
            prompts = [mllm.Prompt([*words(length), IMAGE], [picture(width, height * 3)])] * (1 + length % 3)
            sampling = Sampling(temperature=(width + length) % 2, top_k=length)
            mllm.generate(vision_model.ours, prompts, max_new_tokens=1 + height, sampling=sampling)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return tensors, psutil.Process().memory_info().rss

    run(200)
    before = held()
    run(800)
    after = held()
    assert next(sizes, None) is None  # all thousand were run
    assert after[0] <= before[0]
    assert after[1] - before[1] < 16 * 2**20


# the budget at work


def test_two_streams_share_what_is_available(vision_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds what the first left, and is refused or runs with fewer rows; the first goes on."""
    prompts = four_prompts(vision_model)
    want = [o.tokens for o in mllm.generate(vision_model.ours, prompts, max_new_tokens=4)]
    first = mllm.stream(vision_model.ours, prompts, max_new_tokens=4)
    head = next(first)
    monkeypatch.setattr(budget, "available", lambda device: 1000)
    with pytest.raises(mllm.errors.MemoryBudgetError):
        mllm.stream(vision_model.ours, prompts, max_new_tokens=4)
    got: list[list[int]] = [[] for _ in prompts]
    for piece in (head, *first):
        got[piece.index].append(piece.token)
    assert [tuple(tokens) for tokens in got] == want


def test_a_request_that_fails_gives_its_pages_to_one_that_waits(text_model: Tiny) -> None:
    calls = itertools.count()
    ops = text_model.ours.ops

    def head(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = ops.head(*args, **kwargs)
        if next(calls) == 1:
            logits[0] = float("nan")
        return logits

    model = evolve(text_model.ours, ops=evolve(ops, head=head), decode_ops=None)
    prompts = [mllm.Prompt(words(n, n)) for n in (20, 21)]
    outs = mllm.generate(model, prompts, max_new_tokens=9, max_total_tokens=32)
    assert [o.finish_reason for o in outs] == ["error", "length"]
    assert outs[1] == mllm.generate(text_model.ours, prompts[1:], max_new_tokens=9)[0]


def test_a_boundary_is_named_by_stage_and_call() -> None:
    made = Faults()
    stage = made.wrap("vit", lambda: 7)
    assert (stage(), stage()) == (7, 7)
    made.arm(Boundary("vit", 1, after=True), ValueError("here"))
    assert stage() == 7
    with pytest.raises(ValueError, match="here"):
        stage()
