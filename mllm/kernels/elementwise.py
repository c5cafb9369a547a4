"""What lies between the matrix products of a prompt: the gate of the MLP, and image features put in their places."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.norm import Stream
from mllm.kernels.pdl import FUSED, launch_dependents, options, wait
from mllm.kernels.room import empty_rows


@triton.jit
def gate_kernel(gate_up, y, F, BLOCK: tl.constexpr):
    """y [T F] = silu(gate) * up, where a row of gate_up [T 2F] holds gate, then up."""
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    gate = tl.load(gate_up + 2 * t * F + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * t + 1) * F + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t * F + f, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T 2F]: [T F]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = empty_rows(gate_up, rows, width)
    block = min(2048, triton.next_power_of_2(width))
    gate_kernel[(rows, triton.cdiv(width, block))](gate_up, y, width, BLOCK=block, **FUSED)
    return y


@triton.jit
def place_kernel(x, at, rows, E, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr):
    """x[at[m]] = rows[m], or += with ADD; nothing where at[m] is negative, which pads a batch."""
    launch_dependents(PDL)
    m = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    t = tl.load(at + m)
    inside = e < tl.where(t >= 0, E, 0)
    new = tl.load(rows + m * E + e, mask=inside, other=0.0)
    if ADD:
        new = (new.to(tl.float32) + tl.load(x + t * E + e, mask=inside, other=0.0).to(tl.float32)).to(new.dtype)
    tl.store(x + t * E + e, new.to(x.dtype.element_ty), mask=inside)


def _place(stream: Stream, at: Tensor, rows: Tensor, *, add: bool, pdl: bool) -> Stream:
    x = stream if isinstance(stream, Tensor) else stream.x
    count, width = rows.shape
    if count:
        block = min(1024, triton.next_power_of_2(width))
        grid = (count, triton.cdiv(width, block))
        place_kernel[grid](x, at, rows.contiguous(), width, BLOCK=block, ADD=add, **options(pdl))
    return stream


def put_(x: Stream, at: Tensor, rows: Tensor, *, pdl: bool) -> Stream:
    return _place(x, at, rows, add=False, pdl=pdl)


def add_(x: Stream, at: Tensor, rows: Tensor, *, pdl: bool) -> Stream:
    return _place(x, at, rows, add=True, pdl=pdl)
