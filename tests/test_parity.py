"""Exact against transformers: logits at every position and greedy tokens, on checkpoints that transformers wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    IMAGE,
    MROPE,
    ROPE,
    TEXT,
    VOCAB,
    Tiny,
    assert_close,
    examples,
    expanded,
    four_prompts,
    make_tiny,
    picture,
    their_inputs,
    their_logits,
    words,
)

import mllm

NEW = 64
TOLERANCE = 1e-4


def assert_same_model(model: Tiny, prompts: list[mllm.Prompt], *, new: int = NEW) -> None:
    """A ragged batch of `prompts` goes on as transformers would, and every logit on the way is the same.

    One pass of transformers over a prompt and our answer suffices for both: if each of our tokens is its argmax
    after the ones before it, then its own greedy answer is ours, by induction.
    """
    outs = mllm.generate(model.ours, prompts, max_new_tokens=new)
    wholes = [[*expanded(model, p), *out.tokens] for p, out in zip(prompts, outs, strict=True)]
    scores = mllm.score(model.ours, [mllm.Prompt(w, p.images) for w, p in zip(wholes, prompts, strict=True)])
    for prompt, out, whole, ours in zip(prompts, outs, wholes, scores, strict=True):
        theirs = their_logits(model, whole, prompt.images)
        what = f"{len(prompt.images)} images, {len(whole)} tokens"
        assert_close(ours, theirs, TOLERANCE, what)
        assert (len(out.tokens), out.finish_reason) == (new, "length"), what
        assert out.prompt_tokens == len(whole) - new, what
        greedy = theirs[out.prompt_tokens - 1 : -1].argmax(-1)
        assert greedy.tolist() == list(out.tokens), what


def test_text_models_equal_transformers(text_model: Tiny) -> None:
    assert_same_model(text_model, four_prompts(text_model))


def test_one_image_equals_transformers(vision_model: Tiny) -> None:
    assert_same_model(vision_model, [four_prompts(vision_model)[1]])


def test_three_images_between_text_equal_transformers(vision_model: Tiny) -> None:
    assert_same_model(vision_model, [four_prompts(vision_model)[2]])


def test_a_ragged_batch_of_text_and_images_equals_transformers(vision_model: Tiny) -> None:
    assert_same_model(vision_model, [*four_prompts(vision_model, seed=5), *four_prompts(vision_model, seed=50)])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_transformers_own_generate_gives_the_same_tokens(vision_model: Tiny, which: int) -> None:
    prompt = four_prompts(vision_model)[which]
    inputs = their_inputs(vision_model, expanded(vision_model, prompt), prompt.images)
    out = vision_model.theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(mllm.generate(vision_model.ours, [prompt], max_new_tokens=NEW)[0].tokens) == theirs
    assert len(theirs) == NEW


def test_an_image_that_opens_or_ends_a_prompt_equals_transformers(vision_model: Tiny) -> None:
    opens = mllm.Prompt([IMAGE, *words(4)], [picture(20, 9)])
    ends = mllm.Prompt([*words(2), IMAGE], [picture(8, 31)])
    alone = mllm.Prompt([IMAGE], [picture(8, 8)])
    assert_same_model(vision_model, [opens, ends, alone])


@pytest.mark.parametrize("vision", [False, True])
def test_a_sharded_checkpoint_is_the_same_model(checkpoints: Callable[..., Tiny], vision: bool) -> None:
    whole, parts = checkpoints(vision=vision), checkpoints(vision=vision, shard="20KB")
    index = json.loads((parts.folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_model(parts, four_prompts(parts), new=8)
    prompt = four_prompts(whole)[1:2]
    assert torch.equal(mllm.score(whole.ours, prompt)[0], mllm.score(parts.ours, prompt)[0])


def test_long_prompts_and_deep_models_stay_within_tolerance(checkpoints: Callable[..., Tiny]) -> None:
    model = checkpoints(vision=True, num_hidden_layers=12, max_position_embeddings=4096)
    assert_same_model(model, [mllm.Prompt([*words(700), IMAGE, *words(600, 1)], [picture(50, 70)])])


def test_bfloat16_is_as_near_to_float32_as_transformers_is(checkpoints: Callable[..., Tiny]) -> None:
    """Both round at different places, so neither is the other's truth: float32 on the same weights is."""
    model = checkpoints(vision=True, dtype=torch.bfloat16)
    exact = mllm.load(model.folder, dtype="float32", progress=False)
    assert (model.ours.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    for prompt in four_prompts(model):
        truth = mllm.score(exact, [prompt])[0]
        ours = (mllm.score(model.ours, [prompt])[0] - truth).norm() / truth.norm()
        theirs = (their_logits(model, expanded(model, prompt), prompt.images).float() - truth).norm() / truth.norm()
        assert ours < max(0.03, 1.5 * float(theirs)), f"ours {ours:.3g}, transformers {theirs:.3g}"


@st.composite
def texts(draw: st.DrawFn) -> dict[str, Any]:
    """A decoder: any groups from 1 to 8, any even head size, any widths, tied or not."""
    kv_heads = draw(st.integers(1, 3))
    return {
        "hidden_size": draw(st.integers(5, 64)),
        "intermediate_size": draw(st.integers(1, 80)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 8)),
        "head_dim": 2 * draw(st.integers(1, 16)),
        "vocab_size": draw(st.integers(VOCAB, 200)),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "theta": draw(st.sampled_from([1e2, 1e4, 1e6, 5e6])),
    }


@st.composite
def visions(draw: st.DrawFn) -> dict[str, Any]:
    """An encoder: any taps (none, all, more than the decoder has layers), heads, merge and patch sizes."""
    depth, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {
        "depth": depth,
        "num_heads": heads,
        "hidden_size": heads * 4 * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 60)),
        "num_position_embeddings": draw(st.integers(1, 8)) ** 2,
        "deepstack_visual_indexes": draw(st.lists(st.integers(0, depth - 1), unique=True)),  # in any order
        "patch_size": draw(st.integers(1, 9)),
        "spatial_merge_size": draw(st.integers(1, 3)),
        "temporal_patch_size": draw(st.integers(1, 3)),
    }


@st.composite
def sections(draw: st.DrawFn, half: int) -> list[int]:
    """Three counts of rotary pairs: even and odd ones, empty ones, and ones that reach beyond the head."""
    height, width = draw(st.integers(0, half)), draw(st.integers(0, half))
    return [max(half - height - width, 0), height, width]


@examples(60)
@given(data=st.data())
def test_any_vision_model_equals_transformers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text, vision = data.draw(texts()), data.draw(visions())
    rope = {**MROPE, "rope_theta": text.pop("theta"), "mrope_section": data.draw(sections(text["head_dim"] // 2))}
    seed = data.draw(st.integers(0, 999))
    model = make_tiny(tmp_path_factory.mktemp("drawn"), vision=vision, seed=seed, rope_parameters=rope, **text)
    assert_same_model(model, four_prompts(model, seed))


@examples(30)
@given(text=texts(), seed=st.integers(0, 999))
def test_any_text_model_equals_transformers(
    tmp_path_factory: pytest.TempPathFactory, text: dict[str, Any], seed: int
) -> None:
    rope = {**ROPE, "rope_theta": text.pop("theta")}
    model = make_tiny(tmp_path_factory.mktemp("drawn"), seed=seed, rope_parameters=rope, **text)
    assert_same_model(model, four_prompts(model, seed))


def test_the_context_may_be_filled_to_its_last_token(checkpoints: Callable[..., Tiny]) -> None:
    model = checkpoints(max_position_embeddings=40)
    out = mllm.generate(model.ours, [mllm.Prompt(words(30))], max_new_tokens=NEW)[0]
    assert (len(out.tokens), out.finish_reason) == (11, "length")  # the 41st token is made, but never run
    theirs = their_logits(model, [*words(30), *out.tokens[:-1]])
    assert theirs[29:].argmax(-1).tolist() == list(out.tokens)


def test_the_configuration_read_is_the_one_written(vision_model: Tiny, text_model: Tiny, tmp_path: Path) -> None:
    for model in (vision_model, text_model):
        text = model.ours.config.text
        assert [getattr(text, k) for k in TEXT if hasattr(text, k)] == [TEXT[k] for k in TEXT if hasattr(text, k)]
    assert vision_model.ours.config.text.mrope_section == (2, 1, 1)
    assert text_model.ours.config.vision is None
