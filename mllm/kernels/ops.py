"""The ops of a model as one record of callables: the stages say *what* runs, a table of ops says *how*.

A table belongs to a device. Another table is `attrs.evolve(REFERENCE, norm_linear=...)`, which is also how a
numeric difference is bisected. Only an op whose name ends in `_` writes to its arguments, and only to those that its
comment says it writes. Shapes are those of `mllm.state.LEGEND`; `x` is the residual stream [T E], in vision [X Ev]. A table
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
    embed: Callable[[Tensor, Tensor], Stream]  # tokens [T], table [V E] -> x [T E]
    # batch, config, page_size, dtype -> rotary tables and what attention needs
    plan: Callable[..., Plan]
    norm_linear: Callable[..., tuple[Stream, Qkv]]  # x, norm [E], weight [C E], eps -> x, norm(x) @ weight.T [T C]
    # qkv [T C], q_norm [D], k_norm [D], plan, keys, values [P S K D], eps -> heads [T A]; writes keys, values
    attend_: Callable[..., Heads]
    linear_add: Callable[..., Stream]  # heads [T A] or y [T F], weight [E ...], x -> x + y @ weight.T
    norm_gate: Callable[..., tuple[Stream, Tensor]]  # x, norm [E], weight [G E], eps -> x, silu(gate) * up [T F]
    # x, last [Q], norm, weight [V E], eps -> logits f32 [Q V] of the positions `last`, or of all where that is None
    head: Callable[..., Tensor]
    # x, weights, keys, values [L P S K D], plan, eps -> logits f32 [B V] of a decode step, all layers and the head at once,
    # or None: layer by layer, as above; writes keys, values
    whole_: Callable[..., Tensor | None]
    # x, at [M], rows [M E] -> x with the rows at the positions of image tokens, of which negative ones pad; writes x
    put_: Callable[..., Stream]
    add_: Callable[..., Stream]  # as `put_`, with the rows added to what is there
    # after the decoder
    sample: Callable[..., Tensor]  # logits [B V], sampling, lengths [B] -> tokens i32 [B], or NOT_FINITE
    # batch, tokens [B], page_size; writes tokens, positions, slots and lengths of the batch
    advance_: Callable[..., None]
    # vision encoder
    # pixels uint8 [rows columns 3], height, width -> uint8 [height width 3], as Pillow's bicubic
    resize: Callable[..., Tensor]
    cut: Callable[..., Tensor]  # pixels uint8 [height width 3], patch, merge -> patches uint8 [X U]
    patch_embed: Callable[..., Stream]  # batch, weights, config -> x [X Ev]
    vision_plan: Callable[..., Plan]  # batch, config -> rotary tables and image bounds
    # x, weight [Cv Ev], bias -> x, norm(x) @ weight.T + bias; a block's norms have no weights: `weights.weight_after_norm`
    layer_norm_linear: Callable[..., tuple[Stream, Qkv]]
    attend_images: Callable[..., Tensor]  # qkv [X Cv], plan -> [X Ev]
    linear_bias_add: Callable[..., Stream]  # y, weight, bias, x -> x + y @ weight.T + bias
    layer_norm_gelu: Callable[..., tuple[Stream, Tensor]]  # x, weight [Fv Ev], bias -> x, gelu_tanh(...) [X Fv]
    merge: Callable[..., tuple[Stream, Merged]]  # x [X Ev], Merger or TapMerger -> x, features [M E]
    features: Callable[..., Tensor]  # what `merge` made of n streams -> [n M E]
