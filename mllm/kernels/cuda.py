"""The op tables of NVIDIA GPUs for decode steps, by their number of rows.

One row: on Hopper all layers as one kernel, else products by hand, which read their weights before the kernel ahead of
them is done. Up to 8, on Hopper: the same on tensor cores. Some rows: tensor cores with the weight as the tall side. Some
hundred, on Hopper: products that do what follows them. Many: cuBLAS between fused elementwise kernels. Every bound is read
on the device, so each of the tables can be recorded as a graph.
"""

from __future__ import annotations

from functools import partial

import attrs
import torch
from torch import Tensor

from mllm.batch import ForwardBatch
from mllm.config import TextConfig
from mllm.kernels import attend, attend_one, cuda_products, decode_plan, draw, persistent, step
from mllm.kernels.cuda_products import FEW_ROWS, SKINNY_ROWS
from mllm.kernels.decode_plan import DecodePlan, SplitHeads
from mllm.kernels.hopper import multiprocessors
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE
from mllm.weights import TextWeights, stacked

CHAINED_ROWS = range(64, 257)
"""Rows of a decode step for which the products of `tall` beat those of `skinny` and cuBLAS on Hopper; as measured, in
`docs/performance.md`."""


def decode_ops(rows: int, *, pdl: bool, hopper: bool = False) -> Ops:
    """The table for decode steps of `rows` rows; `pdl`: programmatic dependent launch, from capability 9.0 on; `hopper`:
    9.0 itself, whose tensor cores have products of their own."""
    ops = attrs.evolve(
        REFERENCE,
        embed=partial(step.embed, pdl=pdl),
        plan=partial(plan, hopper=hopper, pdl=pdl),
        attend_=partial(attend_, pdl=pdl),
        sample=partial(draw.sample, pdl=pdl),
        advance_=partial(step.advance_, pdl=pdl),
    )
    if rows == 1:
        return attrs.evolve(ops, **cuda_products.of_one(pdl=pdl), whole_=partial(whole_, pdl=pdl))
    if hopper and rows in FEW_ROWS:
        return attrs.evolve(ops, **cuda_products.of_few(pdl=pdl))
    if hopper and rows in CHAINED_ROWS:
        chain, made = True, cuda_products.chained()
    elif rows <= SKINNY_ROWS:
        chain, made = pdl, cuda_products.of_some(pdl=pdl)
    else:
        chain, made = False, cuda_products.of_many()
    return attrs.evolve(ops, **made, head=partial(cuda_products.head, every=True, pdl=chain))


def plan(
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
    cos, sin = step.rotary_of(batch, config, pdl=pdl)
    return DecodePlan(
        cos=cos, sin=sin, slots=batch.slots, pages=batch.pages, lengths=batch.lengths, workspace=workspace,
        exchange=exchange, split=split,
    )  # fmt: skip


def whole_(
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


def attend_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: DecodePlan, keys: Tensor, values: Tensor, *, eps: float,
    pdl: bool,
) -> Tensor | SplitHeads:  # fmt: skip
    run = attend.attend_ if plan.split.stages else attend_one.attend_
    return run(qkv, q_norm, k_norm, plan, keys, values, eps=eps, pdl=pdl)
