"""The products of prompts and of images, each with what follows it: by `tall` where that is faster, else by cuBLAS and a
kernel after it. `pdl`: they are of a chain with programmatic dependent launch on Hopper (capability 9.0), else all is
cuBLAS's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.kernels import elementwise, rope, tall
from mllm.kernels.norm import split_linear
from mllm.kernels.tall_tiles import HEAD, LEAST, TURNED_HEAD, pays


class Unmade(NamedTuple):
    """x [M K] @ weight [N K].T + bias, not made yet: in a chain attention does it, and turns queries and keys as it goes."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def made(self) -> Tensor:
        return linear(*self, pdl=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", pdl: bool) -> Tensor:
    """x [M K] @ weight [N K].T + bias: [M N]; `gelu`: the "tanh" form of GELU of it, or "none" of its approximations."""
    if pdl and pays("linear", x, len(weight)):
        return tall.linear(x, weight, bias, gelu=gelu, pdl=True)
    if gelu == "tanh" and bias is not None:  # an epilogue of cuBLAS
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate=gelu) if gelu else y


def split(x: Tensor, weight: Tensor, *, pdl: bool) -> Tensor:
    """x [M K] @ weight [N K].T in parts [... M N] whose sum it is."""
    return tall.split(x, weight, pdl=True) if pdl and pays("parts", x, len(weight)) else split_linear(x, weight)


def gated(x: Tensor, weight: Tensor, *, pdl: bool) -> Tensor:
    """silu(gate) * up [M N] of x [M K] and weight [2N K], gate over up."""
    if pdl and pays("gate", x, len(weight) // 2):
        return tall.gated(x, weight, pdl=True)
    return elementwise.gate(F.linear(x, weight))


def written(
    qkv: Tensor | Unmade, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor,
    values: Tensor, *, scale: float, eps: float, pdl: bool,
) -> Tensor:  # fmt: skip
    """The queries [T H D] of qkv [T C], normalised, rotated and scaled; keys and values go to the pool, as
    `rope.rotate_write` has it."""
    around = (q_norm, k_norm, cos, sin, slots, keys, values)
    if isinstance(qkv, Unmade):
        x, weight, _ = qkv
        # few rows gain more from small tiles than from a kernel less
        if keys.shape[3] == HEAD and len(x) > LEAST and pays("heads", x, len(weight)):
            return tall.written(x, weight, *around, scale=scale, eps=eps, pdl=True)
        qkv = qkv.made()
    return rope.rotate_write(qkv, *around, scale=scale, eps=eps, pdl=pdl)


def turned(
    qkv: Tensor | Unmade, cos: Tensor, sin: Tensor, heads: int, *, scale: float, pdl: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, times `scale`, keys and values [X heads Dv] of qkv [X Cv]; queries and keys are rotated."""
    if isinstance(qkv, Unmade):
        x, weight, bias = qkv
        if bias is not None and len(weight) == 3 * heads * TURNED_HEAD and pays("turn", x, len(weight)):
            q, k, v = tall.turned(x, weight, bias, cos, sin, scale=scale, pdl=True).unbind(1)
            return q, k, v
        qkv = qkv.made()
    q, k = rope.rotate_heads(qkv, cos, sin, heads, scale=scale, pdl=pdl)
    return q, k, qkv.view(len(qkv), 3, heads, -1)[:, 2]
