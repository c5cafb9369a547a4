"""The decoder itself: layers over a ragged batch, whatever its rows are doing. `prefill` and `decode` are its uses."""

from __future__ import annotations

from torch import Tensor

from mllm.batch import ForwardBatch, VisionTokens
from mllm.cache import KVPool
from mllm.config import TextConfig
from mllm.kernels.ops import Ops, Plan, Stream
from mllm.weights import Layer, TextWeights


def layer(
    x: Stream, w: Layer, keys: Tensor, values: Tensor, plan: Plan, *, eps: float, ops: Ops, last: Tensor | None = None
) -> Stream:
    """One decoder layer on the residual stream x [T E]; writes `keys`, `values` [P S K D] at the batch's slots.

    With `last` [Q] only those positions of the stream are wanted, and given: [Q E].
    """
    x, qkv = ops.norm_linear(x, w.norm_in, w.qkv, eps=eps)
    y = ops.attend_(qkv, w.q_norm, w.k_norm, plan, keys, values, eps=eps)
    if last is not None:
        x, y = x.index_select(0, last), y.index_select(0, last)
    x = ops.linear_add(y, w.out, x)
    x, g = ops.norm_gate(x, w.norm_mlp, w.gate_up, eps=eps)
    return ops.linear_add(g, w.down, x)


def forward(
    weights: TextWeights,
    pool: KVPool,
    batch: ForwardBatch,
    vision: VisionTokens | None,
    *,
    config: TextConfig,
    ops: Ops,
) -> Tensor:
    """All layers: tokens to logits f32 [Q V] at the positions `batch.last`.

    Writes the keys and values of the batch's tokens to their slots of `pool`; the stage that calls it has taken it.
    """
    plan = ops.plan(batch, config=config, page_size=pool.keys.shape[2], dtype=weights.embed.dtype)
    x = ops.embed(batch.tokens, weights.embed)
    if vision is not None:
        x = ops.put_(x, vision.at, vision.embed)
    # a table may have one kernel for all of a decode step
    logits = ops.whole_(x, weights, pool.keys, pool.values, plan, eps=config.rms_norm_eps)
    if logits is not None:
        return logits
    deep = 0 if vision is None else len(vision.deep)
    # of the last layer a prompt needs no more than keys and values, but at the positions whose logits are wanted
    narrow = len(batch.last) < len(batch.tokens) and deep < len(weights.layers)
    for index, (w, keys, values) in enumerate(zip(weights.layers, pool.keys, pool.values, strict=True)):
        last = batch.last if narrow and index == len(weights.layers) - 1 else None
        x = layer(x, w, keys, values, plan, eps=config.rms_norm_eps, ops=ops, last=last)
        if vision is not None and index < deep:
            x = ops.add_(x, vision.at, vision.deep[index])
    return ops.head(x, None if narrow else batch.last, weights.norm, weights.head, eps=config.rms_norm_eps)
