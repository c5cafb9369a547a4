"""The op tables of NVIDIA GPUs for decode: Triton kernels around cuBLAS, and instead of it where there is one row."""

from __future__ import annotations

from functools import lru_cache, partial

import attrs
import torch
from torch import Tensor

from mllm.batch import ForwardBatch, SamplingBatch
from mllm.config import TextConfig
from mllm.kernels import attend, linear, reference, rotary, step
from mllm.kernels.attend import DecodePlan
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE


def decode_ops(rows: int, *, pdl: bool) -> Ops:
    """The table for decode steps of `rows` rows; `pdl`: programmatic dependent launch, from capability 9.0 on."""
    ops = attrs.evolve(
        REFERENCE,
        embed=partial(step.embed, pdl=pdl),
        plan=partial(_plan, pdl=pdl),
        attend_=partial(attend.attend_, pdl=pdl),
        sample=partial(_sample, pdl=pdl),
        advance_=partial(step.advance_, pdl=pdl),
    )
    if rows > 1:  # cuBLAS reads weights for several rows faster than anything here does
        return ops
    return attrs.evolve(
        ops,
        norm_linear=partial(linear.norm_linear, pdl=pdl),
        linear_add=partial(linear.linear_add, pdl=pdl),
        norm_gate=partial(linear.norm_gate, pdl=pdl),
        head=partial(linear.head, pdl=pdl),
    )


def _plan(batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype, pdl: bool) -> DecodePlan:
    rows, device = len(batch.lengths), batch.tokens.device
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    split = attend.split_for(rows, kv_heads, batch.pages.shape[1] * page_size)
    arrived = torch.zeros(rows, kv_heads, dtype=torch.int32, device=device)  # ahead of the chain: a memset breaks it
    cos, sin = step.rotary(
        batch.positions, _frequencies(config.head_dim, config.rope_theta, device), config.mrope_section, pdl=pdl
    )
    return DecodePlan(
        cos=cos,
        sin=sin,
        slots=batch.slots,
        pages=batch.pages,
        lengths=batch.lengths,
        partial=torch.empty(rows, kv_heads, split.splits, group, config.head_dim, dtype=torch.float32, device=device),
        stats=torch.empty(rows, kv_heads, split.splits, group, 2, dtype=torch.float32, device=device),
        arrived=arrived,
        split=split,
    )


@lru_cache(maxsize=16)
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """A constant of the model, made once: six small kernels that a step need not repeat."""
    return rotary.frequencies(head_dim // 2, theta, device)


def _sample(logits: Tensor, sampling: SamplingBatch, lengths: Tensor, *, pdl: bool) -> Tensor:
    if sampling.greedy:
        return step.argmax(logits, pdl=pdl)
    return reference.sample(logits, sampling, lengths)
