"""The memory budget: bytes in, tokens out, on devices that are not there; and that a call keeps within it."""

from __future__ import annotations

import json
import re
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import psutil
import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from tiny import IMAGE, Tiny, examples, four_prompts, picture, words

import mllm
from mllm import budget, cgroup, checkpoint, families, memory, requests, stages, weights
from mllm.budget import MemoryProfile
from mllm.cache import KVPool, bytes_per_token
from mllm.errors import ImageError, MemoryBudgetError, PromptError
from mllm.image_config import ImageConfig
from mllm.model import plan
from mllm.programs import make_programs
from mllm.sampling import Sampling
from mllm.shelf import Lease

GB = 10**9
EIGHT = families.preset("qwen3-vl-8b")
TWO = families.preset("qwen3-vl-2b")
H200 = 150 * GB  # free on an idle one, roughly
WEIGHTS = {name: weights.elements(families.preset(name)) * 2 for name in ("qwen3-vl-2b", "qwen3-vl-8b")}


def shared_out(
    before: int, *, config: mllm.Config = TWO, after: int | None = None, fraction: float = 0.85, **more: Any
) -> MemoryProfile:
    """The profile of a bf16 model whose weights are all that was taken while it was loaded."""
    size = weights.elements(config) * 2
    given: dict[str, Any] = {
        "device": torch.device("cuda"), "memory": "GPU", "dtype": torch.bfloat16, "available_before": before,
        "available_after": before - size if after is None else after, "weight_bytes": size,
        "mem_fraction_static": fraction,
    }  # fmt: skip
    return budget.profile(config, ImageConfig() if config.vision else None, **given | more)


# the function


def test_the_budget_is_what_is_left_after_loading_less_what_lies_outside_the_share() -> None:
    made = shared_out(100 * GB, after=90 * GB, fraction=0.8)
    assert made.static_bytes == 80 * GB
    assert made.left_bytes == 20 * GB
    assert made.kv_bytes == 70 * GB  # 90 - (100 - 80)
    assert made.bytes_per_token == 114_688  # 2 * 28 layers * 8 heads * 128 * 2 bytes
    assert made.profiled_tokens == (70 * GB // (114_688 * 64) - 1) * 64 == 610_240
    assert (made.requested_tokens, made.effective_tokens, made.recurrent_bytes) == (None, 610_240, 0)
    assert made.longest == made.context == 262_144


@examples(100)
@given(
    before=st.integers(0, 200 * GB), loss=st.integers(-5 * GB, 30 * GB), fraction=st.floats(0.01, 0.99),
    name=st.sampled_from(["qwen3-0.6b", "qwen3-vl-2b", "qwen3-vl-8b"]), device=st.sampled_from(["cpu", "cuda"]),
)  # fmt: skip
def test_any_bytes_give_a_pool_within_them_or_a_refusal_with_the_arithmetic(
    before: int, loss: int, fraction: float, name: str, device: str
) -> None:
    config = families.preset(name)
    after = before - loss
    try:
        made = shared_out(before, config=config, after=after, fraction=fraction, device=torch.device(device))
    except MemoryBudgetError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert all(part in refused for part in ("available before loading", "static share", "KV budget"))
        return
    page = made.page_size * made.bytes_per_token
    assert made.kv_bytes == after - (before - int(before * fraction))
    assert made.profiled_tokens % made.page_size == 0
    assert 0 <= made.kv_bytes - made.profiled_tokens * made.bytes_per_token - page < page  # the sink, and no page more
    assert made.peak.total <= made.left_bytes
    assert 1 <= made.rows <= budget.MAX_ROWS
    assert json.loads(json.dumps(made.as_dict()))["peak_bytes"] == made.peak.total


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("fraction", [0.5, 0.85, 0.95])
def test_97_percent_of_the_static_share_is_weights_and_usable_pool(name: str, fraction: float) -> None:
    made = shared_out(H200, config=families.preset(name), fraction=fraction)
    assert made.weight_bytes + made.profiled_tokens * made.bytes_per_token > 0.97 * made.static_bytes
    assert (made.rows, made.prefill_tokens) == (64, 2048)
    assert made.image_pixels == 16_777_216  # what Qwen3-VL's processor allows fits beside the largest pool


def test_a_picture_is_limited_to_what_the_rest_can_hold() -> None:
    limits = [shared_out(n * GB, config=EIGHT).image_pixels for n in (26, 30, 40, 80)]
    assert limits == sorted(limits)
    assert 32 * 32 <= limits[0] < limits[2] <= limits[3] == 16_777_216
    assert all(limit % 32**2 == 0 for limit in limits)


def test_rows_are_halved_before_a_model_is_refused() -> None:
    config = families.preset("qwen3-0.6b")
    where = {"device": torch.device("cpu"), "memory": "system"}  # where drawing takes the most for each row
    most = shared_out(H200, config=config, **where)
    tight = shared_out(30 * GB, config=config, fraction=0.97, **where)
    assert most.rows == 64
    assert tight.rows in (1, 2, 4, 8, 16, 32)
    assert tight.peak.total <= tight.left_bytes < most.peak.total


CAUSES: dict[str, tuple[dict[str, Any], str]] = {
    "weights beyond the share": ({"before": 20 * GB, "config": EIGHT}, "the weights alone exceed the static share"),
    "weights beyond everything": ({"before": 10 * GB, "config": EIGHT}, "the weights alone exceed the static share"),
    "not one page": ({"before": (WEIGHTS["qwen3-vl-8b"] + 10**7) * 100 // 85, "config": EIGHT}, "less of the static"),
    "another process": ({"before": 40 * GB, "after": 3 * GB}, "besides the weights were taken while they were loaded"),
    "nothing there": ({"before": 0}, "the weights alone exceed the static share"),
    "no room for the rest": ({"before": 30 * GB, "fraction": 0.999}, "cannot hold one prefill chunk"),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUSES)
def test_a_refusal_says_cause_arithmetic_and_what_to_change_in_which_direction(case: str) -> None:
    given, cause = CAUSES[case]
    with pytest.raises(MemoryBudgetError, match=cause) as caught:
        shared_out(**given)
    text = str(caught.value)
    for part in ("available before loading", "= mem_fraction_static", "KV budget", "tokens of", "context"):
        assert part in text
    assert re.search(r"Raise mem_fraction_static|Lower mem_fraction_static|Free (that )?memory", text)


@pytest.mark.parametrize("case", ["weights beyond the share", "not one page", "no room for the rest"])
def test_the_fraction_that_a_refusal_names_works(case: str) -> None:
    given, _ = CAUSES[case]
    with pytest.raises(MemoryBudgetError) as caught:
        shared_out(**given)
    found = re.search(r"(?:Raise|Lower) mem_fraction_static (?:above|to) (\d\.\d+)", str(caught.value))
    assert found
    assert shared_out(**{**given, "fraction": float(found[1])}).profiled_tokens >= 64


def test_the_causes_do_not_hide_behind_a_pool_that_only_another_process_left_room_for() -> None:
    """Memory that came free while loading is counted: the pool may be larger than the share less the weights."""
    made = shared_out(100 * GB, after=99 * GB)
    assert made.kv_bytes == 84 * GB > made.static_bytes - made.weight_bytes


def test_max_total_tokens_bounds_the_pool_and_never_raises_it() -> None:
    made = shared_out(H200)
    assert budget.bound(made, None) is made
    less = budget.bound(made, 1000)
    assert (less.requested_tokens, less.effective_tokens, less.longest) == (1000, 960, 960)
    more = made.profiled_tokens + 1
    with pytest.warns(UserWarning, match=f"max_total_tokens {more} is more than the {made.profiled_tokens} tokens"):
        cut = budget.bound(made, more)
    assert (cut.requested_tokens, cut.effective_tokens) == (more, made.profiled_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget.bound(made, made.profiled_tokens).effective_tokens == made.profiled_tokens


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, float("nan"), float("inf")])
def test_a_fraction_that_is_none_is_refused(value: float, vision_model: Tiny) -> None:
    for call in (lambda v: mllm.load(mem_fraction_static=v), lambda v: shared_out(GB, fraction=v)):
        with pytest.raises(ValueError, match="mem_fraction_static: expected a number between 0 and 1"):
            call(value)
    for wrong in ("0.5", True, None):
        with pytest.raises(TypeError, match="mem_fraction_static: expected a number"):
            mllm.dummy(vision_model.ours.config, mem_fraction_static=wrong)  # type: ignore[arg-type]


def test_the_table_on_the_front_page_is_what_the_function_prints() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"```text\n{budget.table(shared_out(1495 * 10**8, config=EIGHT))}\n```" in page


def test_every_field_of_the_profile_is_documented_with_its_unit() -> None:
    documented = dict(re.findall(r"^    (\w+): (.+(?:\n      .+)*)", MemoryProfile.__doc__ or "", re.MULTILINE))
    assert list(documented) == [f.name for f in attrs.fields(MemoryProfile)]
    for name, text in documented.items():
        assert name in ("device", "memory") or re.search("bytes|tokens|rows|pixels|share", text), name


# the devices


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU that is not there: 80 GB by CUDA, of which 30 are free; 64 GB of system memory, of which 20 are available,
    and `group` to this process's control groups; PyTorch's allocator holds 5 GB and uses 3 of them."""

    def make(*, integrated: bool, group: int | None = None) -> torch.device:
        monkeypatch.setattr(cgroup, "available", lambda: group)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(is_integrated=integrated))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (30 * GB, 80 * GB))
        counts = {"reserved_bytes": 5 * GB, "allocated_bytes": 3 * GB}
        stats = {kind: {"all": {"current": count}} for kind, count in counts.items()}
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda d: stats)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GB, total=64 * GB))
        return torch.device("cuda", 0)

    return make


def test_a_discrete_gpu_has_what_cuda_has_free_and_what_the_allocator_does_not_use(faked: Any) -> None:
    device = faked(integrated=False)
    assert budget.available(device) == 32 * GB
    assert budget.describe(device) == "GPU"


def test_an_integrated_gpu_has_what_the_system_has(faked: Any) -> None:
    device = faked(integrated=True)
    assert budget.available(device) == 22 * GB
    assert budget.describe(device) == "system, shared with the GPU"


def test_a_cpu_has_what_the_system_has_whatever_gpu_is_there(faked: Any) -> None:
    faked(integrated=False)
    assert budget.available(torch.device("cpu")) == 20 * GB
    assert budget.describe(torch.device("cpu")) == "system"


def test_a_container_leaves_less_than_the_system_has_to_a_cpu_and_an_integrated_gpu(faked: Any) -> None:
    device, cpu = faked(integrated=True, group=7 * GB), torch.device("cpu")
    assert (budget.available(cpu), budget.available(device)) == (7 * GB, 9 * GB)
    assert (budget.describe(cpu), budget.describe(device)) == ("cgroup", "cgroup, shared with the GPU")
    device = faked(integrated=True, group=21 * GB)  # more than there is
    assert (budget.available(cpu), budget.available(device)) == (20 * GB, 22 * GB)
    assert (budget.describe(cpu), budget.describe(device)) == ("system", "system, shared with the GPU")
    device = faked(integrated=False, group=7 * GB)  # whose memory is its own
    assert (budget.available(device), budget.describe(device)) == (32 * GB, "GPU")


def test_a_model_that_exceeds_the_limit_of_a_container_is_refused_and_told_so(faked: Any) -> None:
    faked(integrated=False, group=10 * GB)
    with pytest.raises(MemoryBudgetError, match=r"10\.00 GB available before loading \(cgroup\)") as caught:
        plan("qwen3-vl-8b")
    assert "Or raise the memory limit of the container" in str(caught.value)
    faked(integrated=False)
    with pytest.raises(MemoryBudgetError, match=r"before loading \(system\)") as caught:
        plan("qwen3-vl-8b", dtype="float32")
    assert "container" not in str(caught.value)
    faked(integrated=False, group=10 * GB)
    assert plan().memory == "cgroup"


def test_loading_measures_before_and_after_the_weights(vision_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both times, in this order: a budget from what is free afterwards alone would count the weights twice."""
    measured = iter([3 * GB, 2 * GB])  # the first for the plan, which is checked before anything is read
    monkeypatch.setattr(budget, "available", lambda device: next(measured))
    made = mllm.load(vision_model.folder, mem_fraction_static=0.5, progress=False).memory
    assert (made.available_before, made.available_after, made.kv_bytes) == (3 * GB, 2 * GB, GB // 2)
    assert made.weight_bytes == vision_model.ours.weights.nbytes


def test_a_model_that_leaves_no_room_is_refused_before_a_weight_is_read_or_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not after minutes of reading, nor by the system's own killing of what takes too much."""
    monkeypatch.setattr(budget, "available", lambda device: 10_000_000)
    for module, name in ((checkpoint, "load"), (weights, "random")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("weights were read"))
    for call in (mllm.load, plan, lambda: mllm.dummy("qwen3-vl-8b")):
        with pytest.raises(MemoryBudgetError, match="the weights alone exceed the static share"):
            call()


@pytest.mark.parametrize("name", [None, "qwen3-0.6b", "qwen3-vl-8b"])
def test_a_plan_loads_nothing_and_is_the_budget_of_the_model(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available", lambda device: 60 * GB)
    planned = plan(name)
    config = families.preset(name) if name else mllm.load().config
    assert planned.weight_bytes == weights.elements(config) * 2
    assert planned.available_after == 60 * GB - planned.weight_bytes
    if name is None:
        loaded = mllm.load().memory
        assert attrs.asdict(planned) == {
            **attrs.asdict(loaded), "available_after": planned.available_after, "kv_bytes": planned.kv_bytes,
            "profiled_tokens": planned.profiled_tokens, "effective_tokens": planned.effective_tokens,
            "peak": attrs.asdict(planned.peak), "rows": planned.rows,
        }  # fmt: skip
    elif name == "qwen3-vl-8b":
        # as published; ours has the patch kernel of one frame, and layer norms within the weights after them
        assert planned.weight_bytes == 2 * (8_767_123_696 - 1152 * 768 - 27 * 4 * 1152)


# calls


def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The usable pages of every pool that is made from here on."""
    seen: list[int] = []
    empty = KVPool.empty

    def remember(*args: Any, pages: int, **kwargs: Any) -> KVPool:
        seen.append(pages)
        return empty(*args, pages=pages, **kwargs)

    monkeypatch.setattr(KVPool, "empty", remember)
    return seen


def with_tokens(model: mllm.Model, tokens: int) -> mllm.Model:
    """The model with a budget of so many tokens."""
    return evolve(model, memory=evolve(model.memory, profiled_tokens=tokens, effective_tokens=tokens))


def test_a_pool_is_what_the_call_needs_and_at_most_the_budget(
    text_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, prompts = pools(monkeypatch), [mllm.Prompt(words(n, n)) for n in (30, 5, 17)]
    want = [out.tokens for out in mllm.generate(text_model.ours, prompts, max_new_tokens=9)]
    assert seen == [3 + 1 + 2]  # pages of 16 for 38, 13 and 25 slots
    outs = mllm.generate(with_tokens(text_model.ours, 48), prompts, max_new_tokens=9)
    assert seen[1:] == [3]
    assert [out.tokens for out in outs] == want
    with pytest.warns(UserWarning, match="max_total_tokens 160 is more than the 48 tokens"):
        mllm.generate(with_tokens(text_model.ours, 48), prompts, max_new_tokens=9, max_total_tokens=160)
    assert seen[2:] == [3]


def test_a_prompt_beyond_the_budget_is_refused_with_the_whole_arithmetic(text_model: Tiny) -> None:
    small = with_tokens(text_model.ours, 32)
    with pytest.raises(PromptError, match=r"prompts\[0\]: 40 tokens exceed the KV pool of 32 tokens") as caught:
        mllm.generate(small, [mllm.Prompt(words(40))])
    assert "available before loading" in str(caught.value)
    with pytest.raises(PromptError, match="exceed the KV pool of 32 tokens"):
        mllm.score(small, [mllm.Prompt(words(40))])


def test_fewer_rows_run_together_where_memory_is_short_and_the_tokens_are_the_same(
    vision_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, model = four_prompts(vision_model), vision_model.ours
    want = [out.tokens for out in mllm.generate(model, prompts, max_new_tokens=6)]
    made = requests.make_all(model, prompts, 6, Sampling())
    sizes = [memory._pool_bytes(memory._pages(made, n, model.memory), model.memory) for n in (1, 2, 3, 4)]
    peaks = [memory._peak(model, made, n, model.memory).total for n in (1, 2, 3, 4)]
    need = [a + b for a, b in zip(sizes, peaks, strict=True)]
    assert need == sorted(need)
    for rows, free in ((4, need[3]), (3, need[3] - 1), (1, need[1] - 1), (1, need[0])):
        monkeypatch.setattr(budget, "available", lambda device, free=free: free)
        table = memory.allocate(model, made, rows=4, profile=model.memory)
        assert len(table.live) == rows
        assert [out.tokens for out in mllm.generate(model, prompts, max_new_tokens=6)] == want


def test_what_earlier_calls_left_to_the_garbage_collector_is_not_held_against_the_next(
    text_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool hangs in a reference cycle, as in the traceback of a call that failed."""
    hanging: list[Any] = [torch.zeros(3)]
    hanging.append(hanging)
    left = weakref.ref(hanging[0])
    del hanging
    monkeypatch.setattr(budget, "available", lambda device: 1000 if left() is not None else GB)
    table = memory.allocate(
        text_model.ours, requests.make_all(text_model.ours, [mllm.Prompt(words(3))] * 2, 4, Sampling()), rows=2,
        profile=text_model.ours.memory,
    )  # fmt: skip
    assert len(table.live) == 2


def test_what_the_last_call_left_goes_where_this_one_needs_its_memory(
    text_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the pool stays between calls: it is counted as free for a call that takes it, and no other."""
    model, made = text_model.ours, requests.make_all(text_model.ours, [mllm.Prompt(words(40))], 4, Sampling())
    pool, beside = memory._pool_bytes(3, model.memory), memory._peak(model, made, 1, model.memory).total
    table = memory.allocate(model, made, rows=1, profile=model.memory)

    page = 16 * model.memory.bytes_per_token

    def left(free: int, *, reuse: bool) -> bool:
        """Whether a pool of 6 pages is still there after another call was let in, with `free` bytes beside it."""
        kept = KVPool.empty(model.config.text, pages=6, page_size=16, device=model.device, dtype=model.dtype)
        model.shelf.kept = Lease(make_programs(model), kept)
        assert model.shelf.nbytes == 7 * page
        monkeypatch.setattr(budget, "available", lambda device: free + (0 if model.shelf.kept else 7 * page))
        assert len(memory.allocate(model, made, rows=1, profile=model.memory, reuse=reuse).free) == len(table.free)
        found = model.shelf.kept is not None
        model.shelf.clear()
        return found

    assert left(beside, reuse=True)
    assert not left(beside - 1, reuse=True)  # pool and peak fit, but not beside a pool that may be larger
    assert not left(beside, reuse=False)  # score has a pool of its own
    assert left(beside + pool, reuse=False)


def test_a_request_that_memory_cannot_hold_now_is_refused_before_anything_is_allocated(
    vision_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = pools(monkeypatch)
    for stage in ("vit", "prefill", "admit"):
        monkeypatch.setattr(stages, stage, lambda *a, **k: pytest.fail("a stage ran"))
    monkeypatch.setattr(budget, "available", lambda device: 10_000)
    with pytest.raises(MemoryBudgetError, match=r"0\.01 MB are available now") as caught:
        mllm.generate(vision_model.ours, four_prompts(vision_model))
    assert re.search(r"A context of about \d+ tokens would fit", str(caught.value))
    assert seen == []


def test_the_context_that_a_refusal_names_fits(text_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model.ours
    made = requests.make_all(model, [mllm.Prompt(words(400))], 1, Sampling())
    free = memory._peak(model, made, 1, model.memory).total + 200 * bytes_per_token(model.config.text, model.dtype)
    monkeypatch.setattr(budget, "available", lambda device: free)
    with pytest.raises(MemoryBudgetError) as caught:
        mllm.generate(model, [mllm.Prompt(words(400))], max_new_tokens=1)
    found = re.search(r"A context of about (\d+) tokens", str(caught.value))
    assert found
    assert 150 < int(found[1]) < 200
    assert len(mllm.generate(model, [mllm.Prompt(words(int(found[1])))], max_new_tokens=1)[0].tokens) == 1


def test_a_score_whose_logits_do_not_fit_is_refused(text_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available", lambda device: 100_000)
    with pytest.raises(MemoryBudgetError, match=r"the logits of 200 tokens need 0\.23 MB, and 0\.10 MB are available"):
        mllm.score(text_model.ours, [mllm.Prompt(words(200))])


def test_a_picture_beyond_the_declared_limit_is_refused_before_the_encoder_runs(
    vision_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a prompt that would fit otherwise, and before any other prompt's picture is encoded."""
    model = evolve(vision_model.ours, memory=evolve(vision_model.ours.memory, image_pixels=256))
    good, bad = mllm.Prompt([IMAGE], [picture(16, 16)]), mllm.Prompt([1, IMAGE], [picture(24, 16)])
    assert len(mllm.generate(model, [good], max_new_tokens=2)[0].tokens) == 2
    monkeypatch.setattr(stages, "vit", lambda *a, **k: pytest.fail("the encoder ran"))
    with pytest.raises(ImageError, match=r"prompts\[1\]: image 0 is 384 pixels after resizing, more than the 256"):
        mllm.generate(model, [good, bad])


def test_many_pictures_are_encoded_in_batches_of_the_largest_one_and_nothing_changes(
    vision_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [picture(8 * (i % 3 + 1), 16, i) for i in range(7)]
    prompt = mllm.Prompt([t for i in range(7) for t in (i, IMAGE)], pictures)
    want = mllm.generate(vision_model.ours, [prompt], max_new_tokens=8)[0].tokens
    sizes: list[int] = []
    vit = stages.vit

    def watch(weights: Any, patches: Any, **kwargs: Any) -> Any:
        sizes.append(len(patches.patches))
        return vit(weights, patches, **kwargs)

    monkeypatch.setattr(stages, "vit", watch)
    model = evolve(vision_model.ours, memory=evolve(vision_model.ours.memory, image_pixels=24 * 16))
    assert mllm.generate(model, [prompt], max_new_tokens=8)[0].tokens == want
    assert len(sizes) > 3
    assert max(sizes) == 24  # patches of 4 x 4 in the largest
    assert sum(sizes) == sum(2 * (i % 3 + 1) * 4 for i in range(7))


def test_progress_prints_the_budget_once_and_a_bar(text_model: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    mllm.generate(text_model.ours, [mllm.Prompt(words(3))] * 2, max_new_tokens=2, max_total_tokens=64, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("static share") == 1
    assert "max_total_tokens 64 leaves 64" in err
    assert "prompts" in err
