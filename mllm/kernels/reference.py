"""Every op in plain PyTorch: the definition that every other table is tested against.

Nothing here reads a number on the host in decode, so the same table can be recorded as a CUDA graph; prefill and
vision loop over the requests of a batch and read their bounds.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.batch import ForwardBatch, SamplingBatch
from mllm.config import TextConfig
from mllm.kernels import reference_vision as vision
from mllm.kernels.noise import gumbel
from mllm.kernels.ops import NOT_FINITE, Ops
from mllm.kernels.rotary import mrope, rotate
from mllm.state import State, state, tensor


@state
class AttentionPlan(State):
    """Computed once per forward pass. `cos`, `sin`: f32, half a head wide, with an axis for the heads.

    Decode: `context[b, i]` is the slot of token i of row b (its first token's beyond the end, so that what is
    masked is at least of the same row, and finite when the row is) and `mask` is 0 inside the row, -inf beyond.
    Prefill: `spans` are (first, last + 1) tokens of each row in the batch, `contexts` the slots of its context.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor = tensor("T", torch.int64)
    context: Tensor | None
    mask: Tensor | None
    spans: tuple[tuple[int, int], ...]
    contexts: tuple[Tensor, ...]


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    return F.embedding(tokens, table)


def plan(batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype) -> AttentionPlan:
    cos, sin = mrope(batch.positions, head_dim=config.head_dim, theta=config.rope_theta, sections=config.mrope_section)
    slots = (batch.pages.long() * page_size).unsqueeze(-1) + torch.arange(page_size, device=batch.pages.device)
    slots = slots.flatten(1)  # [B N*S]: the slot of every token that a row can hold
    context = mask = None
    spans: tuple[tuple[int, int], ...] = ()
    contexts: tuple[Tensor, ...] = ()
    if batch.tokens.shape == batch.lengths.shape:  # one token a row
        inside = torch.arange(slots.shape[1], device=slots.device) < batch.lengths.clamp(min=1).unsqueeze(1)
        context = torch.where(inside, slots, slots[:, :1])
        mask = torch.where(inside, 0.0, -torch.inf).to(dtype)[:, None, None]
    else:
        rows = batch.rows()
        spans = tuple(pairwise(accumulate((count for count, _ in rows), initial=0)))
        contexts = tuple(row[:length] for row, (_, length) in zip(slots, rows, strict=True))
    return AttentionPlan(
        cos=cos, sin=sin, slots=batch.slots, context=context, mask=mask, spans=spans, contexts=contexts
    )


def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    return x, F.linear(F.rms_norm(x, norm.shape, norm, eps), weight)


def attend_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: AttentionPlan, keys: Tensor, values: Tensor, *, eps: float
) -> Tensor:
    """Normalise and rotate queries and keys, write keys and values to the pool, attend to the whole context."""
    tokens, width = qkv.shape
    kv_heads, size = keys.shape[2:]
    qkv = qkv.view(tokens, width // size, size)
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    q = rotate(F.rms_norm(q, q_norm.shape, q_norm, eps), plan.cos, plan.sin)
    k = rotate(F.rms_norm(k, k_norm.shape, k_norm, eps), plan.cos, plan.sin)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # [P*S K D]: views, one row a slot
    keys.index_copy_(0, plan.slots, k)
    values.index_copy_(0, plan.slots, v)
    return attend(q, keys, values, plan)


def attend(q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
    """Queries [T H D] over the contexts of their rows, whose keys and values are in the pool [P*S K D]: [T A]."""
    if plan.context is not None:
        return _attend_rows(q, keys, values, plan.context, plan.mask)
    parts = zip(plan.spans, plan.contexts, strict=True)
    return torch.cat([_attend_span(q[a:b], keys[context], values[context]) for (a, b), context in parts])


def _attend_rows(q: Tensor, keys: Tensor, values: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """One query token a row: q [B H D], context [B n] -> [B A]. The heads of a group attend as one block of
    queries, so keys and values are read once a group."""
    rows, heads, size = q.shape
    kv_heads = keys.shape[1]
    k = keys.index_select(0, context.flatten()).view(rows, -1, kv_heads, size).transpose(1, 2)
    v = values.index_select(0, context.flatten()).view(rows, -1, kv_heads, size).transpose(1, 2)
    q = q.view(rows, kv_heads, heads // kv_heads, size)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(rows, heads * size)


def _attend_span(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last t tokens of one context of n: q [t H D], k and v [n K D] -> [t A]."""
    count, length = len(q), len(k)
    mask = None
    if count < length:  # the chunk follows cached tokens; is_causal would align it with the first of them
        mask = torch.ones(count, length, dtype=torch.bool, device=q.device).tril(length - count)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1).reshape(count, -1)


def linear_add(y: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(x, y, weight.T)


def norm_gate(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    gate, up = norm_linear(x, norm, weight, eps=eps)[1].chunk(2, -1)
    return x, F.silu(gate).mul_(up)


def head(x: Tensor, last: Tensor | None, norm: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return norm_linear(x if last is None else x.index_select(0, last), norm, weight, eps=eps)[1].float()


def whole_(*args: object, **settings: object) -> None:
    """Layer by layer."""


def put_(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    live = at >= 0
    return x.index_copy_(0, at[live], rows[live].to(x.dtype))


def add_(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    live = at >= 0
    return x.index_add_(0, at[live], rows[live].to(x.dtype))


def sample(logits: Tensor, sampling: SamplingBatch, lengths: Tensor) -> Tensor:
    """The next token of each row; see `mllm.sampling.Sampling`."""
    best = logits.argmax(-1)
    if not sampling.greedy:
        temperature = sampling.temperature.unsqueeze(1)
        scaled = logits - logits.amax(-1, keepdim=True)  # or a tiny temperature makes infinities of the likeliest
        scaled = scaled / torch.where(temperature > 0, temperature, 1.0)
        scaled = torch.where(kept(scaled, sampling), scaled, -torch.inf)
        drawn = (scaled + gumbel(sampling.seed, lengths, logits.shape[1])).argmax(-1)
        best = torch.where(sampling.temperature > 0, drawn, best)
    finite = logits.sum(-1).isfinite()  # a NaN or an infinity anywhere in the row shows in its sum
    return torch.where(finite, best, NOT_FINITE).int()


def kept(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """Which tokens may be drawn: bool [B V]. The k likeliest; of those the likeliest whose probabilities reach
    top_p; of those the ones with at least min_p times the probability of the likeliest."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1]).unsqueeze(1)
    ranked = torch.where(rank < limit, ranked, -torch.inf)
    chance = ranked.softmax(-1)
    before = chance.cumsum(-1) - chance
    reach = torch.where(sampling.top_p < 1, sampling.top_p, torch.inf).unsqueeze(1)  # a sum rounds up to 1 early
    keep = (rank < limit) & ((before < reach) | (rank == 0))
    chance = torch.where(keep, ranked, -torch.inf).softmax(-1)
    keep &= chance >= sampling.min_p.unsqueeze(1) * chance[:, :1]
    return torch.empty_like(keep).scatter_(1, order, keep)


def advance_(batch: ForwardBatch, tokens: Tensor, *, page_size: int) -> None:
    """Make `tokens` the newest of each row, one position and one slot further; padding rows stay where they are."""
    live = (batch.lengths > 0).int()
    batch.tokens.copy_(tokens.clamp(min=0))  # a row that failed goes on with some token until the host ends it
    batch.positions.add_(live)
    index = batch.lengths.long()  # of the newest token: the old length
    batch.lengths.add_(live)
    page = (index // page_size).clamp(max=batch.pages.shape[1] - 1)
    slots = batch.pages.gather(1, page.unsqueeze(1)).squeeze(1).long() * page_size + index % page_size
    batch.slots.copy_(torch.where(live.bool(), slots, batch.slots))


REFERENCE = Ops(
    embed=embed,
    plan=plan,
    norm_linear=norm_linear,
    attend_=attend_,
    linear_add=linear_add,
    norm_gate=norm_gate,
    head=head,
    whole_=whole_,
    put_=put_,
    add_=add_,
    sample=sample,
    advance_=advance_,
    resize=vision.resize,
    cut=vision.cut,
    patch_embed=vision.patch_embed,
    vision_plan=vision.vision_plan,
    layer_norm_linear=vision.layer_norm_linear,
    attend_images=vision.attend_images,
    linear_bias_add=vision.linear_bias_add,
    layer_norm_gelu=vision.layer_norm_gelu,
    merge=vision.merge,
    features=vision.features,
)
