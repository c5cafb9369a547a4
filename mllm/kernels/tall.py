"""Products of some hundred rows on Hopper (capability 9.0), which go on with what cuBLAS leaves to a kernel after it.

In a chain with programmatic dependent launch, which cuBLAS would break, weights are on their way before the kernel waits for
the one ahead of it (`kernels/tall_kernel.py`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mllm.kernels.hopper import MULTIPROCESSORS, descriptor
from mllm.kernels.pdl import options
from mllm.kernels.room import empty_rows
from mllm.kernels.tall_kernel import tall_kernel
from mllm.kernels.tall_tiles import HEAD, Tile, tile_for

INPUTS = 64
"""Of a tile: 128 bytes, the widest that descriptors copy."""


class Unnormed(NamedTuple):
    """What is yet to be normalised, by a product of it: of each row of a stream sums of squares f32 [n M], which are its own
    together. For RMSNorm x [M K] is the stream times the norm's weight; for layer norm, which needs `sums` of the numbers as
    well, the stream itself, and weights are those of `weights.weight_after_norm`."""

    x: Tensor
    squares: Tensor
    eps: float
    sums: Tensor | None = None


def _launch(
    x: Tensor | Unnormed, weight: Tensor, y: Tensor, epilogue: str, operands: tuple[Any, ...] = (), *, tile: Tile, pdl: bool,
    apart: bool = False, size: int = 0,
) -> Tensor:  # fmt: skip
    """`y`, filled. `apart`: x [n M K], weight [n N K] and y [n M N] are of n products, as many as the tile has parts;
    `size`: of heads to be turned."""
    norm: tuple[Any, ...] = ()
    measures = 0
    if isinstance(x, Unnormed):
        x, squares, eps, sums = x
        norm = (squares, len(squares), eps) if sums is None else (squares, len(squares), eps, sums)
        measures = max(2, triton.next_power_of_2(len(squares)))
    rows, inputs = x.shape[-2:]
    outputs = weight.shape[-2] // 2 if epilogue == "gate" else weight.shape[-2]
    between = x.stride(0) // inputs if apart else 0
    if apart:
        x, weight = x.as_strided((len(x) * between, inputs), (inputs, 1)), weight.flatten(0, 1)
    pieces = [descriptor(weight, n, INPUTS) for n in tile.outputs]  # one or two
    grid = down, across, parts = tile.grid(rows, outputs)
    once = tile.turns(rows, outputs) == 1
    # a program that leaves registers lets the next kernel's start beside it; one of wide tiles or many measures needs them
    lean = tile.columns <= 64 and epilogue != "gate" and measures <= 16
    # of a part; beyond the last there are zeros
    each = inputs if parts == 1 or apart else triton.cdiv(inputs, parts * INPUTS) * INPUTS
    work = 1 if once else math.prod(grid), down, across, outputs, each, between, y.stride(0) if parts > 1 else 0
    tall_kernel[grid if once else (MULTIPROCESSORS,)](
        descriptor(x, tile.rows, INPUTS), pieces[0], pieces[-1], y, operands, norm, work, rows, REST=sum(tile.outputs[1:]),
        EPILOGUE=epilogue, SIZE=size, NORM=measures, GROUPS=tile.groups, STAGES=tile.stages, REGISTERS=104 if lean else 232,
        ONCE=once, APART=apart, num_warps=4, **options(pdl), **({"maxnreg": 80} if lean else {}),
    )  # fmt: skip
    return y


def tensor_of(x: Tensor | Unnormed) -> Tensor:
    """What a product reads, to be normalised or not."""
    return x.x if isinstance(x, Unnormed) else x


def _tile(x: Tensor | Unnormed, weight: Tensor, epilogue: str, *, whole: bool = False) -> Tile:
    """The tile; `whole`: in one part, since programs that make parts of a sum have no epilogue."""
    rows, inputs = tensor_of(x).shape
    outputs = len(weight) // 2 if epilogue == "gate" else len(weight)
    tile = tile_for(epilogue, rows, outputs, inputs)
    return tile._replace(parts=1) if whole else tile


def linear(
    x: Tensor | Unnormed, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", pdl: bool = False
) -> Tensor:
    """x [M K] @ weight [N K].T + bias: [M N]; `gelu`: the "tanh" form of GELU of it, or "none" of its approximations."""
    epilogue = "plain" if bias is None else f"gelu_{gelu}" if gelu else "bias"
    rows = tensor_of(x)
    y = empty_rows(rows, len(rows), len(weight))
    return _launch(x, weight, y, epilogue, () if bias is None else (bias,), tile=_tile(x, weight, "other"), pdl=pdl)


def linears(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, *, gelu: str = "", pdl: bool = False) -> Tensor:
    """n products at once, x [n M K] @ weight [n N K].T + bias [n N], into y [n M N]; `gelu` as in `linear`. x has room as
    `empty_groups` has it."""
    count, rows, inputs = x.shape
    tile = tile_for("other", rows, weight.shape[:2].numel(), inputs)._replace(parts=count)
    return _launch(x, weight, y, f"gelu_{gelu}" if gelu else "bias", (bias,), tile=tile, pdl=pdl, apart=True)


def added(x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """y + x [M K] @ weight [N K].T + bias: [M N]."""
    total = empty_rows(x, len(x), len(weight))
    epilogue, operands = ("add", (y,)) if bias is None else ("bias_add", (bias, y))
    return _launch(x, weight, total, epilogue, operands, tile=_tile(x, weight, "sum", whole=True), pdl=pdl)


def split(x: Tensor, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """x [M K] @ weight [N K].T in parts [... M N] whose sum it is."""
    tile = _tile(x, weight, "sum")
    return _launch(x, weight, x.new_empty(tile.parts, len(x), len(weight)), "plain", tile=tile, pdl=pdl)


def scaled(
    x: Tensor, weight: Tensor, y: Tensor, norm: Tensor, *, eps: float, pdl: bool = False
) -> tuple[Tensor, Unnormed]:
    """As `added`, and what RMSNorm of that with the weight `norm` is made of."""
    tile = _tile(x, weight, "sum", whole=True)
    total, times = empty_rows(x, len(x), len(weight)), empty_rows(x, len(x), len(weight))
    squares = _measures(x, weight, tile)
    _launch(x, weight, total, "scale", (norm, squares, times, y), tile=tile, pdl=pdl)
    return total, Unnormed(times, squares, eps)


def measured(
    x: Tensor, weight: Tensor, y: Tensor, bias: Tensor, *, eps: float, pdl: bool = False
) -> tuple[Tensor, Unnormed]:
    """As `added`, and what layer norm of that is made of."""
    tile = _tile(x, weight, "sum", whole=True)
    total = empty_rows(x, len(x), len(weight))
    squares, sums = _measures(x, weight, tile), _measures(x, weight, tile)
    _launch(x, weight, total, "measure", (bias, squares, sums, y), tile=tile, pdl=pdl)
    return total, Unnormed(total, squares, eps, sums)


def _measures(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """Room for a number f32 of each row and each piece of x @ weight.T: [n M]."""
    pieces = tile.grid(len(x), len(weight))[1] * len(tile.outputs)
    return x.new_empty(pieces, len(x), dtype=torch.float32)


def gated(x: Tensor | Unnormed, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up [M N] of x [M K] and weight [2N K], gate over up."""
    rows = tensor_of(x)
    y = empty_rows(rows, len(rows), len(weight) // 2)
    return _launch(x, weight, y, "gate", tile=_tile(x, weight, "gate"), pdl=pdl)


def turned(
    x: Tensor | Unnormed, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, *, scale: float, pdl: bool = False
) -> Tensor:
    """Queries, times `scale`, keys and values [X 3 H D] of x [X K], weight [N K] and bias [N]; neighbours of queries and
    keys are rotated by cos, sin f32 [X D/2]."""
    size = 2 * cos.shape[1]
    heads = len(weight) // (3 * size)
    rows = tensor_of(x)
    y = empty_rows(rows, len(rows), 3, heads, size)
    operands = (bias, cos, sin, scale, heads)
    return _launch(x, weight, y, "turn", operands, tile=_tile(x, weight, "turn"), pdl=pdl, size=size)


def written(
    x: Tensor | Unnormed, weight: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
    keys: Tensor, values: Tensor, *, scale: float, eps: float, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """As `rope.rotate_write` of x [T K] @ weight [C K].T, with heads of 128: q [T H 128]."""
    kv_heads = keys.shape[2]
    heads = len(weight) // HEAD - 2 * kv_heads
    operands = (q_norm, k_norm, cos, sin, slots, keys, values, scale, eps, heads, kv_heads)
    rows = tensor_of(x)
    q = empty_rows(rows, len(rows), heads, HEAD)
    return _launch(x, weight, q, "heads", operands, tile=_tile(x, weight, "heads"), pdl=pdl)
