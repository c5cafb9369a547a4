"""The way of a GPU on a CPU: batches padded to sizes that come again, recordings that are replayed, tokens read one step
behind, and every Triton kernel, in Triton's interpreter."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve
from tiny import Tiny, four_prompts, words
from torch import Tensor
from torch.nn import functional as F

import mllm
from mllm import buckets
from mllm.kernels.reference import REFERENCE
from mllm.state import map_leaves

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.fixture(scope="module")
def padded(vision_model: Tiny) -> mllm.Model:
    """The small Qwen3-VL with the tables of a GPU of capability 8.x."""
    from mllm.kernels import cuda, cuda_prompts, cuda_vision

    def gelu(x: Any, weight: Tensor, bias: Tensor) -> tuple[Any, Tensor]:
        """The epilogue that the table uses is the erf form on a CPU."""
        x, y = cuda_vision.layer_norm_linear(x, weight, bias, pdl=False)
        return x, F.gelu(y, approximate="tanh")

    vision = evolve(cuda_vision.vision_ops(REFERENCE, captured=True, wide=False), layer_norm_gelu=gelu)
    model = vision_model.ours
    return evolve(
        model, weights=map_leaves(Tensor.contiguous, model.weights), ops=REFERENCE,
        decode_ops=partial(cuda.decode_ops, pdl=False), prompt_ops=partial(cuda_prompts.prompt_ops, wide=False),
        vision_ops=vision,
    )  # fmt: skip


def test_padded_and_recorded_calls_give_the_tokens_of_plain_ones(padded: mllm.Model, vision_model: Tiny) -> None:
    assert padded.pads
    prompts, limits = four_prompts(vision_model)[:3], [4, 2, 3]
    expected = [out.tokens for out in mllm.generate(vision_model.ours, prompts, max_new_tokens=limits)]
    for rows in (3, 1):
        outs = mllm.generate(padded, prompts, max_new_tokens=limits, max_running_requests=rows)
        assert [out.tokens for out in outs] == expected


def test_prompts_padded_to_as_many_rows_as_tokens_have_the_logits_of_their_own_last_tokens(
    padded: mllm.Model, vision_model: Tiny
) -> None:
    prompts = [mllm.Prompt(words(count, seed)) for seed, count in enumerate((1, 1, 2, 1, 2, 1, 1, 2, 1))]
    size = buckets.prompt_size(True, sum(len(p.tokens) for p in prompts), len(prompts), 1, 0)
    assert size is not None
    assert size.tokens == size.rows == 16
    expected = mllm.generate(vision_model.ours, prompts, max_new_tokens=1)
    assert [out.tokens for out in mllm.generate(padded, prompts, max_new_tokens=1)] == [o.tokens for o in expected]


def test_programs_and_pool_stay_with_the_model_and_are_lent_to_one_call_at_a_time(padded: mllm.Model) -> None:
    prompt = [mllm.Prompt([5, 6, 7])]
    first = mllm.generate(padded, prompt, max_new_tokens=3)
    kept = padded.shelf.kept
    assert kept is not None
    outer = mllm.stream(padded, prompt, max_new_tokens=3)
    next(outer)
    assert padded.shelf.kept is None
    assert mllm.generate(padded, prompt, max_new_tokens=3) == first  # on a pool of its own
    outer.close()  # type: ignore[attr-defined]
    assert padded.shelf.kept is kept
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 100, 129, 1000, 2048])
def test_a_size_holds_its_count_and_a_quarter_more_at_most(count: int) -> None:
    size = buckets.quarter(count, 16)
    assert count <= size <= max(16, count * 1.25 + 1)
    assert buckets.quarter(size, 16) == size


def test_what_is_long_runs_as_it_is() -> None:
    assert buckets.prompt_size(True, 2049, 1, 40, 0) is None
    assert buckets.patch_size(True, 4097, 1, 4) is None
    assert buckets.prompt_size(False, 10, 1, 1, 0) is None
    assert buckets.patch_size(True, 4095, 3, 4) == (4096, 4)
