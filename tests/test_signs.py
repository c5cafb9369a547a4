"""The embedded model through mllm: it sees, it answers what transformers answers, and breaking the runtime shows."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
import torch

import mllm
from mllm.model import Model
from mllm.signs import pictures
from mllm.signs.evaluate import Reference
from mllm.signs.pictures import Example

EACH = 20
# Of the first 20 held-out examples of a kind, how many must be right. The model card has the accuracies over 500.
BARS = {"shapes": 19, "text": 18, "count": 19, "place": 19, "where": 19, "change": 19, "chat": 20}


@pytest.fixture(scope="module")
def signs(device: str) -> Model:
    return mllm.load(dtype="float32", device=device)


@functools.cache
def items(kind: str) -> list[Example]:
    return [pictures.held_out(kind, index) for index in range(EACH)]


def answers(model: Model, asked: list[Example]) -> list[str]:
    prompts = [mllm.prompt(model, pictures.messages(item)) for item in asked]
    return [done.text for done in mllm.generate(model, prompts, max_new_tokens=96)]


def right(model: Model, asked: list[Example]) -> int:
    return sum(answer == item.answer for answer, item in zip(answers(model, asked), asked, strict=True))


def test_every_kind_has_a_bar() -> None:
    assert set(BARS) == set(pictures.KINDS)


@pytest.mark.parametrize("kind", BARS)
def test_the_embedded_model_sees(kind: str, signs: Model) -> None:
    assert right(signs, items(kind)) >= BARS[kind]


def test_answers_are_those_of_transformers() -> None:
    model, reference = mllm.load(dtype="float32"), Reference(mllm.signs.FOLDER)
    asked = [item for kind in BARS for item in items(kind)[:4]]
    assert answers(model, asked) == [reference.answer(item) for item in asked]


def test_answers_do_not_depend_on_the_company(signs: Model) -> None:
    asked = [items(kind)[0] for kind in BARS]
    assert answers(signs, asked) == [answers(signs, [item])[0] for item in asked]


def test_without_deepstack_shapes_are_not_described(signs: Model) -> None:
    deaf = attrs.evolve(signs, ops=attrs.evolve(signs.ops, add_=lambda x, at, rows: x))
    assert right(deaf, items("shapes")) <= EACH // 2


def test_with_positions_in_one_dimension_shapes_are_not_described(signs: Model) -> None:
    def flat(batch: Any, **settings: Any) -> Any:
        lengths = torch.arange(batch.positions.shape[1], dtype=torch.int32)
        return signs.ops.plan(attrs.evolve(batch, positions=lengths.expand(3, -1).to(signs.device)), **settings)

    blind = attrs.evolve(signs, ops=attrs.evolve(signs.ops, plan=flat), decode_ops=None)
    asked = items("shapes")[:10]
    assert sum(right(blind, [item]) for item in asked) <= 5


def test_swapped_pictures_change_the_answer(signs: Model) -> None:
    changed = [item for item in items("change") if item.answer != "nothing changed"]
    swapped = [attrs.evolve(item, images=item.images[::-1]) for item in changed]
    assert right(signs, changed) > len(changed) * 3 // 4
    assert right(signs, swapped) < len(changed) // 2
