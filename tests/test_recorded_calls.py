"""Memory that runs out while a stage is recorded: its requests fail with a reason, and the next call is right."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attrs import evolve
from faults import Faults
from graphs import Gpu
from tiny import Tiny, four_prompts
from torch import Tensor

import mllm
from mllm import buckets, programs, stages
from mllm.batch import Size
from mllm.completion import Completion
from mllm.state import is_donated

NO_MEMORY = "CUDA out of memory. Tried to allocate 1 GB"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Every stage is recorded as on a GPU, and tokens are read one step behind; batches are as large as what is in them,
    but for those of decode. Nothing waits for the garbage collector, which would come too late for a GPU's memory."""
    made = Gpu()
    monkeypatch.setattr(programs, "recorder_for", lambda device: made.record)
    monkeypatch.setattr(buckets, "prompt_size", lambda pads, *counts: Size(*counts))
    monkeypatch.setattr(buckets, "patch_size", lambda pads, patches, images, unit: (patches, images))
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


@pytest.fixture
def model(vision_model: Tiny) -> mllm.Model:
    ops = vision_model.ours.ops
    return evolve(vision_model.ours, prompt_ops=lambda tokens: ops, vision_ops=ops)


def run(model: mllm.Model, vision_model: Tiny) -> list[Completion]:
    prompts = four_prompts(vision_model)
    return mllm.generate(model, prompts, max_new_tokens=[5, 3, 6, 4], max_running_requests=3)


def settled(model: mllm.Model, gpu: Gpu) -> None:
    """Whatever happened: the pool is kept, and nothing is held but what its programs have recorded."""
    assert model.shelf.kept is not None
    assert not is_donated(model.shelf.kept.pool)
    assert (gpu.stream.name, gpu.underway) == ("home", set())
    assert all(graph.whole for graph in gpu.graphs)
    assert sum(gpu.users.values()) == len(gpu.graphs)


@pytest.mark.parametrize("stage", ["vit", "prefill", "step"])
def test_memory_that_runs_out_while_a_stage_is_recorded_fails_its_batch_and_the_next_call_is_right(
    vision_model: Tiny, model: mllm.Model, gpu: Gpu, faults: Faults, stage: str
) -> None:
    """Before and after every run of a stage: in the one before a recording, in the recording, in a replay."""
    want = run(vision_model.ours, vision_model)
    assert model.pads
    got, boundaries = faults.walk(lambda: run(model, vision_model))
    assert got == want
    mine = [b for b in boundaries if b.stage == stage]
    assert len(mine) >= 8
    for boundary in mine:
        model.shelf.clear()
        assert (len(gpu.graphs), +gpu.users) == (0, {})
        faults.arm(boundary, torch.OutOfMemoryError(NO_MEMORY))
        outs = run(model, vision_model)
        faults.clear()
        failed = [out for out in outs if out.finish_reason == "error"]
        assert 1 <= len(failed) <= (1 if stage == "vit" else 3), boundary
        for out, whole in zip(outs, want, strict=True):
            assert out.tokens == whole.tokens[: len(out.tokens)]
            assert out == whole or (out in failed and NO_MEMORY in (out.error or "")), boundary
        settled(model, gpu)
        assert run(model, vision_model) == want, boundary


@pytest.mark.parametrize("which", range(6))
def test_a_graph_that_finds_no_memory_to_be_made_executable_fails_its_batch(
    vision_model: Tiny, model: mllm.Model, gpu: Gpu, which: int
) -> None:
    want = run(vision_model.ours, vision_model)
    record, recordings = gpu.record, itertools.count()

    def full(run: Any) -> Any:
        gpu.full = next(recordings) == which
        return record(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "recorder_for", lambda device: full)
        outs = run(model, vision_model)
    failed = [out for out in outs if out.error]
    assert failed
    assert all("CUDA error: out of memory" in (out.error or "") for out in failed)
    assert all(out in failed or out == whole for out, whole in zip(outs, want, strict=True))
    settled(model, gpu)
    assert run(model, vision_model) == want


def test_calls_that_come_again_record_nothing_and_keep_nothing_more(
    vision_model: Tiny, model: mllm.Model, gpu: Gpu
) -> None:
    """From the third round on: the first makes ever larger pools, each of which replaces what was recorded over the last
    one, and the second records what is missing over the largest."""
    prompts = four_prompts(vision_model)
    kinds = [(rows, new, prompts[rows % 2 :]) for rows, new in ((1, 3), (2, 9), (3, 20), (4, 33))]

    def held() -> tuple[int, int, int]:
        """Graphs, recordings made so far, and bytes of all tensors that the garbage collector knows."""
        gc.collect()
        parts = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor)]
        return len(gpu.graphs), len(gpu.pools), sum({part.data_ptr(): part.nbytes() for part in parts}.values())

    rounds = []
    for _ in range(5):
        for rows, new, some in kinds:
            mllm.generate(model, some, max_new_tokens=new, max_running_requests=rows)
        rounds.append(held())
    assert rounds[0][0] < rounds[1][0]
    assert rounds[1:] == [rounds[1]] * 4


@pytest.mark.parametrize(("text", "is_memory"), [
    ("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory", True),
    ("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com", True),
    ("Triton Error [CUDA]: out of memory", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("CUDA error: an illegal memory access was encountered", False), ("out of range", False),
])  # fmt: skip
def test_memory_that_runs_out_is_known_by_what_pytorch_says(
    vision_model: Tiny, monkeypatch: pytest.MonkeyPatch, text: str, is_memory: bool
) -> None:
    def step(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(text)

    monkeypatch.setattr(stages, "step", step)
    if not is_memory:
        with pytest.raises(RuntimeError, match=text[:20]):
            run(vision_model.ours, vision_model)
        return
    first = text.splitlines()[0]
    errors = {out.error for out in run(vision_model.ours, vision_model)}
    assert errors == {f"out of memory in decode, {count} requests at once: {first}" for count in (3, 1)}
