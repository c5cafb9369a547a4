"""The op tables of NVIDIA GPUs: decode steps by their number of rows, and prompts.

One row: on Hopper all layers as one kernel, else products by hand, which read their weights before the kernel ahead of
them is done. Up to 8, on Hopper: the same on tensor cores. Some rows: tensor cores with the weight as the tall side. Some
hundred, on Hopper: products that do what follows them. Many: cuBLAS between fused elementwise kernels. Every bound is read
on the device, so each of the tables can be recorded as a graph, but the one with FlashInfer's attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.batch import ForwardBatch, SamplingBatch
from mllm.config import TextConfig
from mllm.kernels import (
    attend,
    attend_one,
    decode_plan,
    draw,
    elementwise,
    few,
    flash,
    flash_hopper,
    linear,
    long_prompts,
    persistent,
    products,
    rope,
    skinny,
    step,
)
from mllm.kernels.decode_plan import DecodePlan, SplitHeads
from mllm.kernels.hopper import multiprocessors
from mllm.kernels.norm import Pending, Stream, add_norm
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE
from mllm.state import State, state, tensor
from mllm.weights import TextWeights, stacked

FEW_ROWS = range(2, 9)
"""Rows of a decode step for which the products of `few` beat the others on Hopper; this and what follows is measured, and
the record is in `docs/performance.md`."""
SKINNY_ROWS = 128
"""Rows of a decode step up to which the products of `skinny` beat cuBLAS on an H200, since they keep its chain whole."""
CHAINED_ROWS = range(64, 257)
"""Rows of a decode step for which the products of `tall` beat those of `skinny` and cuBLAS on Hopper."""
SKINNY_TOKENS = 64
"""Tokens of a prompt up to which the products of `skinny` beat the others."""
FLASH_TOKENS = 2048
"""Tokens of a prefill up to which `flash` is as fast as FlashInfer's FA3. `flash_hopper` beats both."""
Product = Callable[..., Any]  # y [T K], weight [N K] -> [T N], gated [T N/2]; with x [T N] -> the stream


def decode_ops(rows: int, *, pdl: bool, hopper: bool = False) -> Ops:
    """The table for decode steps of `rows` rows; `pdl`: programmatic dependent launch, from capability 9.0 on; `hopper`:
    9.0 itself, whose tensor cores have products of their own."""
    ops = attrs.evolve(
        REFERENCE,
        embed=partial(step.embed, pdl=pdl),
        plan=partial(_decode_plan, hopper=hopper, pdl=pdl),
        attend_=partial(_attend, pdl=pdl),
        sample=partial(_sample, pdl=pdl),
        advance_=partial(step.advance_, pdl=pdl),
    )
    if rows == 1:
        return attrs.evolve(ops, **_fused(partial(linear.linear, pdl=pdl)), whole_=partial(_persistent, pdl=pdl))
    if hopper and rows in FEW_ROWS:
        return attrs.evolve(ops, **_few(pdl=pdl))
    chained = hopper and rows in CHAINED_ROWS
    narrow = rows <= SKINNY_ROWS and not chained
    chain = chained or (pdl and narrow)  # cuBLAS would break it
    return attrs.evolve(
        ops,
        **(_skinny(pdl=chain) if narrow else _chained() if chained else _products()),
        head=partial(_head, every=True, pdl=chain),
    )


def prompt_ops(tokens: int, *, wide: bool, hopper: bool = False, fa3: bool = False) -> Ops:
    """The table for prompts of `tokens` tokens in all; `wide`: capability 9.0 and up, with its larger tiles; `hopper`:
    9.0 itself, whose tensor cores have an attention and products of their own.

    `fa3`: where that one doesn't serve, more than `FLASH_TOKENS` at once go to FlashInfer, and then their bounds are read
    on the host.
    """
    narrow = tokens <= SKINNY_TOKENS
    chained = hopper and not narrow
    pdl = chained or (wide and narrow)
    return attrs.evolve(
        REFERENCE,
        embed=partial(step.embed, pdl=pdl),
        plan=partial(_prompt_plan, fa3=fa3, pdl=pdl),
        attend_=partial(_attend_prompts, wide=wide, hopper=hopper, pdl=pdl),
        put_=partial(elementwise.put_, pdl=pdl),
        add_=partial(elementwise.add_, pdl=pdl),
        sample=partial(_sample, pdl=pdl),
        **_ending(
            {"head": partial(_head, every=False, pdl=pdl)}
            | (_skinny(pdl=pdl) if narrow else _chained(unmade=True) if chained else _products()),
            hopper=hopper, pdl=pdl,
        ),
    )  # fmt: skip


def _fused(product: Product) -> dict[str, Callable[..., Any]]:
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


def _few(*, pdl: bool) -> dict[str, Callable[..., Any]]:
    """The ops of products by `few`, by `skinny` where that can't read a weight, or finds the stream as `skinny` left it."""
    ours = _fused(partial(few.linear, pdl=pdl))
    others = _skinny(pdl=pdl) | {"head": partial(_head, every=True, pdl=pdl)}

    def either(name: str, x: Stream, *around: Any, **settings: Any) -> Any:
        weight = around[0] if name == "linear_add" else around[-1]
        fits = isinstance(x, Tensor) and few.fits(weight, kept=name != "linear_add")
        return (ours if fits else others)[name](x, *around, **settings)

    return {name: partial(either, name) for name in ours}


def _skinny(*, pdl: bool) -> dict[str, Callable[..., Any]]:
    product = partial(skinny.linear, pdl=pdl)

    def added(y: Tensor, weight: Tensor, x: Tensor) -> Stream:
        return Pending(x, product(y, weight, parts=True))

    return _around(product, partial(product, gate=True), added, pdl=pdl)


def _products() -> dict[str, Callable[..., Any]]:
    linear, gated = partial(products.linear, pdl=False), partial(products.gated, pdl=False)
    return _around(linear, gated, partial(products.added, pdl=False), pdl=False)


def _around(
    linear: Product, gated: Product, added: Product, *, pdl: bool, epilogue: str = "other"
) -> dict[str, Callable[..., Any]]:
    """The ops of a layer's products, and of the norms before them; `epilogue`: that of `linear` in a chain."""
    return {
        "norm_linear": partial(products.normed, product=linear, epilogue=epilogue, pdl=pdl),
        "norm_gate": partial(products.normed, product=gated, epilogue="gate", pdl=pdl),
        "linear_add": added,
    }


def _chained(*, unmade: bool = False) -> dict[str, Callable[..., Any]]:
    """The ops of a layer's products in a chain on Hopper; `unmade`: queries, keys and values are made by attention."""
    linear = products.Unmade if unmade else partial(products.linear, pdl=True)
    gated = partial(products.gated, pdl=True)
    return _around(linear, gated, products.Unadded, pdl=True, epilogue="heads" if unmade else "other")


def _ending(many: dict[str, Callable[..., Any]], *, hopper: bool, pdl: bool) -> dict[str, Callable[..., Any]]:
    """The ops of a prompt's products: of its last layer no more is left than the positions whose logits are wanted, and
    where those are few, they are as the rows of a decode step."""
    one, some = _fused(partial(linear.linear, pdl=pdl)), _few(pdl=pdl)

    def by_rows(name: str, x: Stream | products.Unadded, *around: Any, **settings: Any) -> Any:
        whole = name != "head" or around[0] is None  # or some of x are still to be chosen
        rows = len(x) if isinstance(x, Tensor) and whole else 0
        table = one if rows == 1 else some if hopper and rows in FEW_ROWS else many
        return table[name](x, *around, **settings)

    return many | {name: partial(by_rows, name) for name in ("linear_add", "norm_gate", "head")}


def _head(
    x: Stream, last: Tensor | None, norm: Tensor, weight: Tensor, *, eps: float, every: bool, pdl: bool
) -> Tensor:
    """Logits f32 [Q V] of the positions `last`; `every`: of a decode step, whose positions are its rows in order."""
    if last is not None and not every:
        x = x.index_select(0, last) if isinstance(x, Tensor) else x.at(last)
    if isinstance(x, products.Unadded):
        x = x.made()
    y = add_norm(x, norm, eps=eps, pdl=pdl)[1]
    if len(y) <= SKINNY_ROWS:
        return skinny.linear(y, weight, pdl=pdl, dtype=torch.float32)
    return F.linear(y, weight).float()


def _decode_plan(
    batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype, hopper: bool, pdl: bool
) -> DecodePlan:
    rows, device = len(batch.lengths), batch.tokens.device
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    tokens = batch.pages.shape[1] * page_size
    split = decode_plan.split_for(rows, heads, kv_heads, tokens)
    exchange = None
    if hopper and rows == 1:
        if attend_one.fits(split, heads // kv_heads, config.head_dim, tokens):
            split = split._replace(stages=0)
        if persistent.fits(config, tokens, page_size, dtype, multiprocessors(device)):
            exchange = persistent.exchange_for(config, tokens, device)
    # its zeros, as those of the exchange, come ahead of the chain of kernels, which a memset would break
    workspace = decode_plan.workspace_for(split, rows, heads, kv_heads, config.head_dim, device)
    cos, sin = _rotary(batch, config, pdl=pdl)
    return DecodePlan(
        cos=cos,
        sin=sin,
        slots=batch.slots,
        pages=batch.pages,
        lengths=batch.lengths,
        workspace=workspace,
        exchange=exchange,
        split=split,
    )


def _persistent(
    x: Tensor, weights: TextWeights, keys: Tensor, values: Tensor, plan: DecodePlan, *, eps: float, pdl: bool
) -> Tensor | None:
    """A whole step of one row, if plan and weights are such that one kernel can do it."""
    if plan.exchange is None:
        return None
    stacks = stacked(weights.layers)
    if stacks is None or not weights.head.is_contiguous():
        return None
    norm, head = weights.norm, weights.head
    return persistent.logits(x, stacks, norm, head, keys, values, plan, plan.exchange, eps=eps, pdl=pdl)


def _attend(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: DecodePlan, keys: Tensor, values: Tensor, *, eps: float,
    pdl: bool,
) -> Tensor | SplitHeads:  # fmt: skip
    run = attend.attend_ if plan.split.stages else attend_one.attend_
    return run(qkv, q_norm, k_norm, plan, keys, values, eps=eps, pdl=pdl)


@state
class PromptPlan(State):
    """Computed once per forward pass: rotary tables f32 [T D/2] and the bounds of the batch. `attend` is None where
    `flash` serves."""

    cos: Tensor
    sin: Tensor
    slots: Tensor = tensor("T")
    pages: Tensor = tensor("B N")
    lengths: Tensor = tensor("B")
    indptr: Tensor = tensor("B+1")
    attend: long_prompts.Attend | None


def _prompt_plan(
    batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype, fa3: bool, pdl: bool
) -> PromptPlan:
    cos, sin = _rotary(batch, config, pdl=pdl)
    attend = None
    ours = flash_hopper.fits(config.head_dim, page_size, dtype)
    if fa3 and not ours and len(batch.tokens) > FLASH_TOKENS and dtype != torch.float32:
        attend = long_prompts.plan(batch, config=config, page_size=page_size, dtype=dtype)
    return PromptPlan(
        cos=cos, sin=sin, slots=batch.slots, pages=batch.pages, lengths=batch.lengths, indptr=batch.q_indptr,
        attend=attend,
    )  # fmt: skip


def _attend_prompts(
    qkv: Tensor | products.Unmade, q_norm: Tensor, k_norm: Tensor, plan: PromptPlan, keys: Tensor, values: Tensor, *,
    eps: float, wide: bool, hopper: bool, pdl: bool,
) -> Tensor:  # fmt: skip
    page_size, _, size = keys.shape[1:]
    around = (q_norm, k_norm, plan.cos, plan.sin, plan.slots, keys, values)
    q = products.written(qkv, *around, scale=size**-0.5 * flash.LOG2E, eps=eps, pdl=pdl)
    if plan.attend is not None:
        return plan.attend(q, keys, values)
    each = len(q) // len(plan.lengths)
    ours = flash_hopper.prompt_tile(each, size, page_size, q.dtype) if hopper else None
    if ours is not None:
        return flash_hopper.prompts(q, keys, values, plan.indptr, plan.lengths, plan.pages, tile=ours, pdl=pdl)
    tile = flash.tile_for(len(q), size, wide=wide)
    return flash.prompts(q, keys, values, plan.indptr, plan.lengths, plan.pages, tile=tile, pdl=pdl)


def _rotary(batch: ForwardBatch, config: TextConfig, *, pdl: bool) -> tuple[Tensor, Tensor]:
    frequencies = rope.frequencies(config.head_dim // 2, config.rope_theta, batch.positions.device)
    return step.rotary(batch.positions, frequencies, config.mrope_section, pdl=pdl)


def _sample(logits: Tensor, sampling: SamplingBatch, lengths: Tensor, *, pdl: bool) -> Tensor:
    if sampling.greedy:
        return step.argmax(logits, pdl=pdl)
    return draw.sample(logits, sampling, lengths, pdl=pdl)
