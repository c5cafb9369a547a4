"""`--correct`: real prompts, prefilled whole and in two parts, then decoded greedily; both texts shown, and equal.

The second part reads the first from the KV pool. Text prompts are cut in the middle, those with a picture inside
the picture, where a mistake about deepstack features or positions would show.
"""

from __future__ import annotations

from functools import partial

import pytest
from torch import Tensor

from benchmarks import points
from benchmarks.checks import RELATIVE
from benchmarks.session import Session
from mllm import stages
from mllm.batch import VisionTokens, pack
from mllm.model import Model
from mllm.prompts import Expanded
from mllm.segments import chunk

PROMPTS = ("The capital of France is", "The capital of the United Kingdom is", "Today is a sunny day and I like")
QUESTION = "What is in the picture?"
NEW_TOKENS = 16


@pytest.mark.parametrize("which", range(len(PROMPTS)), ids=lambda i: f"prompt={i}")
def test_correct_text(session: Session, which: int) -> None:
    model = session.model
    text = session.settings.prompt or PROMPTS[which]
    tokens = model.tokenizer.encode(text) if model.tokenizer else points.text_tokens(model, 3, 24)[which]
    layout = points.lay_out(model, tokens)
    _compare(session, text if model.tokenizer else "random tokens", layout, None, len(layout.tokens) // 2)


def test_correct_image(session: Session) -> None:
    session.needs_vision()
    model = session.model
    picture = points.picture(session.settings.image)
    text = session.settings.prompt or (QUESTION if model.tokenizer else None)
    layout = points.lay_out(model, points.picture_tokens(model, picture, text), picture)
    start, count = layout.starts[0], layout.counts[0]
    patches = points.patches_of(model, [picture], range(start, start + count))
    vision = stages.vit(model.weights.vision, patches, config=model.config.vision, ops=model.ops)
    _compare(session, f"a picture of {count} tokens and {text or 'random tokens'}", layout, vision, start + count // 2)


def _compare(session: Session, what: str, layout: Expanded, vision: VisionTokens | None, cut: int) -> None:
    model, length = session.model, len(layout.tokens)
    session.fits(1, length, NEW_TOKENS)
    whole, logits = _greedy(model, layout, vision, ((0, length),))
    parts, part_logits = _greedy(model, layout, vision, ((0, cut), (cut, length)))
    show = [model.tokenizer.decode(made) if model.tokenizer else str(made) for made in (whole, parts)]
    session.remarks.append(f"{what}\n  whole:        {show[0]!r}\n  cut at {cut:4}:  {show[1]!r}")
    assert points.relative(part_logits, logits) <= RELATIVE[model.dtype]
    assert whole == parts


def _greedy(
    model: Model, layout: Expanded, vision: VisionTokens | None, parts: tuple[tuple[int, int], ...]
) -> tuple[list[int], Tensor]:
    """The new tokens after a prompt that is prefilled in `parts`, and the logits at its end."""
    total = len(layout.tokens) + NEW_TOKENS
    pool, table, rows = points.memory(model, 1, total)
    for start, stop in parts:
        batch = pack(table, [chunk(layout, rows[0], start, stop)], device=model.device)
        mine = _crop(vision, start, stop)
        pool, logits = stages.prefill(model.weights, pool, batch, mine, config=model.config, ops=model.ops)
        table = stages.commit(table, rows, [stop - start])
    made = [int(logits.argmax())]
    ready = points.carry(model, table, rows, made, [layout.delta], total)
    step = partial(stages.step, model.weights, config=model.config, ops=model.ops)
    for _ in range(NEW_TOKENS - 1):
        pool, ready, tokens = step(pool, ready, points.greedy(model, 1))
        made.append(int(tokens))
    return made, logits


def _crop(vision: VisionTokens | None, start: int, stop: int) -> VisionTokens | None:
    """The image tokens at positions [start, stop), counted from start."""
    if vision is None:
        return None
    inside = (vision.at >= start) & (vision.at < stop)
    if not bool(inside.any()):
        return None
    return VisionTokens(embed=vision.embed[inside], deep=vision.deep[:, inside], at=vision.at[inside] - start)
