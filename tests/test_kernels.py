"""The Triton kernels against the reference ops: in Triton's interpreter on a CPU, compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/test_kernels.py
pytest tests/test_kernels.py --device cuda
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import attrs
import pytest
import torch
from attending import attended, error, prompt_error
from torch import Tensor

import mllm
from mllm import stages
from mllm.batch import ForwardBatch, SamplingBatch, decode_batch
from mllm.cache import KVPool
from mllm.kernels import reference_vision
from mllm.kernels.ops import NOT_FINITE, Ops
from mllm.kernels.reference import REFERENCE
from mllm.model import Model
from mllm.sampling import Sampling, sampling_batch
from mllm.state import clone, leaves, map_leaves
from mllm.table import RequestTable
from mllm.weights import Merger, TapMerger

triton = pytest.importorskip("triton")

PAGE = 64
STEPS = 2
# heads, key/value heads, head size, width, MLP width, vocabulary, context of each row; the batch has one row more
# than contexts where it says so, which is a padding row
SHAPES = [
    (4, 2, 16, 48, 64, 100, (1,), False),
    (4, 2, 64, 160, 96, 2100, (130,), False),
    (2, 1, 128, 64, 80, 300, (1500,), False),
    (8, 2, 64, 96, 64, 100, (250,), False),
    (4, 1, 24, 48, 64, 100, (1, 64, 300), True),
    (3, 3, 32, 64, 96, 77, (33, 129), False),
    (8, 1, 32, 64, 96, 77, (65, 300, 2, 127), True),
    (20, 4, 16, 48, 1600, 100, (600,), False),
    (4, 2, 24, 48, 64, 100, (200,), False),
]


@pytest.fixture
def ops(triton_device: str) -> functools.partial[Ops]:
    """The decode table by number of rows, as this device can run it."""
    from mllm.kernels import cuda

    capable = triton_device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    return functools.partial(cuda.decode_ops, pdl=capable)


def decoding(shape: Any, device: str) -> tuple[Model, KVPool, ForwardBatch, SamplingBatch]:
    """A small float32 model with rows in the middle of decoding, over a pool of noise."""
    heads, kv_heads, head, width, mlp, vocabulary, contexts, padded = shape
    config = mllm.Config(
        text=mllm.TextConfig(
            hidden_size=width, intermediate_size=mlp, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=head, vocab_size=vocabulary, max_position_embeddings=4096,
            rope_theta=1e4, mrope_section=(head // 2, head // 8, head // 8), tie_word_embeddings=True,
        )
    )  # fmt: skip
    made = mllm.dummy(config, device=device, dtype="float32")
    model = attrs.evolve(made, weights=map_leaves(Tensor.contiguous, made.weights))  # by rows, as on a GPU
    rows = len(contexts)
    table = RequestTable.empty(rows=rows, pages=40, page_size=PAGE)
    table, held = stages.admit(table, [n + STEPS for n in contexts])
    table = stages.commit(table, held, contexts)
    pool = KVPool.empty(config.text, pages=40, page_size=PAGE, device=device, dtype=torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    pool = map_leaves(lambda t: t.normal_(generator=generator), pool)
    batch = decode_batch(
        table, held, range(rows), [-i for i in range(rows)], size=rows + padded,
        listed=table.pages_for(max(contexts) + STEPS), device=device,
    )  # fmt: skip
    return model, pool, batch, sampling_batch([Sampling()] * rows, size=rows + padded, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_decode_step_equals_the_reference(shape: Any, device: str, ops: functools.partial[Ops]) -> None:
    model, pool, batch, sampling = decoding(shape, device)
    rows = len(shape[6])
    held = {}
    for name, table in {"reference": REFERENCE, "kernels": ops(len(batch.lengths))}.items():
        own, carry, logits = clone(pool), clone(batch), []
        for _ in range(STEPS):
            own, scores = stages.decode(model.weights, own, carry, config=model.config, ops=table)
            tokens = stages.sample(scores, sampling, carry.lengths, ops=table)
            carry = stages.advance(carry, tokens, page_size=PAGE, ops=table)
            logits.append(scores[:rows])
        held[name] = (torch.stack(logits), own, carry)
    (expected, pool_a, batch_a), (got, pool_b, batch_b) = held["reference"], held["kernels"]
    assert error(got, expected) < 1e-5
    assert all(error(b[:, 1:], a[:, 1:]) < 1e-5 for a, b in zip(leaves(pool_a), leaves(pool_b), strict=True))
    for name in ("tokens", "positions", "slots", "lengths", "pages"):
        assert torch.equal(getattr(batch_a, name)[..., :rows], getattr(batch_b, name)[..., :rows]), name


@pytest.mark.parametrize(("shape", "like"), [(SHAPES[2], (1, 16, 8, 2**15)), (SHAPES[6], (8, 16, 8, 2**12))], ids=str)
def test_long_contexts_are_read_by_small_programs(
    shape: Any, like: tuple[int, ...], device: str, ops: functools.partial[Ops], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm.kernels import decode_plan

    long = decode_plan.split_for(*like)
    assert long.stages > 1
    monkeypatch.setattr(decode_plan, "split_for", lambda *_: long)
    model, pool, batch, _ = decoding(shape, device)
    rows = len(shape[6])
    expected, got = (
        stages.decode(model.weights, clone(pool), batch, config=model.config, ops=table)[1][:rows]
        for table in (REFERENCE, ops(len(batch.lengths)))
    )
    assert error(got, expected) < 1e-5


def test_a_padding_row_writes_to_the_sink_alone(device: str, ops: functools.partial[Ops]) -> None:
    model, pool, batch, sampling = decoding(SHAPES[4], device)
    pages = set(batch.pages[:3].flatten().tolist()) - {0}
    written = {int(slot) // PAGE for slot in batch.slots[:3]}
    before = clone(pool)
    table = ops(len(batch.lengths))
    pool, batch, _ = stages.step(model.weights, pool, batch, sampling, config=model.config, ops=table)
    changed = (pool.keys != before.keys).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert set(changed) <= written | {0}
    assert written <= pages
    assert int(batch.lengths[3]) == 0
    assert int(batch.slots[3]) == 0


def test_a_weight_that_is_laid_out_by_column_is_refused(device: str, ops: functools.partial[Ops]) -> None:
    x, norm = torch.ones(1, 32, device=device), torch.ones(32, device=device)
    with pytest.raises(mllm.errors.ShapeError, match="by rows"):
        ops(1).norm_linear(x, norm, torch.ones(32, 64, device=device).T, eps=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 2047, 2048, 4999])
def test_greedy_tokens_are_the_first_of_the_largest_and_broken_rows_say_so(
    value: float, place: int, device: str, ops: functools.partial[Ops]
) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(place)).to(device)
    logits[0, [700, 4100]] = 50.0
    logits[2, place] = value
    sampling = sampling_batch([Sampling()] * 3, size=3, device=device)
    tokens = ops(1).sample(logits, sampling, torch.ones(3, dtype=torch.int32, device=device)).tolist()
    assert tokens == [700, int(logits[1].argmax()), NOT_FINITE]


@pytest.mark.parametrize("position", [0, 1, 1000, 40_000, 262_143])
def test_rotary_tables_hold_at_long_positions(position: int, device: str, ops: functools.partial[Ops]) -> None:
    from mllm.kernels import rotary, step

    positions = torch.tensor([[position], [position // 2], [position // 3]], dtype=torch.int32, device=device)
    expected = rotary.mrope(positions, head_dim=128, theta=5e6, sections=(24, 20, 20))
    frequencies = rotary.frequencies(64, 5e6, positions.device)
    for got, want in zip(step.rotary(positions, frequencies, (24, 20, 20), pdl=False), expected, strict=True):
        assert float((got - want.squeeze(1)).abs().max()) < 2e-6


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("bounds", [[0, 70, 70, 101], [0, 64], [0, 70]], ids=str)
@pytest.mark.parametrize("size", [16, 40, 72, 112, 128])
def test_attention_takes_heads_of_any_size(
    size: int, bounds: list[int], boxed: bool, device: str, ops: functools.partial[Ops]
) -> None:
    from mllm.kernels import flash

    if boxed and not ops.keywords["pdl"] and device == "cuda":
        pytest.skip("tensor descriptors need capability 9.0")
    heads = 4
    generator = torch.Generator().manual_seed(size)
    q, k, v = torch.randn(3, bounds[-1], heads, size, generator=generator).to(device)
    indptr = torch.tensor(bounds, dtype=torch.int32, device=device)
    tile = flash.tile_for(bounds[-1], size, wide=False)
    got = flash.images(q * size**-0.5 * flash.LOG2E, k, v, indptr, tile=tile, boxed=boxed)
    for a, b in itertools.pairwise(bounds):
        assert a == b or error(got[a:b], attended(q[a:b], k[a:b], v[a:b])) < 1e-5


@pytest.mark.parametrize(
    ("rows", "free"),  # of each row its queries and its tokens; queries that pad the batch
    [([(64, 64)], 0), ([(150, 150)], 10), ([(100, 230)], 0), ([(1, 1)], 15), ([(70, 70), (5, 90), (33, 33)], 20)],
    ids=str,
)
def test_prompts_attend_to_what_is_before_them(
    rows: list[tuple[int, int]], free: int, device: str, ops: functools.partial[Ops]
) -> None:
    from mllm.kernels import flash

    tile = flash.tile_for(sum(n for n, _ in rows) + free, 40, wide=False)
    run = functools.partial(flash.prompts, tile=tile)
    assert prompt_error(run, rows, free, size=40, page=PAGE, dtype=torch.float32, device=device) < 1e-5


@pytest.mark.parametrize("shape", [(5, 96, 48), (130, 2048, 200), (256, 4096, 64), (3, 1088, 40)], ids=str)
def test_the_parts_of_a_product_add_up_to_it(shape: tuple[int, int, int], device: str) -> None:
    from mllm.kernels.norm import split_linear

    rows, inputs, outputs = shape
    y, weight = (torch.randn(n, inputs, generator=torch.Generator().manual_seed(n)) for n in (rows, outputs))
    parts = split_linear(y.to(device), weight.to(device))
    assert (len(parts) > 1) == (inputs >= 1024)
    assert error(parts.sum(0), y.to(device).double() @ weight.to(device).double().T) < 1e-5


@pytest.mark.parametrize("kind", ["stream", "parts", "parts and bias"])
def test_streams_are_merged_with_what_is_to_be_added_to_them(
    kind: str, device: str, ops: functools.partial[Ops], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, and all together, by products that are PyTorch's here: those of `tall` are compared in test_hopper."""
    from mllm.kernels import mergers
    from mllm.kernels.norm import Pending

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def linears(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, *, gelu: str = "", pdl: bool) -> Tensor:
        made = x @ weight.transpose(1, 2) + bias[:, None]
        return y.copy_(torch.nn.functional.gelu(made) if gelu else made)

    monkeypatch.setattr("mllm.kernels.tall.linears", linears)
    width, joined, out, count = 80, 320, 96, 3
    up, up_bias = noise(count, joined, joined) / 18, noise(count, joined)
    down, down_bias = noise(count, out, joined) / 18, noise(count, out)
    waiting, want = [], []
    for i in range(count):
        norm = joined if i else width
        merger = (TapMerger if i else Merger)(
            norm=noise(norm), norm_bias=noise(norm), up=up[i], up_bias=up_bias[i], down=down[i], down_bias=down_bias[i]
        )
        x, total = noise(24, width), torch.zeros((), device=device)
        stream: Any = x
        if kind != "stream":
            parts, bias = noise(2, 24, width), noise(width) if "bias" in kind else None
            stream, total = Pending(x, parts, bias), parts.sum(0) + (0 if bias is None else bias)
        waiting.append(mergers.Unmerged(stream, merger))
        want.append(reference_vision.merge(x + total, merger)[1])
        assert error(mergers.merged(stream, merger, pdl=False), want[-1]) < 1e-5
    assert error(mergers.features(waiting, pdl=False), torch.stack(want)) < 1e-5
    # one; one made before; not in the order of their weights
    for those, wanted in ((waiting[:1], want[:1]), ([waiting[0], want[1]], want[:2]), (waiting[::-1], want[::-1])):
        assert error(mergers.features(those, pdl=False), torch.stack(wanted)) < 1e-5


def test_streams_of_different_forms_are_merged_one_by_one(device: str, ops: functools.partial[Ops]) -> None:
    from mllm.kernels import mergers
    from mllm.kernels.norm import Pending

    generator = torch.Generator().manual_seed(0)
    up, up_bias, down, down_bias, norm = (
        torch.randn(*n, generator=generator).to(device) / 8
        for n in ((2, 64, 64), (2, 64), (2, 32, 64), (2, 32), (4, 64))
    )
    x = torch.randn(12, 16, generator=generator).to(device)
    weights = [
        TapMerger(
            norm=norm[i], norm_bias=norm[2 + i], up=up[i], up_bias=up_bias[i], down=down[i], down_bias=down_bias[i]
        )
        for i in range(2)
    ]
    streams = x, Pending(x, x[None], None)
    got = mergers.features([mergers.Unmerged(s, w) for s, w in zip(streams, weights, strict=True)], pdl=False)
    want = [reference_vision.merge(s, w)[1] for s, w in zip((x, 2 * x), weights, strict=True)]
    assert error(got, torch.stack(want)) < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replayed_steps_equal_eager_ones_bit_for_bit(shape: Any, device: str, ops: functools.partial[Ops]) -> None:
    model, pool, batch, sampling = decoding(shape, device)
    one = functools.partial(stages.step, model.weights, config=model.config, ops=ops(len(batch.lengths)))
    captured = mllm.capture(one, donate=("pool",), carry=("batch",))
    eager_pool, eager_batch, own_batch = clone(pool), clone(batch), clone(batch)
    for _ in range(STEPS):
        pool, own_batch, tokens = captured(pool, own_batch, sampling)
        eager_pool, eager_batch, expected = one(eager_pool, eager_batch, sampling)
        assert torch.equal(tokens, expected)
    assert all(torch.equal(a, b) for a, b in zip(leaves(pool), leaves(eager_pool), strict=True))


@pytest.mark.cuda
def test_generate_on_the_gpu_gives_the_tokens_of_the_cpu(device: str) -> None:
    config = mllm.Config(
        text=mllm.TextConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
            head_dim=32, vocab_size=500, max_position_embeddings=4096, rope_theta=1e4, mrope_section=(16, 0, 0),
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    cpu = mllm.dummy(config, dtype="float32")
    weights = map_leaves(lambda t: t.contiguous().to(device), cpu.weights)
    gpu = attrs.evolve(mllm.dummy(config, device=device, dtype="float32"), weights=weights, name="gpu")
    prompts = [mllm.Prompt(tokens=[(7 * i + j) % 500 for j in range(3 + 40 * i)]) for i in range(5)]
    for rows in (1, 5):
        expected = mllm.generate(cpu, prompts, max_new_tokens=40, max_running_requests=rows)
        assert [c.tokens for c in mllm.generate(gpu, prompts, max_new_tokens=40, max_running_requests=rows)] == [
            c.tokens for c in expected
        ]
