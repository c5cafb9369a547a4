"""Products with a few rows, up to 128: y = x @ w.T on the tensor cores, where reading the weight is most of the time.

The weight's rows are the tall side of the tile (64 or 128 of them), the batch is the narrow one. A product with few
outputs is split over its inputs, so that enough programs read; the parts are added up by the norm that follows
(`kernels/norm.py`), which has to read the residual stream anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.errors import ShapeError
from mllm.kernels.pdl import launch_dependents, options, prefetch, wait


class Tile(NamedTuple):
    """Outputs of a program, inputs at a time, parts that the inputs are split into, warps, tiles in flight."""

    outputs: int
    inputs: int
    parts: int
    warps: int
    stages: int


@triton.jit
def _tile(rows, live, at, K: tl.constexpr, EVEN: tl.constexpr, POLICY: tl.constexpr):
    """Columns `at` of the rows that begin at `rows` [n 1]; zeros where not `live`, or beyond K."""
    if not EVEN:
        live &= (at < K)[None, :]
    return tl.load(rows + at[None, :], mask=live, other=0.0, eviction_policy=POLICY)


@triton.jit
def skinny_kernel(x, w, y, B, N, K: tl.constexpr, KS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  BP: tl.constexpr, GATE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y [parts B N] from x [B K] and w [N K], part s from inputs s*KS to (s + 1)*KS.

    GATE: w [2N K] holds gate over up, y is silu(gate) * up, and a program takes BN/2 of each.
    """
    part = tl.program_id(1)
    launch_dependents(PDL)
    OUT: tl.constexpr = BN // 2 if GATE else BN
    EVEN: tl.constexpr = K % KS == 0 and KS % BK == 0
    first = tl.program_id(0) * OUT
    n = tl.arange(0, BN)
    inside = first + n % OUT < N
    n = first + n % OUT + n // OUT * N
    k = tl.arange(0, BK)
    b = tl.arange(0, BP)
    rows = tl.where(inside, n, 0).to(tl.int64)[:, None] * K
    acc = tl.zeros([BN, BP], tl.float32)
    if PDL and EVEN:  # one tile and no more: all that is asked for early makes the kernel before it wait
        LINE: tl.constexpr = 128 // (w.dtype.element_ty.primitive_bitwidth // 8)
        prefetch(w + rows + part * KS + tl.arange(0, BK // LINE)[None, :] * LINE)
    wait(PDL)
    for start in tl.range(part * KS, part * KS + KS, BK, num_stages=STAGES):
        at = start + k
        a = _tile(w + rows, inside[:, None], at, K, EVEN, "evict_first")
        v = _tile(x + b[:, None] * K, (b < B)[:, None], at, K, EVEN, "")
        acc = tl.dot(a, tl.trans(v), acc, input_precision="ieee")
    out = tl.trans(acc)  # [BP BN]
    if GATE:
        gate, up = tl.split(tl.permute(tl.reshape(out, [BP, 2, OUT]), [0, 2, 1]))
        out = gate * tl.sigmoid(gate) * up
    o = first + tl.arange(0, OUT)
    mask = (b < B)[:, None] & (o < N)[None, :]
    tl.store(y + (part * B + b)[:, None] * N + o[None, :], out.to(y.dtype.element_ty), mask=mask)


def tile_for(rows: int, outputs: int, *, gate: bool, wide: bool) -> Tile:
    """What was fastest in a whole step on an H200, at the shapes of the 2B and 8B models; the record is in
    `docs/performance.md`.

    Fewer rows want more tiles in flight. Some hundred programs fill the chip, so a product with fewer tiles of outputs
    than that is split over its inputs. Without `wide`, all fit the 163 KB of shared memory of an Orin's block.
    """
    if gate or outputs > 2**16:
        return Tile(64, 128, 1, 4, 4) if rows <= 32 else Tile(128, 64, 1, 4, 5)
    parts = max(1, min(8, 128 // triton.cdiv(outputs, 64)))
    return Tile(64, 128, parts, 4, 6 if rows <= 32 else 5 if rows <= 64 else 4 if wide else 3)


def linear(
    x: Tensor, w: Tensor, *, gate: bool = False, parts: bool = False, pdl: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """x [B K] @ w [N K].T: [B N], or with `parts` f32 [parts B N] whose sum it is. `gate`: silu(gate) * up, [B N/2]."""
    if not w.is_contiguous():  # as a CPU may have it; read by rows it would give numbers, all wrong
        raise ShapeError(f"linear: expected a weight laid out by rows, got strides {w.stride()} for {list(w.shape)}")
    rows, inputs = x.shape
    outputs = len(w) // 2 if gate else len(w)
    tile = tile_for(rows, outputs, gate=gate, wide=pdl)
    stages = tile.stages * 2 // w.element_size()  # the tiles are measured for 16 bits; float32 takes twice the room
    count = tile.parts if parts else 1
    each = triton.cdiv(triton.cdiv(inputs, count), tile.inputs) * tile.inputs
    count = triton.cdiv(inputs, each)
    shape = (count, rows, outputs) if parts else (rows, outputs)
    y = torch.empty(shape, dtype=torch.float32 if parts else dtype or x.dtype, device=x.device)
    skinny_kernel[(triton.cdiv(outputs, tile.outputs // 2 if gate else tile.outputs), count)](
        x, w, y, rows, outputs, K=inputs, KS=each, BN=tile.outputs, BK=tile.inputs,
        BP=max(16, triton.next_power_of_2(rows)), GATE=gate, STAGES=stages, num_warps=tile.warps, **options(pdl),
    )  # fmt: skip
    return y
