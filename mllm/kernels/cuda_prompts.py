"""The op tables of NVIDIA GPUs for prompts, by their tokens: attention over the pool, and products with what follows them.

Every bound is read on the device, so each of the tables can be recorded as a graph, but the one with FlashInfer's attention.
"""

from __future__ import annotations

from functools import partial

import attrs
import torch
from torch import Tensor

from mllm.batch import ForwardBatch
from mllm.config import TextConfig
from mllm.kernels import cuda_products, draw, elementwise, flash, flash_hopper, long_prompts, products, step
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE
from mllm.state import State, state, tensor

SKINNY_TOKENS = 64
"""Tokens of a prompt up to which the products of `skinny` beat the others; this and what follows is measured, and the record
is in `docs/performance.md`."""
FLASH_TOKENS = 2048
"""Tokens of a prefill up to which `flash` is as fast as FlashInfer's FA3. `flash_hopper` beats both."""


def prompt_ops(tokens: int, *, wide: bool, hopper: bool = False, fa3: bool = False) -> Ops:
    """The table for prompts of `tokens` tokens in all; `wide`: capability 9.0 and up, with its larger tiles; `hopper`:
    9.0 itself, whose tensor cores have an attention and products of their own.

    `fa3`: where that one doesn't serve, more than `FLASH_TOKENS` at once go to FlashInfer, and then their bounds are read
    on the host.
    """
    if tokens <= SKINNY_TOKENS:
        pdl, made = wide, cuda_products.of_some(pdl=wide)
    elif hopper:
        pdl, made = True, cuda_products.chained(unmade=True)
    else:
        pdl, made = False, cuda_products.of_many()
    made = made | {"head": partial(cuda_products.head, every=False, pdl=pdl)}
    return attrs.evolve(
        REFERENCE,
        embed=partial(step.embed, pdl=pdl),
        plan=partial(plan, fa3=fa3, pdl=pdl),
        attend_=partial(attend_, wide=wide, hopper=hopper, pdl=pdl),
        put_=partial(elementwise.put_, pdl=pdl),
        add_=partial(elementwise.add_, pdl=pdl),
        sample=partial(draw.sample, pdl=pdl),
        **cuda_products.with_last_layer(made, hopper=hopper, pdl=pdl),
    )


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


def plan(
    batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype, fa3: bool, pdl: bool
) -> PromptPlan:
    cos, sin = step.rotary_of(batch, config, pdl=pdl)
    attend = None
    ours = flash_hopper.fits(config.head_dim, page_size, dtype)
    if fa3 and not ours and len(batch.tokens) > FLASH_TOKENS and dtype != torch.float32:
        attend = long_prompts.plan(batch, config=config, page_size=page_size, dtype=dtype)
    return PromptPlan(
        cos=cos, sin=sin, slots=batch.slots, pages=batch.pages, lengths=batch.lengths, indptr=batch.q_indptr,
        attend=attend,
    )  # fmt: skip


def attend_(
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
