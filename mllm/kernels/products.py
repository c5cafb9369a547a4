"""The products of prompts and of images, each with what follows it: by `tall` where that is faster, else by cuBLAS and a
kernel after it. `pdl`: they are of a chain with programmatic dependent launch on Hopper (capability 9.0), else all is
cuBLAS's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.kernels import elementwise, rope, tall
from mllm.kernels.norm import Pending, Stream, add_norm, split_linear
from mllm.kernels.tall import Unnormed
from mllm.kernels.tall_tiles import HEAD, LEAST, pays, tile_for


class Unmade(NamedTuple):
    """x [M K] @ weight [N K].T + bias, not made yet: in a chain attention does it, and turns queries and keys as it goes."""

    x: Tensor | Unnormed
    weight: Tensor
    bias: Tensor | None = None

    def made(self) -> Tensor:
        return linear(*self, pdl=True)


class Unadded(NamedTuple):
    """x [M N] + y [M K] @ weight [N K].T + bias, not made yet: in a chain the norm after it does it, and some of its own
    work."""

    y: Tensor
    weight: Tensor
    x: Tensor
    bias: Tensor | None = None

    def at(self, rows: Tensor) -> Unadded:
        """Some rows of it."""
        return self._replace(y=self.y.index_select(0, rows), x=self.x.index_select(0, rows))

    def made(self) -> Stream:
        return added(*self, pdl=True)


def normed(
    stream: Stream | Unadded, norm: Tensor | None, weight: Tensor, *, eps: float, product: Callable[..., Any], epilogue: str,
    pdl: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """(the stream with nothing pending, a product of its norm, with what follows that); the norm is RMSNorm, or layer norm
    where it has no weight. Where both this product and the one that ends in the stream are ours, they do the norm between
    them."""
    if isinstance(stream, Unadded):
        y, into, x, bias = stream
        outputs = len(weight) // 2 if epilogue == "gate" else len(weight)
        if _parts(y, into) == 1 and pays(epilogue, x, outputs, normed=True):
            if norm is None and bias is not None:
                total, unnormed = tall.measured(y, into, x, bias, eps=eps, pdl=True)
                return total, product(unnormed, weight)
            # times its weight, and not yet over its norm, the stream could be more than float16 holds
            if norm is not None and x.dtype == torch.bfloat16 and (epilogue == "gate" or len(x) > LEAST):
                total, unnormed = tall.scaled(y, into, x, norm, eps=eps, pdl=True)
                return total, product(unnormed, weight)
        stream = stream.made()
    total, normal = add_norm(stream, norm, eps=eps, pdl=pdl)
    return total, product(normal, weight)


def _parts(y: Tensor, weight: Tensor) -> int:
    """In how many parts `tall` makes y [M K] @ weight [N K].T; 0 where cuBLAS is faster."""
    return tile_for("sum", len(y), len(weight), y.shape[1]).parts if pays("sum", y, len(weight)) else 0


def linear(x: Tensor | Unnormed, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", pdl: bool) -> Tensor:
    """x [M K] @ weight [N K].T + bias: [M N]; `gelu`: the "tanh" form of GELU of it, or "none" of its approximations."""
    if isinstance(x, Unnormed) or (pdl and pays("other", x, len(weight))):
        return tall.linear(x, weight, bias, gelu=gelu, pdl=True)
    if gelu == "tanh" and bias is not None:  # an epilogue of cuBLAS
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate=gelu) if gelu else y


def added(y: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None = None, *, pdl: bool) -> Stream:
    """x [M N] + y [M K] @ weight [N K].T + bias; pending where the product is made in parts, or by cuBLAS."""
    parts = _parts(y, weight) if pdl else 0
    if parts == 1:
        return tall.added(y, weight, x, bias, pdl=True)
    return Pending(x, tall.split(y, weight, pdl=True) if parts else split_linear(y, weight), bias)


def gated(x: Tensor | Unnormed, weight: Tensor, *, pdl: bool) -> Tensor:
    """silu(gate) * up [M N] of x [M K] and weight [2N K], gate over up."""
    if isinstance(x, Unnormed) or (pdl and pays("gate", x, len(weight) // 2)):
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
        ours = isinstance(x, Unnormed) or (len(x) > LEAST and pays("heads", x, len(weight)))
        if ours and keys.shape[3] == HEAD:
            return tall.written(x, weight, *around, scale=scale, eps=eps, pdl=True)
        qkv = qkv.made()
    return rope.rotate_write(qkv, *around, scale=scale, eps=eps, pdl=pdl)


def turned(
    qkv: Tensor | Unmade, cos: Tensor, sin: Tensor, heads: int, *, scale: float, pdl: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, times `scale`, keys and values [X heads Dv] of qkv [X Cv]; queries and keys are rotated."""
    if isinstance(qkv, Unmade):
        x, weight, bias = qkv
        if bias is not None and (isinstance(x, Unnormed) or pays("turn", x, len(weight))):
            q, k, v = tall.turned(x, weight, bias, cos, sin, scale=scale, pdl=True).unbind(1)
            return q, k, v
        qkv = qkv.made()
    q, k = rope.rotate_heads(qkv, cos, sin, heads, scale=scale, pdl=pdl)
    return q, k, qkv.view(len(qkv), 3, heads, -1)[:, 2]
