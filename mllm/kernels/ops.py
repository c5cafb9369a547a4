"""The ops of a model as one record of callables: the stages say *what* runs, a table of ops says *how*.

A table belongs to a device. Another table is `attrs.evolve(REFERENCE, norm_linear=...)`, which is also how a
numeric difference is bisected. Only an op whose name ends in `_` writes to its arguments, and only to those named
in its comment. Shapes are those of `mllm.state.LEGEND`; `x` is the residual stream [T E], in vision [X Ev]. A table
may keep it in a form of its own, as long as all of its ops agree: the stages only hand it on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor

NOT_FINITE = -1
"""The token that `sample` gives a row whose logits hold a NaN or an infinity."""

Stream = Any  # the residual stream in a table's own form; the ops that read all of it hand it back, for the next to use
Qkv = Any  # what attention is made of: [T C], in vision [X Cv], or a table's own form of it
Heads = Any  # what attention hands to the product after it: [T A], or a table's own form of it
Merged = Any  # features [M E] of the decoder's width, or what they are made of when the last layer is through
Plan = Any  # what a table computes once per forward pass and uses in every layer; its own business


@attrs.frozen(kw_only=True)
class Ops:
    """How each op runs on one kind of device. `kernels/reference.py` defines what each computes."""

    # decoder
    embed: Callable[[Tensor, Tensor], Stream]  # tokens [T], table [V E] -> [T E]
    plan: Callable[..., Plan]  # batch, config -> rotary tables and what attention needs
    norm_linear: Callable[..., tuple[Tensor, Qkv]]  # x, norm [E], weight [C E], eps -> x [T E], [T C]
    attend_: Callable[..., Heads]  # qkv [T C], q_norm, k_norm, plan, keys, values [P S K D], eps -> heads; keys, values
    linear_add: Callable[..., Stream]  # y, weight, x -> x + y @ weight.T
    norm_gate: Callable[..., tuple[Stream, Tensor]]  # x, norm [E], weight [G E], eps -> x, silu(gate) * up [T F]
    # x, last [Q], norm, weight [V E], eps -> logits f32 [Q V] of the positions `last`, or of all where that is None
    head: Callable[..., Tensor]
    # x, weights, keys, values [L P S K D], plan, eps -> logits f32 [B V] of a decode step, all layers and the head at once;
    # None: layer by layer, as above; keys, values
    whole_: Callable[..., Tensor | None]
    # at the positions of image tokens; a negative one pads the batch
    put_: Callable[..., Stream]  # x, at [M], rows [M E] -> x; x
    add_: Callable[..., Stream]  # x, at [M], rows [M E] -> x; x
    # after the decoder
    sample: Callable[..., Tensor]  # logits [B V], sampling, lengths [B] -> tokens i32 [B], -1 where not finite
    advance_: Callable[..., None]  # batch, tokens [B], page size; tokens, positions, slots, lengths of the batch
    # vision encoder
    resize: Callable[
        ..., Tensor
    ]  # pixels uint8 [rows columns 3], height, width -> uint8 [height width 3], as Pillow's bicubic
    cut: Callable[..., Tensor]  # pixels uint8 [height width 3], patch, merge -> patches uint8 [X U]
    patch_embed: Callable[..., Stream]  # batch, weights, config -> [X Ev]
    vision_plan: Callable[..., Plan]  # batch, config -> rotary tables and image bounds
    # the layer norms of a block have no weights: `weights.weight_after_norm`
    layer_norm_linear: Callable[..., tuple[Stream, Qkv]]  # x, weight, bias -> x, qkv
    attend_images: Callable[..., Tensor]  # qkv, plan -> [X Ev]
    linear_bias_add: Callable[..., Stream]  # y, weight, bias, x -> x + y @ weight.T + bias
    layer_norm_gelu: Callable[..., tuple[Stream, Tensor]]  # x, weight, bias -> x, gelu_tanh(...) [X Fv]
    merge: Callable[..., tuple[Stream, Merged]]  # x [X Ev], Merger or TapMerger -> x, [M E]
    features: Callable[..., Tensor]  # what `merge` made of n streams -> [n M E]
