"""On a GPU: padded and recorded prefill and vision are what the stages give, and nothing piles up between calls."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from exchange import changed
from PIL import Image

import mllm
from mllm import buckets, requests, segments, stages
from mllm.batch import pack
from mllm.cache import KVPool
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE
from mllm.programs import make_programs
from mllm.sampling import Sampling
from mllm.signs import pictures
from mllm.state import clone, leaves
from mllm.table import RequestTable

pytestmark = pytest.mark.cuda
EACH = 6  # held-out pictures of each kind


@pytest.fixture(scope="module")
def model() -> Iterator[mllm.Model]:
    """The embedded model in float32 on the GPU."""
    yield mllm.load(device="cuda", dtype="float32")
    gc.collect()


@pytest.fixture(scope="module")
def examples() -> list[pictures.Example]:
    return [pictures.held_out(kind, i) for kind in pictures.KINDS for i in range(EACH)]


def answers(model: mllm.Model, examples: list[pictures.Example], **options: int) -> list[str]:
    prompts = [mllm.prompt(model, pictures.messages(example)) for example in examples]
    return [out.text for out in mllm.generate(model, prompts, max_new_tokens=96, **options)]


@pytest.mark.parametrize("rows", [1, 8])
def test_answers_on_the_gpu_are_those_of_the_cpu(
    model: mllm.Model, examples: list[pictures.Example], rows: int
) -> None:
    some = examples if rows > 1 else examples[::EACH]
    expected = answers(mllm.load(device="cpu", dtype="float32"), some)
    assert answers(model, some, max_running_requests=rows) == expected
    half = mllm.load(device="cuda", dtype="bfloat16")
    same = [a == b for a, b in zip(answers(half, some, max_running_requests=rows), expected, strict=True)]
    assert sum(same) >= 0.97 * len(same)


@pytest.mark.parametrize("length", [1, 17, 40, 129, 700])
def test_a_padded_prefill_writes_and_gives_what_the_reference_does(model: mllm.Model, length: int) -> None:
    lengths = [length, 5, 64]
    table = RequestTable.empty(rows=3, pages=40, page_size=64)
    table, rows = stages.admit(table, lengths)
    made = [
        requests.make(model, mllm.Prompt([3 + i % 90 for i in range(n)]), index=j, new_tokens=1, sampling=Sampling())
        for j, n in enumerate(lengths)
    ]
    (part,) = segments.cut(list(zip(made, rows, strict=True)), limit=4096)
    empty = KVPool.empty(model.config.text, pages=40, page_size=64, device="cuda", dtype=model.dtype)
    exact = pack(table, [s.chunk() for s in part], device="cuda")
    pool, want = stages.prefill(model.weights, clone(empty), exact, config=model.config, ops=REFERENCE)
    size = buckets.prompt_size(model.pads, sum(lengths), 3, max(map(table.pages_for, lengths)), 0)
    assert size is not None
    programs, own = make_programs(model), clone(empty)
    padded = pack(table, [s.chunk() for s in part], device="cuda", size=size)
    for _ in range(2):  # recorded, then replayed
        own, got = programs.prefill(own, padded, None, padded=True)
        assert float((got[:3] - want).norm() / want.norm()) < 1e-4
        live = sorted(set(table.pages.flatten().tolist()) - {0})
        for mine, theirs, before in zip(leaves(own), leaves(pool), leaves(empty), strict=True):
            assert float((mine[:, live] - theirs[:, live]).norm() / theirs[:, live].norm()) < 1e-4
            others = sorted(set(range(1, 41)) - set(live))
            assert torch.equal(mine[:, others], before[:, others])


@pytest.mark.parametrize("sizes", [[(64, 64)], [(320, 96), (64, 256)], [(512, 512), (100, 90), (33, 400)]])
def test_padded_pictures_give_the_features_of_the_reference(model: mllm.Model, sizes: list[tuple[int, int]]) -> None:
    images = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
    token = model.config.image_token_id
    request = requests.make(model, mllm.Prompt([token] * len(images), images), index=0, new_tokens=1,
                            sampling=Sampling())  # fmt: skip
    grids = request.layout.grids
    patches, count = sum(r * c for r, c in grids), sum(request.layout.counts)
    vision, config = model.weights.vision, model.config.vision
    assert vision is not None
    assert config is not None
    exact = requests.patch_batch(model, request)
    want = stages.vit(vision, exact, config=config, ops=REFERENCE)
    eager = stages.vit(vision, exact, config=config, ops=model.ops)
    size = buckets.patch_size(model.pads, patches, len(grids), 4)
    padded = requests.patch_batch(model, request, size=size)
    programs = make_programs(model)
    for got in (eager, programs.vit(padded, padded=True).first(count), programs.vit(padded, padded=True).first(count)):
        assert torch.equal(got.at, want.at)
        for a, b in ((got.embed, want.embed), (got.deep, want.deep)):
            assert float((a - b).norm() / b.norm()) < 1e-4


def leave_memory_where_it_was(run: Callable[[int], object], *, kinds: int, rounds: int) -> None:
    """Calls of so many kinds, over and over, after two rounds: the first makes ever larger pools, each of which replaces
    what was recorded over the last one, and the second records what is missing over the largest."""

    def held() -> tuple[int, int]:
        """Bytes that are allocated, and that the driver has free."""
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

    for i in range(2 * kinds):
        run(i % kinds)
    before = held()
    for i in range(rounds * kinds):
        run(i % kinds)
    after = held()
    assert after[0] <= before[0]
    assert after[1] >= before[1] - 8 * 2**20


def test_calls_leave_the_memory_of_the_device_where_it_was(model: mllm.Model, examples: list[pictures.Example]) -> None:
    leave_memory_where_it_was(lambda i: answers(model, examples[i::7], max_running_requests=1 + i), kinds=7, rounds=2)


def test_a_thousand_calls_leave_the_memory_of_the_device_where_it_was(
    model: mllm.Model, examples: list[pictures.Example]
) -> None:
    """Short ones, so that it takes some twenty seconds: pictures, text of 1 to 400 tokens, one to three rows."""
    shapes = [
        [*(mllm.prompt(model, pictures.messages(example)) for example in examples[i::20][:2]),
         mllm.Prompt([3 + j % 90 for j in range(1 + 57 * (i % 8))])]
        for i in range(10)
    ]  # fmt: skip
    done = Counter[str | None]()

    def run(i: int) -> None:
        outs = mllm.generate(model, shapes[i], max_new_tokens=1 + i % 4, max_running_requests=1 + i % 3)
        done.update(out.finish_reason for out in outs)

    leave_memory_where_it_was(run, kinds=10, rounds=100)
    assert done.keys() <= {"length", "stop"}
    assert done.total() == 3 * 1020


def run_out(way: str) -> None:
    """Run out of memory while a stage is recorded."""
    if way == "allocated":
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("stage", "way"), [
    ("vision", "raised"), ("prompt", "raised"), ("decode", "raised"), ("decode", "allocated"),
])  # fmt: skip
def test_memory_that_runs_out_while_a_stage_is_recorded_is_back_and_the_next_call_is_right(
    model: mllm.Model, examples: list[pictures.Example], stage: str, way: str
) -> None:
    prompts = [mllm.prompt(model, pictures.messages(example)) for example in examples[::EACH]]
    name, op = f"{stage}_ops", "linear_bias_add" if stage == "vision" else "norm_gate"
    armed: list[bool] = []

    def failing(table: Ops) -> Ops:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = getattr(table, op)(*args, **kwargs)
            if armed and torch.cuda.is_current_stream_capturing():
                armed.pop()
                run_out(way)
            return out

        return attrs.evolve(table, **{op: call})

    def at_rest() -> tuple[int, int]:
        """Bytes that are allocated, and that the driver has free, without what the model keeps for the next call."""
        broken.shelf.clear()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

    broken = attrs.evolve(model, **{name: changed(getattr(model, name), failing)})
    want = mllm.generate(broken, prompts, max_new_tokens=12)
    at_rest()  # nothing is recorded now
    before = None
    for _ in range(3):
        armed.append(True)
        outs = mllm.generate(broken, prompts, max_new_tokens=12)
        assert not armed
        assert any("out of memory in" in (out.error or "") for out in outs)
        assert all(out == whole or out.error for out, whole in zip(outs, want, strict=True))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        for _ in range(2):  # recorded on the pool that was kept, and replayed
            assert mllm.generate(broken, prompts, max_new_tokens=12) == want
        after = at_rest()
        before = before or after  # settings of the batches that only a failure makes are kept from the first on
        assert after[0] <= before[0]
        assert after[1] >= before[1] - 8 * 2**20  # of the whole device: no other process may use it meanwhile


def test_an_abandoned_stream_leaves_the_next_call_right(model: mllm.Model, examples: list[pictures.Example]) -> None:
    prompts = [mllm.prompt(model, pictures.messages(example)) for example in examples[:3]]
    expected = [out.tokens for out in mllm.generate(model, prompts, max_new_tokens=20)]
    for after in (1, 3, 10):
        stream = mllm.stream(model, prompts, max_new_tokens=20)
        for _ in range(after):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert [out.tokens for out in mllm.generate(model, prompts, max_new_tokens=20)] == expected
