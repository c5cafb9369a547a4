"""The op table of CPUs: the reference ops with fewer PyTorch calls in each.

A decode step of a small model is some hundreds of calls of a few microseconds, so their number is much of its time. What
each op computes is what `kernels/reference.py` says.
"""

from __future__ import annotations

from functools import lru_cache

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.batch import ForwardBatch
from mllm.config import TextConfig
from mllm.kernels import reference
from mllm.kernels.reference import REFERENCE, AttentionPlan
from mllm.state import replace


def plan(batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype) -> AttentionPlan:
    """As the reference's, with rotary tables as wide as a head and the sign of the rotation in the sine."""
    made = reference.plan(batch, config=config, page_size=page_size, dtype=dtype)
    return replace(made, cos=torch.cat((made.cos, made.cos), -1), sin=torch.cat((made.sin.neg(), made.sin), -1))


def norm(x: Tensor, *, eps: float) -> Tensor:
    """x [... n] over its root mean square, in f32: mean, scale and eps are one batched product."""
    x = x.float()
    rows = x.view(-1, 1, x.shape[-1])
    factor = torch.baddbmm(_constant(eps), rows, rows.mT, alpha=1 / x.shape[-1]).rsqrt_()
    return x * factor.view(*x.shape[:-1], 1)


@lru_cache(maxsize=16)
def _constant(value: float) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=torch.float32, device="cpu")


def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    return x, F.linear(norm(x, eps=eps).mul_(norm_weight).to(weight.dtype), weight)


def norm_gate(x: Tensor, norm_weight: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    gate, up = norm_linear(x, norm_weight, weight, eps=eps)[1].chunk(2, -1)
    return x, F.silu(gate).mul_(up)


def head(x: Tensor, last: Tensor | None, norm_weight: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return norm_linear(x if last is None else x.index_select(0, last), norm_weight, weight, eps=eps)[1].float()


def attend_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: AttentionPlan, keys: Tensor, values: Tensor, *, eps: float
) -> Tensor:
    """Queries and keys are normalised and rotated together; the values' norm comes along, and is not used."""
    tokens, width = qkv.shape
    kv_heads, size = keys.shape[2:]
    qkv = qkv.view(tokens, width // size, size)
    heads = qkv.shape[1] - 2 * kv_heads
    x = norm(qkv, eps=eps)
    x[:, :heads].mul_(q_norm)
    x = x[:, : heads + kv_heads]
    x[:, heads:].mul_(k_norm)
    x = torch.addcmul(x * plan.cos, x.roll(size // 2, -1), plan.sin).to(qkv.dtype)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    keys.index_copy_(0, plan.slots, x[:, heads:])
    values.index_copy_(0, plan.slots, qkv[:, heads + kv_heads :])
    return reference.attend(x[:, :heads], keys, values, plan)


CPU = attrs.evolve(REFERENCE, plan=plan, norm_linear=norm_linear, norm_gate=norm_gate, head=head, attend_=attend_)
