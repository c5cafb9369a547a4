"""Each op against what it means: a closed form in float64, or the module of transformers that it replaces.

A table of ops joins by one line in `TABLES`; every case then runs on it, on the device of the table.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import Tiny, assert_close, config_of, examples
from torch import Tensor
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

from mllm import weights
from mllm.batch import Chunk, ForwardBatch, PatchBatch, pack
from mllm.config import TextConfig, VisionConfig
from mllm.errors import MissingPackageError
from mllm.kernels.cpu import CPU
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE
from mllm.kernels.reference_vision import position_embedding
from mllm.kernels.rotary import axial, mrope, rotate, rotate_pairs
from mllm.kernels.tables import tables_for
from mllm.sampling import Sampling, sampling_batch
from mllm.stages import admit, commit
from mllm.state import map_leaves
from mllm.table import RequestTable

TABLES: dict[str, tuple[Ops, str]] = {  # name -> the table, the kind of device it runs on
    "reference": (REFERENCE, "cpu"),
    "cpu": (CPU, "cpu"),
    "reference-cuda": (REFERENCE, "cuda"),
}
if importlib.util.find_spec("triton"):
    from mllm.kernels.cuda_prompts import prompt_ops
    from mllm.kernels.cuda_vision import vision_ops

    few, many = prompt_ops(16, wide=False), prompt_ops(2**31, wide=False)
    TABLES |= {
        "few-rows": (vision_ops(few, captured=True, wide=False), "triton"),
        "many-rows": (vision_ops(many, captured=False, wide=False), "triton"),
    }
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
EPS = 1e-5


@frozen(eq=False, kw_only=True)
class Case:
    """One op on one set of arguments. `want` computes in float64 from the same arguments."""

    op: str
    make: Callable[[torch.Generator], tuple[list[Any], dict[str, Any]]]
    want: Callable[..., Tensor]
    name: str = ""


def randn(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=g) * scale


def affine(g: torch.Generator, width: int, out: int) -> list[Tensor]:
    """Weight and bias of a projection after a layer norm."""
    return [randn(g, out, width, scale=0.2), randn(g, out)]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def silu_gate(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    gate, up = (rms(x, norm, eps) @ weight.T).chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def merged(x: Tensor, w: weights.Merger | weights.TapMerger) -> Tensor:
    joined = w.up.shape[1]
    if len(w.norm) == joined:
        x = layer_norm(x.reshape(-1, joined), w.norm, w.norm_bias)
    else:
        x = layer_norm(x, w.norm, w.norm_bias).reshape(-1, joined)
    return gelu_erf(x @ w.up.T + w.up_bias) @ w.down.T + w.down_bias


def random_of(cls: Any, sizes: dict[str, int], g: torch.Generator) -> Any:
    fields = [f for f in attrs.fields(cls) if "dims" in f.metadata]
    return cls(**{f.name: randn(g, *(sizes[d] for d in f.metadata["dims"]), scale=0.3) for f in fields})


TEXT = TextConfig(
    hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
    vocab_size=50, max_position_embeddings=99, rope_theta=100.0, mrope_section=(1, 2, 1),
)  # fmt: skip
VISION = VisionConfig(
    depth=1, hidden_size=24, intermediate_size=20, num_heads=3, out_hidden_size=24, num_position_embeddings=16,
    deepstack_visual_indexes=(), patch_size=3, spatial_merge_size=2, temporal_patch_size=2,
)  # fmt: skip
PAGE = 4


def token_batch(cached: Sequence[int], counts: Sequence[int], g: torch.Generator) -> tuple[ForwardBatch, int]:
    """Rows with `cached[i]` tokens in the pool and `counts[i]` to run, and the pages of the pool."""
    totals = [a + b for a, b in zip(cached, counts, strict=True)]
    pages = sum(-(-n // PAGE) for n in totals) + 2
    table = RequestTable.empty(rows=len(totals), pages=pages, page_size=PAGE)
    table, rows = admit(table, totals)
    table = commit(table, rows, cached)
    chunks = [
        Chunk(row=row, tokens=torch.randint(0, 50, (n,), generator=g, dtype=torch.int32),
              positions=torch.randint(0, 60, (3, n), generator=g, dtype=torch.int32))
        for row, n in zip(rows, counts, strict=True)
    ]  # fmt: skip
    return pack(table, chunks, device="cpu"), pages + 1


def turn(x: Tensor, positions: Tensor, config: TextConfig) -> Tensor:
    """Rotary embedding as a product of complex numbers: x [T heads D] in float64, positions [3 T]."""
    half = config.head_dim // 2
    axes = [0] * half
    for axis in (1, 2):
        for pair in range(axis, min(3 * config.mrope_section[axis], half), 3):
            axes[pair] = axis
    angle = torch.stack([positions[axes[i]].double() * config.rope_theta ** (-i / half) for i in range(half)], -1)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    return torch.cat([z.real, z.imag], -1)


def attention(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, batch: ForwardBatch, keys: Tensor, values: Tensor) -> Tensor:
    """Token by token, head by head, over the context that the page table spells out."""
    c = TEXT
    q, k, v = qkv.reshape(len(qkv), -1, c.head_dim).split((c.num_attention_heads,) + (c.num_key_value_heads,) * 2, 1)
    q, k = (turn(rms(x, n, EPS), batch.positions, c) for x, n in ((q, q_norm), (k, k_norm)))
    keys, values = keys.clone().flatten(0, 1), values.clone().flatten(0, 1)
    keys[batch.slots], values[batch.slots] = k, v
    out = torch.zeros_like(q)
    group = c.num_attention_heads // c.num_key_value_heads
    for row, (a, b) in enumerate(zip(batch.q_indptr[:-1].tolist(), batch.q_indptr[1:].tolist(), strict=True)):
        length = int(batch.lengths[row])
        context = [int(batch.pages[row, i // PAGE]) * PAGE + i % PAGE for i in range(length)]
        for t in range(a, b):
            seen = context[: length - (b - 1 - t)]
            for head in range(c.num_attention_heads):
                scores = keys[seen, head // group] @ q[t, head] / math.sqrt(c.head_dim)
                out[t, head] = scores.softmax(0) @ values[seen, head // group]
    return out.flatten(1)


def attend_case(name: str, cached: Sequence[int], counts: Sequence[int]) -> Case:
    def make(g: torch.Generator) -> tuple[list[Any], dict[str, Any]]:
        batch, pages = token_batch(cached, counts, g)
        pool = (pages, PAGE, TEXT.num_key_value_heads, TEXT.head_dim)
        norms = [1 + randn(g, TEXT.head_dim, scale=0.2) for _ in range(2)]
        return [randn(g, sum(counts), TEXT.sizes["C"]), *norms, batch, randn(g, *pool), randn(g, *pool)], {}

    return Case(op="attend_", make=make, want=attention, name=name)


def patch_batch(grids: Sequence[tuple[int, int]], g: torch.Generator) -> PatchBatch:
    coords = [torch.tensor([(r, c, *grid) for r in range(grid[0]) for c in range(grid[1])]).T for grid in grids]
    bounds = torch.tensor([0, *(rows * cols for rows, cols in grids)]).cumsum(0)
    return PatchBatch(
        patches=torch.randint(0, 256, (int(bounds[-1]), VISION.sizes["U"]), generator=g, dtype=torch.uint8),
        coords=torch.cat(coords, 1).int(), indptr=bounds.int(), at=torch.zeros(0, dtype=torch.int64),
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.5, 1.0),
    )  # fmt: skip


def grid_value(table: Tensor, row: float, col: float) -> Tensor:
    """Bilinear between the four neighbours of (row, col) in the square table."""
    side = math.isqrt(len(table))
    r, c = min(int(row), side - 1), min(int(col), side - 1)
    a, b = row - r, col - c
    down, right = min(r + 1, side - 1), min(c + 1, side - 1)
    corners = ((1 - a) * (1 - b), r, c), ((1 - a) * b, r, right), (a * (1 - b), down, c), (a * b, down, right)
    return sum((w * table[i * side + j] for w, i, j in corners), torch.zeros_like(table[0]))


def embedded(batch: PatchBatch, w: Any) -> Tensor:
    x = batch.patches.double().view(-1, 3, VISION.patch_size**2) / 255
    x = (x - torch.tensor(batch.mean).double().view(-1, 1)) / torch.tensor(batch.std).double().view(-1, 1)
    x = x.flatten(1) @ w.patch.T + w.patch_bias
    side = math.isqrt(len(w.position))
    places = [
        [at * (side - 1) / max(count - 1, 1) for at, count in ((row, rows), (col, cols))]
        for row, col, rows, cols in batch.coords.T.tolist()
    ]
    return x + torch.stack([grid_value(w.position, row, col) for row, col in places])


def image_attention(qkv: Tensor, batch: PatchBatch) -> Tensor:
    size = VISION.head_dim
    q, k, v = qkv.view(len(qkv), 3, VISION.num_heads, size).unbind(1)
    angle = torch.cat([batch.coords[axis].double().unsqueeze(1) * torch.tensor(
        [VISION.rope_theta ** (-i / (size // 4)) for i in range(size // 4)]).double() for axis in (0, 1)], 1)  # fmt: skip
    spin = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    q, k = (torch.complex(x[..., ::2], x[..., 1::2]) * spin for x in (q, k))  # neighbours are a pair
    out = torch.zeros_like(v)
    for a, b in zip(batch.indptr[:-1].tolist(), batch.indptr[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b].conj()).real / math.sqrt(size)
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b])
    return out.flatten(1)


def vision_weights(g: torch.Generator) -> Any:
    sizes = {**VISION.sizes, "E": 24}
    return weights.VisionWeights(
        patch=randn(g, sizes["Ev"], sizes["U"], scale=0.2), patch_bias=randn(g, sizes["Ev"]),
        position=randn(g, sizes["W"], sizes["Ev"]), blocks=(), merger=random_of(weights.Merger, sizes, g), taps=(),
    )  # fmt: skip


MERGE = {"Ev": 6, "Mv": 24, "E": 10}
CASES = [
    Case(op="embed", make=lambda g: ([torch.tensor([3, 0, 49, 3], dtype=torch.int32), randn(g, 50, 7)], {}),
         want=lambda tokens, table: table[tokens.long()]),
    Case(op="norm_linear", make=lambda g: ([randn(g, 5, 24), 1 + randn(g, 24), randn(g, 17, 24, scale=0.2)], {"eps": EPS}),
         want=lambda x, norm, weight, eps: rms(x, norm, eps) @ weight.T),
    Case(op="norm_linear", name="of one token that is nearly zero",
         make=lambda g: ([randn(g, 1, 24, scale=1e-4), 1 + randn(g, 24), randn(g, 17, 24)], {"eps": EPS}),
         want=lambda x, norm, weight, eps: rms(x, norm, eps) @ weight.T),
    Case(op="linear_add", make=lambda g: ([randn(g, 5, 60), randn(g, 24, 60, scale=0.1), randn(g, 5, 24)], {}),
         want=lambda y, weight, x: x + y @ weight.T),
    Case(op="norm_gate", make=lambda g: ([randn(g, 5, 24), 1 + randn(g, 24), randn(g, 40, 24, scale=0.5)], {"eps": EPS}),
         want=silu_gate),
    Case(op="head",
         make=lambda g: ([randn(g, 3, 24), torch.tensor([2, 0]), 1 + randn(g, 24), randn(g, 50, 24)], {"eps": EPS}),
         want=lambda x, last, norm, weight, eps: rms(x[last], norm, eps) @ weight.T),
    Case(op="put_", make=lambda g: ([randn(g, 6, 4), torch.tensor([4, 1]), randn(g, 2, 4)], {}),
         want=lambda x, at, rows: torch.stack([x[0], rows[1], x[2], x[3], rows[0], x[5]])),
    Case(op="add_", make=lambda g: ([randn(g, 6, 4), torch.tensor([4, 1]), randn(g, 2, 4)], {}),
         want=lambda x, at, rows: torch.stack([x[0], x[1] + rows[1], x[2], x[3], x[4] + rows[0], x[5]])),
    attend_case("of whole prompts", [0, 0, 0], [7, 1, 4]),
    attend_case("of chunks on cached tokens", [5, 0, 9], [3, 6, 2]),
    attend_case("of one token of many rows", [5, 0, 9, 3], [1, 1, 1, 1]),
    attend_case("of one prompt", [0], [9]),
    attend_case("of one token", [8], [1]),
    attend_case("of prompts of one token and more", [0, 3], [1, 2]),
    Case(op="put_", name="with padding", make=lambda g: ([randn(g, 3, 4), torch.tensor([2, -1]), randn(g, 2, 4)], {}),
         want=lambda x, at, rows: torch.stack([x[0], x[1], rows[0]])),
    Case(op="add_", name="with padding", make=lambda g: ([randn(g, 3, 4), torch.tensor([-1, 0]), randn(g, 2, 4)], {}),
         want=lambda x, at, rows: torch.stack([x[0] + rows[1], x[1], x[2]])),
    Case(op="resize", make=lambda g: ([torch.randint(0, 256, (5, 7, 3), generator=g, dtype=torch.uint8), 6, 4], {}),
         want=lambda pixels, height, width: torch.from_numpy(np.array(
             Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC)))),
    Case(op="cut", make=lambda g: ([torch.randint(0, 256, (12, 18, 3), generator=g, dtype=torch.uint8)],
                                   {"patch": 3, "merge": 2}),
         want=lambda pixels, patch, merge: torch.stack([
             pixels[3 * r : 3 * r + 3, 3 * c : 3 * c + 3].permute(2, 0, 1).flatten()
             for r0 in (0, 2) for c0 in (0, 2, 4) for r in (r0, r0 + 1) for c in (c0, c0 + 1)])),
    Case(op="patch_embed",
         make=lambda g: ([patch_batch([(4, 6), (2, 2), (10, 2)], g), vision_weights(g)], {"config": VISION}),
         want=lambda batch, w, config: embedded(batch, w)),
    Case(op="attend_images", make=lambda g: ([randn(g, 32, 72), patch_batch([(4, 6), (2, 4)], g)], {}),
         want=image_attention),
    Case(op="layer_norm_linear",
         make=lambda g: ([randn(g, 5, 24) + 3, *affine(g, 24, 17)], {}),
         want=lambda x, weight, bias: layer_norm(x) @ weight.T + bias),
    Case(op="layer_norm_gelu",
         make=lambda g: ([randn(g, 5, 24), *affine(g, 24, 17)], {}),
         want=lambda x, weight, bias: gelu_tanh(layer_norm(x) @ weight.T + bias)),
    Case(op="linear_bias_add",
         make=lambda g: ([randn(g, 5, 20), randn(g, 24, 20, scale=0.2), randn(g, 24), randn(g, 5, 24)], {}),
         want=lambda y, weight, bias, x: x + y @ weight.T + bias),
    Case(op="merge", name="of patches normalised one by one",
         make=lambda g: ([randn(g, 12, 6), random_of(weights.Merger, MERGE, g)], {}), want=merged),
    Case(op="merge", name="of patches normalised together",
         make=lambda g: ([randn(g, 12, 6), random_of(weights.TapMerger, MERGE, g)], {}), want=merged),
    Case(op="features", make=lambda g: ([[randn(g, 3, 24), randn(g, 3, 24)]], {}), want=torch.stack),
]  # fmt: skip


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> tuple[Ops, str]:
    ops, kind = TABLES[request.param]
    chosen = request.config.getoption("--device")
    if kind == "cuda" and (chosen == "cpu" or not torch.cuda.is_available()):
        pytest.skip("needs a GPU: run with --device cuda")
    if kind == "cpu" and chosen == "cuda":
        pytest.skip("a table of the CPU: run with --device cpu or all")
    if kind == "triton" and (chosen == "cpu" or not torch.cuda.is_available()):
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("without a GPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
        return ops, "cpu"
    return ops, "cuda" if kind == "triton" else kind


def call(ops: Ops, case: Case, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """The op on its arguments; a batch in the place of a plan becomes the table's own plan of it."""
    if case.op == "attend_":
        plan = ops.plan(args[3], config=TEXT, page_size=PAGE, dtype=args[0].dtype)
        return ops.attend_(args[0], args[1], args[2], plan, args[4], args[5], eps=EPS)
    if case.op == "attend_images":
        return ops.attend_images(args[0], ops.vision_plan(args[1], config=VISION))
    out = getattr(ops, case.op)(*args, **kwargs)
    if hasattr(out, "parts"):  # a residual stream to which something is still to be added
        shift = 0.0 if out.bias is None else out.bias
        return out.x + (out.parts.sum(0) + shift).to(out.x.dtype)  # type: ignore[no-any-return]
    return out[1] if isinstance(out, tuple) else out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.name}".strip())
def test_an_op_computes_its_definition(table: tuple[Ops, str], case: Case, dtype: torch.dtype) -> None:
    ops, device = table
    if device == "cpu" and ops not in (REFERENCE, CPU):
        if dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
        if case.op == "layer_norm_gelu":
            pytest.skip("the epilogue that it needs is another function on a CPU")
    args, kwargs = case.make(torch.Generator().manual_seed(len(case.name)))
    args = map_leaves(lambda t: t.to(dtype) if t.is_floating_point() else t, args)
    exact = map_leaves(lambda t: t.double() if t.is_floating_point() else t.clone(), args)
    want = case.want(*exact, **kwargs)
    got = call(ops, case, map_leaves(lambda t: t.to(device).clone(), args), kwargs)
    assert got.dtype == {"head": torch.float32, "cut": torch.uint8, "resize": torch.uint8}.get(case.op, dtype)
    rough = case.op == "layer_norm_gelu" and device == "cuda"  # the tanh of an epilogue of cuBLAS
    assert_close(got.reshape(want.shape), want, max(TOLERANCE[dtype], 6e-6 if rough else 0), case.op)


def test_every_op_of_the_table_has_a_case() -> None:
    # by way of attention, twice; in test_persistent; in test_sampling; below
    elsewhere = {"plan", "vision_plan", "whole_", "sample", "advance_"}
    assert {case.op for case in CASES} | elsewhere == {f.name for f in attrs.fields(Ops)}


def test_a_device_without_a_table_is_an_error_that_lists_those_with_one() -> None:
    assert tables_for("cpu", torch.bfloat16).ops is CPU
    with pytest.raises(MissingPackageError, match=r"meta.*cpu"):
        tables_for("meta", torch.float32)


# rotary tables against transformers


@examples(60)
@given(half=st.integers(1, 40), data=st.data(), theta=st.sampled_from([10.0, 1e4, 5e6]))
def test_mrope_equals_transformers(half: int, data: st.DataObject, theta: float) -> None:
    sections = data.draw(st.tuples(*[st.integers(0, half)] * 3))
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections), "mrope_interleaved": True}
    config = config_of({"head_dim": 2 * half, "rope_parameters": rope}, True).text_config
    positions = torch.randint(0, 3000, (3, 1, 9), generator=torch.Generator().manual_seed(half))
    cos, sin = hf.Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = mrope(positions[:, 0].int(), head_dim=2 * half, theta=theta, sections=sections)
    for got, want in zip(ours, (cos, sin), strict=True):
        assert_close(torch.cat([got, got], -1).squeeze(1), want[0], 1e-6)


def test_mrope_of_equal_positions_is_ordinary_rotary_embedding() -> None:
    where = torch.arange(20, dtype=torch.int32).expand(3, -1)
    plain = mrope(where, head_dim=12, theta=50.0, sections=(6, 0, 0))
    for sections in ((2, 2, 2), (0, 3, 1), (1, 1, 4)):
        for got, want in zip(mrope(where, head_dim=12, theta=50.0, sections=sections), plain, strict=True):
            assert torch.equal(got, want)


def test_rotation_keeps_lengths_and_depends_on_differences_of_positions() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = randn(g, 1, 2, 16), randn(g, 1, 2, 16)

    def score(a: int, b: int) -> Tensor:
        tables = [mrope(torch.full((3, 1), p), head_dim=16, theta=1e4, sections=(3, 3, 2)) for p in (a, b)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum(-1)

    assert_close(score(7, 3), score(104, 100), 1e-4)
    turned = rotate(q, *mrope(torch.full((3, 1), 5), head_dim=16, theta=1e4, sections=(3, 3, 2)))
    assert_close(turned.norm(dim=-1), q.norm(dim=-1), 1e-6)


def test_axial_turns_half_of_the_pairs_with_the_row_and_half_with_the_column() -> None:
    cos, _ = axial(torch.tensor([[3], [5]]), head_dim=16, theta=100.0)
    angles = [at * 100.0 ** (-i / 4) for at in (3, 5) for i in range(4)]
    assert_close(cos.flatten(), torch.tensor(angles).double().cos(), 1e-6)


def test_pairs_of_an_encoder_give_the_scores_of_halves() -> None:
    g = torch.Generator().manual_seed(0)
    heads, size = 3, 8
    x, weight = randn(g, 5, 16), randn(g, 3 * heads * size, 16)
    cos, sin = axial(torch.tensor([[3, 1, 0, 2, 9], [5, 0, 7, 1, 2]]), head_dim=size, theta=100.0)

    def scores(weight: Tensor, turn: Callable[..., Tensor]) -> Tensor:
        q, k, _ = (x @ weight.T).view(5, 3, heads, size).unbind(1)
        return torch.einsum("qhd,khd->hqk", turn(q, cos, sin), turn(k, cos, sin))

    assert_close(scores(weights.paired(weight, heads), rotate_pairs), scores(weight, rotate), 1e-6)
    assert torch.equal(weights.paired(weight, heads)[2 * heads * size :], weight[2 * heads * size :])  # values


def test_a_product_holds_the_layer_norm_before_it_and_takes_the_mean_off() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias, norm, norm_bias = (randn(g, *n).double() for n in ((5, 24), (7, 24), (7,), (24,), (24,)))
    want = layer_norm(x + 2, norm, norm_bias) @ weight.T + bias
    after = weights.weight_after_norm(weight, norm, dtype=torch.float64)
    bias_after = weights.bias_after_norm(bias, weight, norm_bias)
    assert_close(layer_norm(x + 2) @ after.T + bias_after, want, 1e-12)
    deviation = (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    assert_close((x + 2) @ after.T / deviation + bias_after, want, 1e-12)


@pytest.mark.parametrize("mean", [0, 3, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_of_16_bits_takes_off_a_mean_of_many_deviations(dtype: torch.dtype, mean: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, norm = randn(g, 64, 512), randn(g, 96, 512, scale=0.05), 1 + randn(g, 512, scale=0.2)
    want = layer_norm(x.double(), norm.double()) @ weight.double().T
    after = weights.weight_after_norm(weight, norm, dtype=dtype)
    deviation = (x.double().var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    assert_close((x.double() + mean) @ after.double().T / deviation, want, torch.finfo(dtype).eps)


# the position grid


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2), (4, 10), (6, 1), (30, 14)])
def test_a_linear_position_grid_stretches_linearly_over_any_image(rows: int, cols: int) -> None:
    side = 6
    r, c = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    table = torch.stack([r, c, 2.0 * r - c], -1).flatten(0, 1).float()
    coords = torch.tensor([(a, b, rows, cols) for a in range(rows) for b in range(cols)]).T
    got = position_embedding(coords, table)
    at = [[x / max(n - 1, 1) * (side - 1) for x, n in ((a, rows), (b, cols))] for a, b, _, _ in coords.T.tolist()]
    want = torch.tensor([(a, b, 2 * a - b) for a, b in at])
    assert float((got - want).abs().max()) < 1e-5
    assert got[0].tolist() == [0, 0, 0]
    if min(rows, cols) > 1:
        assert got[-1].tolist() == [side - 1, side - 1, side - 1]


def test_an_image_of_the_size_of_the_grid_takes_it_as_it_is() -> None:
    table = torch.randn(25, 3, generator=torch.Generator().manual_seed(0))
    coords = torch.tensor([(a, b, 5, 5) for a in range(5) for b in range(5)]).T
    assert_close(position_embedding(coords, table), table, 1e-6)


def test_the_encoder_equals_that_of_transformers_feature_by_feature(vision_model: Tiny) -> None:
    from running import start
    from tiny import expanded, four_prompts, their_inputs

    prompt = four_prompts(vision_model)[2]
    ours = start(vision_model.ours, [prompt]).features[0]
    inputs = their_inputs(vision_model, expanded(vision_model, prompt), prompt.images)
    with torch.no_grad():
        out = vision_model.theirs.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    merged_features, deep = (out[0], out[1]) if isinstance(out, tuple) else (out.pooler_output, out.deepstack_features)
    assert_close(ours.embed, merged_features, 1e-5)
    assert len(deep) == len(ours.deep) == 2
    for got, want in zip(ours.deep, deep, strict=True):
        assert_close(got, want, 1e-5)


# the carry of decode


def test_advance_moves_each_row_by_one_and_leaves_padding_rows() -> None:
    g = torch.Generator().manual_seed(0)
    batch, _ = token_batch([2, 3, 7], [1, 1, 1], g)
    padded = ForwardBatch(
        tokens=torch.cat([batch.tokens, torch.zeros(1, dtype=torch.int32)]),
        positions=torch.cat([batch.positions, torch.zeros(3, 1, dtype=torch.int32)], 1),
        slots=torch.cat([batch.slots, torch.zeros(1, dtype=torch.int64)]),
        pages=torch.cat([torch.cat([batch.pages, batch.pages[:, :1] + 1], 1), torch.zeros(1, 3, dtype=torch.int32)]),
        lengths=torch.cat([batch.lengths, torch.zeros(1, dtype=torch.int32)]),
        q_indptr=torch.arange(5, dtype=torch.int32), last=torch.arange(4),
    )  # fmt: skip
    before = map_leaves(Tensor.clone, padded)
    REFERENCE.advance_(padded, torch.tensor([5, -1, 7, 9], dtype=torch.int32), page_size=PAGE)
    assert padded.tokens[:3].tolist() == [5, 0, 7]  # a row that failed goes on with some token
    assert padded.lengths.tolist() == [4, 5, 9, 0]
    assert torch.equal(padded.positions[:, :3], before.positions[:, :3] + 1)
    assert torch.equal(padded.positions[:, 3], before.positions[:, 3])
    pages = padded.pages
    assert padded.slots.tolist() == [
        int(pages[0, 0]) * PAGE + 3, int(pages[1, 1]) * PAGE, int(pages[2, 2]) * PAGE, 0,
    ]  # fmt: skip
    for name in ("pages", "q_indptr", "last"):
        assert torch.equal(getattr(padded, name), getattr(before, name))


def test_ops_can_be_mixed_by_evolving_a_table() -> None:
    zero = torch.zeros(1)
    other = attrs.evolve(REFERENCE, head=lambda *args, **kwargs: zero)
    assert (other.head(), other.norm_linear) == (zero, REFERENCE.norm_linear)


def test_sample_of_one_row_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    settings = sampling_batch([Sampling()], size=1, device="cpu")
    assert REFERENCE.sample(logits, settings, torch.ones(1, dtype=torch.int32)).tolist() == [1]
