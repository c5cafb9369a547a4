"""A prompt in any parts, in any company, under any limits: the same logits and the same tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from running import in_chunks, start
from tiny import IMAGE, Tiny, assert_close, examples, four_prompts, picture, words

import mllm

TOLERANCE = 1e-5
NEW = 12


def model_of(kind: str, text_model: Tiny, vision_model: Tiny) -> Tiny:
    return {"text": text_model, "vision": vision_model}[kind]


@examples(60)
@given(kind=st.sampled_from(["text", "vision"]), which=st.integers(0, 3), page=st.integers(1, 9), data=st.data())
def test_any_split_of_a_prompt_gives_what_one_prefill_gives(
    text_model: Tiny, vision_model: Tiny, kind: str, which: int, page: int, data: st.DataObject
) -> None:
    model = model_of(kind, text_model, vision_model)
    prompt = four_prompts(model)[which]
    whole = mllm.score(model.ours, [prompt])[0]
    cuts = data.draw(st.sets(st.integers(1, len(whole) - 1))) if len(whole) > 1 else ()
    assert_close(in_chunks(model.ours, prompt, sorted(cuts), page_size=page), whole, TOLERANCE, f"cut at {cuts}")


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_token_by_token_gives_what_one_prefill_gives(
    text_model: Tiny, vision_model: Tiny, kind: str, which: int
) -> None:
    model = model_of(kind, text_model, vision_model)
    prompt = four_prompts(model)[which]
    whole = mllm.score(model.ours, [prompt])[0]
    assert_close(in_chunks(model.ours, prompt, range(1, len(whole))), whole, TOLERANCE)


def test_every_cut_through_an_image_gives_what_one_prefill_gives(vision_model: Tiny) -> None:
    prompt = mllm.Prompt([*words(2), IMAGE, *words(3)], [picture(16, 24)])
    whole = mllm.score(vision_model.ours, [prompt])[0]
    assert len(whole) == 2 + 6 + 3
    for cut in range(1, len(whole)):
        assert_close(in_chunks(vision_model.ours, prompt, [cut]), whole, TOLERANCE, f"cut at {cut}")


@examples(40)
@given(data=st.data())
def test_prompts_that_share_their_batches_give_what_each_gives_alone(vision_model: Tiny, data: st.DataObject) -> None:
    """Every turn runs the next few tokens of some of the prompts, in any order, as one ragged batch."""
    prompts = four_prompts(vision_model)
    alone = mllm.score(vision_model.ours, prompts)
    run = start(vision_model.ours, prompts, page_size=data.draw(st.integers(1, 6)))
    at = [0] * len(prompts)
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    while left := [i for i, logits in enumerate(alone) if at[i] < len(logits)]:
        chosen = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        counts = [data.draw(st.integers(1, len(alone[i]) - at[i])) for i in chosen]
        out = run.prefill([(i, at[i], at[i] + n) for i, n in zip(chosen, counts, strict=True)])
        for i, n, logits in zip(chosen, counts, out, strict=True):
            parts[i].append(logits)
            at[i] += n
    for got, want in zip(parts, alone, strict=True):
        assert_close(torch.cat(got), want, TOLERANCE)


@pytest.mark.parametrize("pad", [0, 3])
def test_decode_gives_the_logits_that_prefill_gives(vision_model: Tiny, pad: int) -> None:
    model, prompts = vision_model.ours, four_prompts(vision_model)
    answers = [words(6, seed) for seed in range(len(prompts))]
    wholes = mllm.score(model, [mllm.Prompt([*p.tokens, *a], p.images) for p, a in zip(prompts, answers, strict=True)])
    run = start(model, prompts, new=6)
    for i, request in enumerate(run.requests):
        run.prefill([(i, 0, request.length)])
    for turn in range(6):
        batch = run.decode_batch([a[turn] for a in answers], size=len(prompts) + pad)
        run.pool, logits = mllm.stages.decode(model.weights, run.pool, batch, config=model.config, ops=model.ops)
        run.table = mllm.stages.commit(run.table, run.rows, [1] * len(prompts))
        want = torch.stack([w[r.length + turn] for w, r in zip(wholes, run.requests, strict=True)])
        assert_close(logits[: len(prompts)], want, TOLERANCE, f"turn {turn}")


def test_score_is_the_logits_whose_argmax_generate_takes(vision_model: Tiny) -> None:
    prompts = four_prompts(vision_model)
    scores = mllm.score(vision_model.ours, prompts)
    outs = mllm.generate(vision_model.ours, prompts, max_new_tokens=1)
    assert [int(s[-1].argmax()) for s in scores] == [out.tokens[0] for out in outs]
    assert [len(s) for s in scores] == [out.prompt_tokens for out in outs]
    assert {(s.dtype, s.shape[1]) for s in scores} == {(torch.float32, vision_model.ours.config.text.vocab_size)}


warm = [mllm.Sampling(temperature=1.5, top_p=0.95, seed=seed) for seed in (3, 2**62)]
samplings = st.sampled_from([mllm.Sampling(), *warm])


@examples(40)
@given(
    order=st.permutations(range(6)),
    count=st.integers(1, 6),
    settings=st.lists(samplings, min_size=6, max_size=6),
    limits=st.lists(st.integers(1, NEW), min_size=6, max_size=6),
    running=st.none() | st.integers(1, 6),
    total=st.none() | st.integers(48, 200),
    chunk=st.integers(1, 40),
)
def test_company_order_and_limits_change_no_token(
    vision_model: Tiny, order: list[int], count: int, settings: list[mllm.Sampling], limits: list[int],
    running: int | None, total: int | None, chunk: int,
) -> None:  # fmt: skip
    prompts = [*four_prompts(vision_model), *four_prompts(vision_model, 9)[1:3]]
    module: Any = importlib.import_module("mllm.loop")
    alone = [
        mllm.generate(vision_model.ours, [p], max_new_tokens=n, sampling=s)[0]
        for p, n, s in zip(prompts, limits, settings, strict=True)
    ]
    some = order[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PREFILL_TOKENS", chunk)
        outs = mllm.generate(
            vision_model.ours,
            [prompts[i] for i in some],
            max_new_tokens=[limits[i] for i in some],
            sampling=[settings[i] for i in some],
            max_running_requests=running,
            max_total_tokens=total,
        )
    for i, out in zip(some, outs, strict=True):
        assert (out.finish_reason, out.tokens) == (alone[i].finish_reason, alone[i].tokens)


def test_a_prefill_batch_far_smaller_than_a_prompt_changes_no_logit(
    vision_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = four_prompts(vision_model)
    whole = mllm.score(vision_model.ours, prompts)
    monkeypatch.setattr(importlib.import_module("mllm.generate"), "PREFILL_TOKENS", 3)
    for got, want in zip(mllm.score(vision_model.ours, prompts), whole, strict=True):
        assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("layers", [2, 3])
def test_only_positions_whose_logits_are_wanted_go_through_all_of_the_last_layer(
    checkpoints: Callable[..., Tiny], layers: int
) -> None:
    """But where a deepstack tap comes after it, which adds to the positions of a picture."""
    model, counts = checkpoints(vision=True, num_hidden_layers=layers).ours, list[int]()

    def norm_gate(x: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(x))
        return model.ops.norm_gate(x, *args, **kwargs)

    prompt = mllm.Prompt([*words(2), IMAGE, *words(3)], [picture(16, 24)])
    want = mllm.score(model, [prompt])[0]
    counted = evolve(model, ops=evolve(model.ops, norm_gate=norm_gate), decode_ops=None)
    got = mllm.generate(counted, [prompt], max_new_tokens=1)[0]
    assert counts == [len(want)] * (layers - 1) + [1 if layers > 2 else len(want)]
    assert list(got.tokens) == [int(want[-1].argmax())]
