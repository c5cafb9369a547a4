"""On a GPU: whole stages of public shapes, with fewer layers, in bfloat16 by the device's tables, as far from the reference
in float32 as the reference in bfloat16 is; and recorded as they are eagerly, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import attrs
import pytest
import torch
from attending import error, single
from torch import Tensor

import mllm
from mllm import buckets, families, requests, stages
from mllm.batch import Chunk, decode_batch, pack
from mllm.cache import KVPool
from mllm.kernels.reference import REFERENCE
from mllm.programs import make_programs
from mllm.state import clone, leaves, map_leaves
from mllm.table import RequestTable

pytestmark = pytest.mark.cuda
PAGE = 64


@pytest.fixture(scope="module", params=["qwen3-vl-2b", "qwen3-vl-8b"])
def model(request: pytest.FixtureRequest) -> Iterator[mllm.Model]:
    config = families.preset(request.param)
    assert config.vision is not None
    vision = attrs.evolve(config.vision, depth=3, deepstack_visual_indexes=(0, 1, 2))
    config = attrs.evolve(config, text=attrs.evolve(config.text, num_hidden_layers=3), vision=vision)
    yield mllm.dummy(config, device="cuda", dtype="bfloat16")
    gc.collect()
    torch.cuda.empty_cache()


def as_near(got: Tensor, reference: Tensor, exact: Tensor) -> bool:
    return error(got, exact) < 1.2 * error(reference, exact)


@pytest.mark.parametrize("lengths", [[70], [104], [256], [300, 84], [512], [1000], [1, 900, 130], [2048]], ids=str)
def test_a_prefill_is_as_near_as_the_reference(model: mllm.Model, lengths: list[int]) -> None:
    listed, rows = -(-max(lengths) // PAGE), len(lengths)
    table = RequestTable.empty(rows=rows, pages=rows * listed, page_size=PAGE)
    table, held = stages.admit(table, lengths)
    chunks = [
        Chunk(
            row=row,
            tokens=torch.arange(n, dtype=torch.int32) % 999 + row,
            positions=torch.arange(n).int().expand(3, -1),
        )
        for row, n in zip(held, lengths, strict=True)
    ]
    pool = KVPool.empty(model.config.text, pages=rows * listed, page_size=PAGE, device="cuda", dtype=model.dtype)
    exact = pack(table, chunks, device="cuda")
    weights, config = model.weights, model.config
    _, want = stages.prefill(single(weights), single(pool), exact, config=config, ops=REFERENCE)
    half, near = stages.prefill(weights, clone(pool), exact, config=config, ops=REFERENCE)
    size = buckets.prompt_size(True, sum(lengths), rows, listed, 0)
    assert size is not None
    assert model.prompt_ops is not None
    padded, ops = pack(table, chunks, device="cuda", size=size), model.prompt_ops(size.tokens)
    own, got = stages.prefill(weights, clone(pool), padded, config=config, ops=ops)
    assert as_near(got[:rows], near, want)
    live = table.pages[: len(held)].flatten().unique()
    live = live[live > 0].cuda()
    assert all(error(a[:, live], b[:, live]) < 2e-2 for a, b in zip(leaves(own), leaves(half), strict=True))
    programs, recorded = make_programs(model), clone(pool)
    for _ in range(2):
        recorded, again = programs.prefill(recorded, padded, None, padded=True)
        assert torch.equal(again[:rows], got[:rows])
        assert all(torch.equal(a[:, live], b[:, live]) for a, b in zip(leaves(recorded), leaves(own), strict=True))


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 33, 64, 100, 128, 200])
def test_a_decode_step_is_as_near_as_the_reference(model: mllm.Model, rows: int) -> None:
    table = RequestTable.empty(rows=rows, pages=4 * rows, page_size=PAGE)
    contexts = [1 + 97 * i % 200 for i in range(rows)]
    table, held = stages.admit(table, [n + 1 for n in contexts])
    table = stages.commit(table, held, contexts)
    empty = KVPool.empty(model.config.text, pages=4 * rows, page_size=PAGE, device="cuda", dtype=model.dtype)
    pool = map_leaves(lambda t: t.normal_(generator=torch.Generator("cuda").manual_seed(rows)), empty)
    size = buckets.power_of_two(rows)
    batch = decode_batch(table, held, range(rows), [0] * rows, size=size, listed=4, device="cuda")
    weights, config = model.weights, model.config
    _, want = stages.decode(single(weights), single(pool), batch, config=config, ops=REFERENCE)
    _, near = stages.decode(weights, clone(pool), batch, config=config, ops=REFERENCE)
    _, got = stages.decode(weights, clone(pool), batch, config=config, ops=model.step_ops(size))
    assert as_near(got[:rows], near[:rows], want[:rows])


@pytest.mark.parametrize(
    "grids", [[(16, 16)], [(10, 4), (12, 14)], [(20, 20)], [(32, 32)], [(36, 30), (6, 8)]], ids=str
)
def test_pictures_are_as_near_as_the_reference(model: mllm.Model, grids: list[tuple[int, int]]) -> None:
    count = sum(r * c for r, c in grids)
    pictures = [
        torch.arange(r * c * 768).mul(7919).remainder(251).to(torch.uint8).view(r * c, 768).cuda() for r, c in grids
    ]
    at = torch.arange(count // 4).numpy()
    vision, config = model.weights.vision, model.config.vision
    assert vision is not None
    assert config is not None
    exact = requests.join_patches(pictures, grids, at, model.images, device=torch.device("cuda"))
    want = stages.vit(single(vision), exact, config=config, ops=REFERENCE)
    near = stages.vit(vision, exact, config=config, ops=REFERENCE)
    assert model.vision_ops is not None
    got = stages.vit(vision, exact, config=config, ops=model.vision_ops)
    assert as_near(got.embed, near.embed, want.embed)
    assert all(as_near(*each) for each in zip(got.deep, near.deep, want.deep, strict=True))
    programs = make_programs(model)
    for _ in range(2):
        again = programs.vit(exact, padded=True)
        assert torch.equal(again.embed, got.embed)
        assert torch.equal(again.deep, got.deep)
