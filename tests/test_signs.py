"""The embedded model through mllm: it sees, it answers what transformers answers, and breaking the runtime shows."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
import torch
from exchange import in_every_table
from torch import Tensor

import mllm
from mllm import stages
from mllm.batch import Chunk, ForwardBatch, Size, decode_batch, pack
from mllm.kernels.ops import Ops
from mllm.model import Model
from mllm.signs import pictures
from mllm.signs.evaluate import Reference
from mllm.signs.pictures import Example
from mllm.table import RequestTable

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


def test_an_op_is_exchanged_in_every_table(signs: Model) -> None:
    """Also in those that only a GPU has."""
    model = attrs.evolve(signs, prompt_ops=lambda tokens: signs.ops, vision_ops=signs.ops)
    changed = in_every_table(model, lambda ops: attrs.evolve(ops, add_=len))
    assert changed.prompt_ops is not None
    assert changed.vision_ops is not None
    tables = [changed.step_ops(1), changed.prompt_ops(1), changed.vision_ops]
    assert [ops.add_ for ops in (changed.ops, *tables)] == [len] * 4
    assert [ops.put_ for ops in tables] == [signs.step_ops(1).put_, signs.ops.put_, signs.ops.put_]
    assert changed.shelf is not signs.shelf


def test_without_deepstack_shapes_are_not_described(signs: Model) -> None:
    deaf = in_every_table(signs, lambda ops: attrs.evolve(ops, add_=lambda x, at, rows: x))
    assert right(deaf, items("shapes")) <= EACH // 2


def indices(batch: ForwardBatch) -> Tensor:
    """Where each token stands in its context, by count: int32 [T], 0 for padding. Reads nothing on the host, so that a
    graph can hold it."""
    token = torch.arange(len(batch.tokens), dtype=torch.int32, device=batch.tokens.device)
    ends = batch.q_indptr[1:]
    row = torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)
    return (token + (batch.lengths - ends)[row]).clamp(min=0)


def flat(ops: Ops) -> Ops:
    """The table with positions in one dimension, as if a picture were a line of text."""

    def plan(batch: Any, **settings: Any) -> Any:
        return ops.plan(attrs.evolve(batch, positions=indices(batch).repeat(3, 1)), **settings)

    return attrs.evolve(ops, plan=plan)


def test_flat_positions_are_the_indices_of_the_tokens(device: str) -> None:
    """Of a chunk that follows cached tokens, of one token, with padding behind them, and of a decode step."""
    table, rows = stages.admit(RequestTable.empty(rows=3, pages=9, page_size=4), [9, 1, 6])
    table = stages.commit(table, [rows[0]], [5])
    chunks = [Chunk(row=row, tokens=torch.zeros(count, dtype=torch.int32),
                    positions=torch.zeros(3, count, dtype=torch.int32))
              for row, count in zip(rows, (4, 1, 6), strict=True)]  # fmt: skip
    want = [5, 6, 7, 8, 0, 0, 1, 2, 3, 4, 5]
    assert indices(pack(table, chunks, device=device)).tolist() == want
    padded = indices(pack(table, chunks, device=device, size=Size(tokens=16, rows=8, listed=4)))
    assert padded[:11].tolist() == want
    assert bool((padded[11:] >= 0).all())
    table = stages.commit(table, rows, [4, 1, 6])
    step = decode_batch(table, rows, [1, 2, 3], [0, -4, 0], size=4, listed=4, device=device)
    assert indices(step).tolist() == [9, 1, 6, 0]


def test_with_positions_in_one_dimension_shapes_are_not_described(signs: Model) -> None:
    blind, asked = in_every_table(signs, flat), items("shapes")[:10]
    assert sum(right(blind, [item]) for item in asked) <= 5


def test_swapped_pictures_change_the_answer(signs: Model) -> None:
    changed = [item for item in items("change") if item.answer != "nothing changed"]
    swapped = [attrs.evolve(item, images=item.images[::-1]) for item in changed]
    assert right(signs, changed) > len(changed) * 3 // 4
    assert right(signs, swapped) < len(changed) // 2
