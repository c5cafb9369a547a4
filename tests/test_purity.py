"""Purity: a stage or an op writes what it declares to write and leaves every other tensor bit-equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import Running, start
from test_ops import CASES, EPS, PAGE, TEXT, VISION, Case, token_batch
from tiny import Tiny, four_prompts, picture
from torch import Tensor

import mllm
from mllm import requests, stages
from mllm.batch import ForwardBatch
from mllm.errors import DonatedError
from mllm.kernels.reference import REFERENCE
from mllm.sampling import Sampling, sampling_batch
from mllm.state import State, alias, is_donated, leaves, map_leaves


def bits(t: Tensor) -> bytes:
    """The bytes of a tensor, so that NaN equals itself and -0 differs from 0."""
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


class Watch:
    """What lies in every tensor of some arguments, to see after a call which have changed."""

    def __init__(self, **arguments: Any) -> None:
        self.tensors = {k: leaves(alias(v)) for k, v in arguments.items()}
        self.before = {k: [bits(t) for t in ts] for k, ts in self.tensors.items()}

    def changed(self) -> set[str]:
        return {k for k, ts in self.tensors.items() if [bits(t) for t in ts] != self.before[k]}


@pytest.fixture
def run(vision_model: Tiny) -> Running:
    """Four prompts of which all but the last token are in the pool."""
    run = start(vision_model.ours, four_prompts(vision_model), new=9)
    for i, request in enumerate(run.requests):
        if request.length > 1:
            run.prefill([(i, 0, request.length - 1)])
    return run


def settings(run: Running, temperature: float = 1.0) -> Any:
    rows = [Sampling(temperature=temperature, seed=i, top_p=0.9, top_k=20, min_p=0.01) for i in range(len(run.rows))]
    return sampling_batch(rows, size=len(rows), device="cpu")


def newest(run: Running) -> ForwardBatch:
    return run.decode_batch([int(r.layout.tokens[-1]) for r in run.requests])


def test_vit_changes_nothing(vision_model: Tiny) -> None:
    model = vision_model.ours
    (request,) = [
        requests.make(model, mllm.Prompt([95, 1], [picture(20, 17)]), index=0, new_tokens=1, sampling=Sampling())
    ]
    patches = requests.patch_batch(model, request)
    weights, vision = model.weights.vision, model.config.vision
    assert weights is not None
    assert vision is not None
    watch = Watch(weights=weights, patches=patches)
    a, b = (stages.vit(weights, patches, config=vision, ops=model.ops) for _ in range(2))
    assert watch.changed() == set()
    assert [bits(t) for t in leaves(a)] == [bits(t) for t in leaves(b)]  # and the same again


def test_prefill_takes_the_pool_and_changes_nothing_else(vision_model: Tiny) -> None:
    run = start(vision_model.ours, four_prompts(vision_model), spare=2)
    model, index = run.model, 2
    from mllm.batch import pack
    from mllm.segments import Segment, crop

    segment = Segment(request=run.requests[index], row=run.rows[index], start=0, stop=run.requests[index].length)
    batch = pack(run.table, [segment.chunk()], device="cpu")
    vision = crop(run.features, [segment])
    pool = run.pool
    others = sorted(set(range(pool.keys.shape[1])) - set(run.table.pages[run.rows[index]].tolist()))
    watch = Watch(weights=model.weights, batch=batch, vision=vision, table=run.table, pool=pool,
                  others=(pool.keys[:, others], pool.values[:, others]))  # fmt: skip
    new, _ = stages.prefill(model.weights, pool, batch, vision, config=model.config, ops=model.ops)
    assert watch.changed() == {"pool"}
    # indexing copied the pages of the others, so look again
    again = Watch(others=(new.keys[:, others], new.values[:, others]))
    assert again.before["others"] == watch.before["others"]
    assert is_donated(pool)
    with pytest.raises(DonatedError, match="prefill"):
        _ = pool.keys


def test_decode_takes_the_pool_and_changes_nothing_else(run: Running) -> None:
    model, batch, pool = run.model, newest(run), run.pool
    watch = Watch(weights=model.weights, batch=batch, table=run.table, pool=pool)
    _, logits = stages.decode(model.weights, pool, batch, config=model.config, ops=model.ops)
    assert watch.changed() == {"pool"}
    assert logits.dtype == torch.float32
    assert is_donated(pool)
    assert not is_donated(batch)


def test_decode_writes_one_slot_a_row(run: Running) -> None:
    batch, pool = newest(run), run.pool
    before = pool.keys.clone(), pool.values.clone()
    pool, _ = stages.decode(run.model.weights, pool, batch, config=run.model.config, ops=run.model.ops)
    for old, new in zip(before, (pool.keys, pool.values), strict=True):
        moved = (old != new).flatten(3).any(-1).any(0).flatten()  # by slot
        assert sorted(moved.nonzero().flatten().tolist()) == sorted(batch.slots.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_changes_nothing(run: Running, temperature: float) -> None:
    logits = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    logits[1, 5] = float("nan")
    lengths, sampling = torch.arange(4, dtype=torch.int32), settings(run, temperature)
    watch = Watch(logits=logits, lengths=lengths, sampling=sampling)
    stages.sample(logits, sampling, lengths, ops=REFERENCE)
    assert watch.changed() == set()


def test_advance_takes_the_batch_and_changes_nothing_else(run: Running) -> None:
    batch, tokens = newest(run), torch.tensor([1, -1, 3, 4], dtype=torch.int32)
    watch = Watch(tokens=tokens, pool=run.pool, fixed=(batch.pages, batch.q_indptr, batch.last), batch=batch)
    new = stages.advance(batch, tokens, page_size=4, ops=REFERENCE)
    assert watch.changed() == {"batch"}
    assert is_donated(batch)
    assert not is_donated(new)


def test_step_takes_pool_and_batch_and_changes_nothing_else(run: Running) -> None:
    model, batch, pool, sampling = run.model, newest(run), run.pool, settings(run)
    watch = Watch(weights=model.weights, sampling=sampling, table=run.table, pool=pool, batch=batch)
    out = stages.step(model.weights, pool, batch, sampling, config=model.config, ops=model.ops)
    assert watch.changed() == {"pool", "batch"}
    assert (is_donated(pool), is_donated(batch), is_donated(sampling)) == (True, True, False)
    assert not any(is_donated(part) for part in out[:2])


@pytest.mark.parametrize("stage", ["prefill", "decode", "step"])
def test_a_stage_that_is_refused_consumes_nothing(run: Running, stage: str) -> None:
    """A pool that was taken before is refused before anything else is taken."""
    model, batch, pool = run.model, newest(run), run.pool
    taken, _ = stages.decode(model.weights, pool, batch, config=model.config, ops=model.ops)
    watch = Watch(pool=taken, batch=batch)
    more = (settings(run),) if stage == "step" else ()
    with pytest.raises(DonatedError, match="decode"):
        getattr(stages, stage)(model.weights, pool, batch, *more, config=model.config, ops=model.ops)
    assert watch.changed() == set()
    assert not is_donated(batch)
    assert not is_donated(taken)


@pytest.mark.parametrize("stage", ["prefill", "decode", "step"])
def test_a_stage_given_a_dead_batch_leaves_the_pool_alive(run: Running, stage: str) -> None:
    model, batch, pool = run.model, newest(run), run.pool
    stages.advance(batch, torch.ones(4, dtype=torch.int32), page_size=4, ops=model.ops)
    watch = Watch(pool=pool)
    more = (settings(run),) if stage == "step" else ()
    with pytest.raises(DonatedError, match="advance"):
        getattr(stages, stage)(model.weights, pool, batch, *more, config=model.config, ops=model.ops)
    assert watch.changed() == set()
    assert not is_donated(pool)


# the ops: what the comments of kernels/ops.py say each one writes
WRITES = {"attend_": {4, 5}, "put_": {0}, "add_": {0}}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.name}".strip())
def test_an_op_writes_only_what_it_declares(case: Case) -> None:
    args, kwargs = case.make(torch.Generator().manual_seed(1))
    call: Callable[..., Any] = getattr(REFERENCE, case.op)
    if case.op == "attend_":
        args[3], kwargs = REFERENCE.plan(args[3], config=TEXT, page_size=PAGE, dtype=torch.float32), {"eps": EPS}
    if case.op == "attend_images":
        args[1] = REFERENCE.vision_plan(args[1], config=VISION)
    watch = Watch(**{str(i): arg for i, arg in enumerate(args)})
    out = call(*args, **kwargs)
    assert watch.changed() == {str(i) for i in WRITES.get(case.op, set())}
    assert case.op.endswith("_") == bool(WRITES.get(case.op))
    if isinstance(out, tuple):  # the stream that was handed in, for the next op, and the result
        assert out[0] is args[0]
        out = out[1]
    if not case.op.endswith("_"):  # a result that shares memory would let the next op write to an argument
        shared = {t.untyped_storage().data_ptr() for arg in args for t in leaves(arg)}
        assert not shared & {t.untyped_storage().data_ptr() for t in leaves(out)}


def test_plans_change_nothing() -> None:
    batch, _ = token_batch([3, 0], [1, 1], torch.Generator().manual_seed(0))
    watch = Watch(batch=batch)
    REFERENCE.plan(batch, config=TEXT, page_size=PAGE, dtype=torch.float32)
    assert watch.changed() == set()


def test_advance_writes_the_four_fields_it_declares(run: Running) -> None:
    batch = newest(run)
    tokens = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    watch = Watch(**{name: getattr(batch, name) for name in batch.__names__}, argument=tokens)
    REFERENCE.advance_(batch, tokens, page_size=4)
    assert watch.changed() == {"tokens", "positions", "slots", "lengths"}


def test_generate_and_score_leave_model_and_prompts_as_they_were(vision_model: Tiny) -> None:
    prompts = four_prompts(vision_model)
    pictures = [image.tobytes() for p in prompts for image in p.images]
    watch = Watch(weights=vision_model.ours.weights)
    mllm.generate(vision_model.ours, prompts, max_new_tokens=4)
    mllm.score(vision_model.ours, prompts)
    assert watch.changed() == set()
    assert [image.tobytes() for p in prompts for image in p.images] == pictures


def test_the_watch_would_see_a_change() -> None:
    x = torch.zeros(3)
    watch = Watch(x=x, y=torch.ones(2))
    x[1] = -0.0
    assert watch.changed() == {"x"}
    assert isinstance(map_leaves(lambda t: t, x), Tensor)
    assert issubclass(ForwardBatch, State)
