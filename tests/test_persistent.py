"""A decode step of one row as one kernel on Hopper: the same as the reference, layer by layer.

pytest tests/test_persistent.py --device cuda
"""

from __future__ import annotations

import attrs
import pytest
import torch
from attending import error, single
from torch import Tensor

import mllm
from mllm import families, stages, weights
from mllm.batch import ForwardBatch, decode_batch
from mllm.cache import KVPool
from mllm.config import Config
from mllm.kernels.reference import REFERENCE
from mllm.state import clone, leaves, map_leaves, replace
from mllm.table import RequestTable
from mllm.transform import capture

pytest.importorskip("triton")
PAGE = 64
SHAPES = {  # E, heads, key/value heads, their size, F, layers, V
    "one-head": (512, 4, 4, 128, 512, 1, 1024),
    "heads-of-64": (1024, 8, 8, 64, 1536, 2, 4112),
    "groups-of-8": (1536, 16, 2, 128, 2560, 5, 16000),
    "groups-of-4": (2560, 32, 8, 128, 9728, 2, 2048),
    "three-tiles": (4608, 8, 4, 128, 1024, 3, 2048),
}


def config_of(shape: tuple[int, ...]) -> Config:
    width, heads, kv_heads, size, inner, layers, vocabulary = shape
    text = attrs.evolve(
        families.preset("qwen3-0.6b").text, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=size, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocabulary,
    )  # fmt: skip
    return attrs.evolve(families.preset("qwen3-0.6b"), text=text)


def step(model: mllm.Model, context: int, listed: int, page: int = PAGE) -> tuple[KVPool, ForwardBatch]:
    """A pool whose free slots are not finite, and a row with `context` tokens in it that is to get one more."""
    table = RequestTable.empty(rows=1, pages=listed, page_size=page)
    table, held = stages.admit(table, [context + 1])
    table = stages.commit(table, held, [context])
    pool = KVPool.empty(model.config.text, pages=listed, page_size=page, device="cuda", dtype=model.dtype)
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    generator = torch.Generator("cuda").manual_seed(context)
    for i in range(-(-context // page)):
        filled = min(page, context - i * page)
        for kept in (pool.keys, pool.values):
            kept[:, int(table.pages[0, i]), :filled].normal_(generator=generator)
    return pool, decode_batch(table, held, [0], [7], size=1, listed=listed, device="cuda")


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def model(request: pytest.FixtureRequest, hopper: None) -> mllm.Model:
    return mllm.dummy(config_of(SHAPES[request.param]), device="cuda", dtype="bfloat16")


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("context", "listed", "page"),
    [(0, 1, 64), (1, 4, 64), (63, 4, 64), (64, 4, 64), (255, 4, 64), (300, 8, 64), (1023, 16, 64), (1, 32, 64),
     (1024, 32, 64), (1500, 32, 64), (2047, 32, 64), (2048, 64, 64), (2097, 64, 64), (4095, 64, 64), (7000, 128, 64),
     (100, 256, 64), (16000, 256, 64), (500, 32, 16), (1999, 128, 16), (2500, 64, 48)],
)  # fmt: skip
def test_a_step_is_as_near_as_the_reference(model: mllm.Model, context: int, listed: int, page: int) -> None:
    pool, batch = step(model, context, listed, page)
    ops = model.step_ops(1)
    plan = ops.plan(batch, config=model.config.text, page_size=page, dtype=model.dtype)
    assert plan.exchange is not None
    settings = {"config": model.config}
    exact, want = stages.decode(single(model.weights), single(pool), batch, ops=REFERENCE, **settings)
    _, near = stages.decode(model.weights, clone(pool), batch, ops=REFERENCE, **settings)
    own, got = stages.decode(model.weights, clone(pool), batch, ops=ops, **settings)
    assert error(got, want) < 1.2 * error(near, want) + 1e-3
    slot = divmod(int(batch.slots[0]), page)
    for ours, theirs in zip(leaves(own), leaves(exact), strict=True):
        assert error(ours[:, slot[0], slot[1]], theirs[:, slot[0], slot[1]]) < 2e-2
    for ours, before in zip(leaves(own), leaves(pool), strict=True):
        ours[:, slot[0], slot[1]] = before[:, slot[0], slot[1]] = 0
        assert torch.equal(ours.nan_to_num(9), before.nan_to_num(9))


@pytest.mark.cuda
def test_a_recorded_step_gives_the_same_bits_every_time(model: mllm.Model) -> None:
    pool, batch = step(model, 700, 16)
    ops = model.step_ops(1)

    def run(pool: KVPool, batch: ForwardBatch) -> tuple[KVPool, Tensor]:
        return stages.decode(model.weights, pool, batch, config=model.config, ops=ops)

    _, want = run(clone(pool), batch)
    replay = capture(run, donate=["pool"])
    for _ in range(300):
        pool, got = replay(pool, batch)
        assert torch.equal(got, want)


@pytest.mark.cuda
def test_weights_that_lie_apart_are_taken_layer_by_layer(model: mllm.Model) -> None:
    pool, batch = step(model, 100, 4)
    ops, apart = model.step_ops(1), map_leaves(torch.clone, model.weights)
    plan = ops.plan(batch, config=model.config.text, page_size=PAGE, dtype=model.dtype)
    x = ops.embed(batch.tokens, apart.text.embed)
    if model.config.text.num_hidden_layers > 1:
        assert ops.whole_(x, apart.text, pool.keys, pool.values, plan, eps=1e-6) is None
    want = stages.decode(model.weights, clone(pool), batch, config=model.config, ops=ops)[1]
    got = stages.decode(apart, clone(pool), batch, config=model.config, ops=ops)[1]
    assert error(got, want) < 3e-2


def test_tensors_are_one_where_they_lie_one_after_the_other() -> None:
    x = torch.arange(24).view(4, 2, 3)
    assert torch.equal(weights.as_one(list(x)), x)
    assert weights.as_one([x[0]]).shape == (1, 2, 3)
    for apart in ([x[0], x[2]], [x[0], x[1].T], [x[0].T], [x[0], x[1][:1]]):
        assert weights.as_one(apart) is None
    held = torch.empty(16, dtype=torch.uint8)
    first, second = (torch.frombuffer(memoryview(held.numpy())[i : i + 8], dtype=torch.uint8) for i in (0, 8))
    assert weights.as_one([first, second]) is None  # neighbours, of two storages


def test_mergers_lie_one_after_the_other() -> None:
    config = families.preset("qwen3-vl-2b")
    made = weights.build(config, weights.room(config, device="meta", dtype=torch.bfloat16)).vision
    assert made is not None
    every = [made.merger, *made.taps]
    for name in ("up", "up_bias", "down", "down_bias"):
        those = [getattr(merger, name) for merger in every]
        assert [x.storage_offset() for x in those] == [i * those[0].numel() for i in range(4)]
    assert made.merger.norm.storage_offset() == made.taps[0].norm.storage_offset() == 0


def test_layers_are_stacked_where_they_are_made() -> None:
    config = config_of(SHAPES["groups-of-8"])
    made = weights.random(config, dtype=torch.bfloat16).text
    stacks = weights.stacked(made.layers)
    assert stacks is not None
    for name in weights.Stacks._fields:
        for i, layer in enumerate(made.layers):
            assert torch.equal(getattr(stacks, name)[i], getattr(layer, name))
    assert weights.stacked(made.layers[::-1]) is None
    assert weights.stacked(map_leaves(torch.clone, made).layers) is None
    half = [replace(layer, down=layer.down[:, :512]) for layer in made.layers]
    assert weights.stacked(half) is None


@pytest.mark.parametrize("name", ["qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"])
def test_what_fits_the_chip(name: str) -> None:
    from mllm.kernels import persistent

    config = families.preset(name).text
    assert all(persistent.fits(config, tokens, 16, torch.bfloat16, 132) for tokens in (64, 1024, 1088, 2048, 16384))
    assert not persistent.fits(config, 32768, 64, torch.bfloat16, 132)
    assert not persistent.fits(config, 2048, 8, torch.bfloat16, 132)
    assert not persistent.fits(config, 2048, 64, torch.float16, 132)
    assert not persistent.fits(config, 2048, 64, torch.bfloat16, 114)
    for changes in (
        {"num_key_value_heads": 6, "num_attention_heads": 30},
        {"intermediate_size": 6000},
        {"head_dim": 96},
    ):
        assert not persistent.fits(attrs.evolve(config, **changes), 64, 64, torch.bfloat16, 132)
