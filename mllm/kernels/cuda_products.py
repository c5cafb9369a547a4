"""The products of a layer and of the head, with the norms before them and what follows them, as ops of NVIDIA GPUs.

Which kernels make them depends on the rows: `linear` one, `few` and `skinny` some, `tall` on Hopper some hundred in a chain
with programmatic dependent launch, cuBLAS many, between fused elementwise kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.kernels import few, linear, products, skinny
from mllm.kernels.decode_plan import SplitHeads
from mllm.kernels.norm import Pending, Stream, add_norm

FEW_ROWS = range(2, 9)
"""Rows of a decode step for which the products of `few` beat the others on Hopper; this and what follows is measured, and
the record is in `docs/performance.md`."""
SKINNY_ROWS = 128
"""Rows of a decode step up to which the products of `skinny` beat cuBLAS on an H200, since they keep its chain whole."""
Product = Callable[..., Any]  # y [T K], weight [N K] -> [T N], gated [T N/2]; with x [T N] -> the stream
ByName = dict[str, Callable[..., Any]]  # ops by name


def of_one(*, pdl: bool) -> ByName:
    """The ops of one row, by `linear`."""
    return _fused(partial(linear.linear, pdl=pdl))


def _fused(product: Product) -> ByName:
    """The ops of products of decode steps that do the norm before them and the sum after them: of `linear` or `few`."""

    def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
        return x, product(x, norm, weight, eps=eps)

    def norm_gate(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
        return x, product(x, norm, weight, eps=eps, gate=True)

    def linear_add(y: Tensor | SplitHeads, weight: Tensor, x: Tensor) -> Tensor:
        total: Tensor = product(y, None, weight, x)
        return total

    def head(x: Tensor, last: Tensor | None, norm: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        logits: Tensor = product(x, norm, weight, eps=eps, dtype=torch.float32)  # a step's positions are its rows
        return logits

    return {"norm_linear": norm_linear, "norm_gate": norm_gate, "linear_add": linear_add, "head": head}


def of_few(*, pdl: bool) -> ByName:
    """The ops of products by `few`, by `skinny` where that can't read a weight, or finds the stream as `skinny` left it."""
    ours = _fused(partial(few.linear, pdl=pdl))
    others = of_some(pdl=pdl) | {"head": partial(head, every=True, pdl=pdl)}

    def either(name: str, x: Stream, *around: Any, **settings: Any) -> Any:
        weight = around[0] if name == "linear_add" else around[-1]
        fits = isinstance(x, Tensor) and few.fits(weight, kept=name != "linear_add")
        return (ours if fits else others)[name](x, *around, **settings)

    return {name: partial(either, name) for name in ours}


def of_some(*, pdl: bool) -> ByName:
    """The ops of up to some hundred rows, by `skinny`."""
    product = partial(skinny.linear, pdl=pdl)

    def added(y: Tensor, weight: Tensor, x: Tensor) -> Stream:
        return Pending(x, product(y, weight, parts=True))

    return _around(product, partial(product, gate=True), added, pdl=pdl)


def of_many() -> ByName:
    """The ops of any number of rows, by cuBLAS, which breaks a chain."""
    product, gated, added = (partial(fn, pdl=False) for fn in (products.linear, products.gated, products.added))
    return _around(product, gated, added, pdl=False)


def _around(product: Product, gated: Product, added: Product, *, pdl: bool, epilogue: str = "other") -> ByName:
    """The ops of a layer's products, and of the norms before them; `epilogue`: that of `product` in a chain."""
    return {
        "norm_linear": partial(products.normed, product=product, epilogue=epilogue, pdl=pdl),
        "norm_gate": partial(products.normed, product=gated, epilogue="gate", pdl=pdl),
        "linear_add": added,
    }


def chained(*, unmade: bool = False) -> ByName:
    """The ops in a chain on Hopper, by `tall` and cuBLAS; `unmade`: queries, keys and values are made by attention."""
    product = products.Unmade if unmade else partial(products.linear, pdl=True)
    gated = partial(products.gated, pdl=True)
    return _around(product, gated, products.Unadded, pdl=True, epilogue="heads" if unmade else "other")


def with_last_layer(many: ByName, *, hopper: bool, pdl: bool) -> ByName:
    """The ops of a prompt: of its last layer no more is left than the positions whose logits are wanted, and where those are
    few, they are as the rows of a decode step."""
    one, some = of_one(pdl=pdl), of_few(pdl=pdl)

    def by_rows(name: str, x: Stream | products.Unadded, *around: Any, **settings: Any) -> Any:
        whole = name != "head" or around[0] is None  # or some of x are still to be chosen
        rows = len(x) if isinstance(x, Tensor) and whole else 0
        table = one if rows == 1 else some if hopper and rows in FEW_ROWS else many
        return table[name](x, *around, **settings)

    return many | {name: partial(by_rows, name) for name in ("linear_add", "norm_gate", "head")}


def head(x: Stream, last: Tensor | None, norm: Tensor, weight: Tensor, *, eps: float, every: bool, pdl: bool) -> Tensor:
    """Logits f32 [Q V] of the positions `last`; `every`: of a decode step, whose positions are its rows in order."""
    if last is not None and not every:
        x = x.index_select(0, last) if isinstance(x, Tensor) else x.at(last)
    if isinstance(x, products.Unadded):
        x = x.made()
    y = add_norm(x, norm, eps=eps, pdl=pdl)[1]
    if len(y) <= SKINNY_ROWS:
        return skinny.linear(y, weight, pdl=pdl, dtype=torch.float32)
    return F.linear(y, weight).float()
