"""A forward pass over packed batches (see `mllm.signs.data`), with the modules and weights of transformers' model.

transformers' own forward pass pads prompts and attends picture by picture; this one computes the same function, which
`tests/test_signs_train.py` checks, without either. The ablations of the model card are switches here, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import Qwen3VLForConditionalGeneration

from mllm.kernels import rotary
from mllm.kernels.rotary import rotate
from mllm.signs.data import Batch


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, *, causal: bool) -> Tensor:
    """Attention within each segment; [tokens, heads, head size]."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        kind: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
        if "window_size" not in inspect.signature(varlen_attn).parameters:  # torch before 2.11
            kind = {"is_causal": causal}
        call: Any = varlen_attn
        return call(q.contiguous(), k.contiguous(), v.contiguous(), starts, starts, longest, longest, **kind)
    sizes = starts.diff().tolist()
    parts = zip(*(x.transpose(0, 1).split(sizes, 1) for x in (q, k, v)), strict=True)
    mixed = [F.scaled_dot_product_attention(a, b, c, is_causal=causal) for a, b, c in parts]
    return torch.cat(mixed, 1).transpose(0, 1)


# The parts between attentions, as functions of the weights' modules, so that they can be compiled one by one ---------


def _patches(proj: Any, patches: Tensor, noise: float) -> Tensor:
    pixels = patches.float() / 127.5 - 1
    if noise:
        pixels = (pixels + noise * torch.randn_like(pixels)).clamp(-1, 1)
    # Both frames of the temporal patch are the same picture, so their weights add up
    return F.linear(pixels, proj.weight.sum(2).flatten(1), proj.bias).float()


def _vision_in(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, -1, 2 * cos.shape[-1])).unbind(1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def _vision_out(block: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + block.attn.proj(mixed.flatten(1))
    return hidden + block.mlp(block.norm2(hidden))


def _text_in(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, own, size = layer.input_layernorm(hidden), layer.self_attn, 2 * cos.shape[-1]
    v = own.v_proj(x).unflatten(-1, (-1, size))
    q = rotate(own.q_norm(own.q_proj(x).unflatten(-1, (-1, size))), cos, sin).to(v.dtype)
    k = rotate(own.k_norm(own.k_proj(x).unflatten(-1, (-1, size))), cos, sin).to(v.dtype)
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _text_out(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(mixed.flatten(1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


PARTS: dict[str, Callable[..., Any]] = {
    "patches": _patches, "vision in": _vision_in, "vision out": _vision_out, "text in": _text_in, "text out": _text_out
}  # fmt: skip


COMPILED: dict[str, Callable[..., Any]] = {}


def compile_parts() -> None:
    """Fuse what is between the attentions, for training: faster on a GPU, after half a minute."""
    COMPILED.update({name: torch.compile(part, dynamic=True) for name, part in PARTS.items() if name != "patches"})


def part(name: str) -> Callable[..., Any]:
    return (COMPILED if torch.is_grad_enabled() and name in COMPILED else PARTS)[name]


def encode(model: Qwen3VLForConditionalGeneration, batch: Batch, noise: float = 0.0) -> list[Tensor]:
    """Features of all pictures, one row a merged token: the encoder's, then those of each deepstack tap."""
    visual, config = model.model.visual, model.config.vision_config
    if not len(batch["patches"]):
        return [batch["patches"].new_zeros(0, config.out_hidden_size, dtype=torch.float32)]
    hidden = part("patches")(visual.patch_embed.proj, batch["patches"], noise)
    row, column, rows, columns = batch["places"].float()
    hidden = hidden + _position_grid(visual.pos_embed.weight, row / (rows - 1), column / (columns - 1))
    size = config.hidden_size // config.num_heads
    cos, sin = rotary.axial(batch["places"][:2], head_dim=size, theta=10_000.0)
    longest = int(batch["longest"][0])
    taps = []
    for number, block in enumerate(visual.blocks):
        q, k, v = part("vision in")(block, hidden, cos, sin)
        mixed = attend(q, k, v, batch["vision_starts"], longest, causal=False)
        hidden = part("vision out")(block, hidden, mixed)
        if number in config.deepstack_visual_indexes:
            taps.append(visual.deepstack_merger_list[list(config.deepstack_visual_indexes).index(number)](hidden))
    return [visual.merger(hidden), *taps]


def _position_grid(table: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """The square table of position embeddings at shares 0 to 1 of its sides, bilinear between its entries."""
    entries = torch.arange(int(len(table) ** 0.5), device=table.device)
    down, across = ((1 - (x[:, None] * (len(entries) - 1) - entries).abs()).clamp(min=0) for x in (down, across))
    return (down[:, :, None] * across[:, None, :]).flatten(1) @ table


def decode(model: Qwen3VLForConditionalGeneration, batch: Batch, features: list[Tensor], *, taps: bool = True,
           flat: bool = False) -> Tensor:  # fmt: skip
    """Logits for the answers' tokens. Ablations: without deepstack `taps`; with `flat`, one-dimensional positions."""
    text, config = model.model.language_model, model.config.text_config
    hidden, at, row = text.embed_tokens(batch["ids"]), batch["shown_at"], batch["shown_row"]
    hidden = hidden.index_fill(0, at, 0).index_add(0, at, features[0].index_select(0, row).float())
    positions = batch["positions"]
    if flat:
        starts = batch["starts"]
        first = torch.repeat_interleave(starts[:-1], starts.diff())
        positions = (torch.arange(len(first), device=first.device) - first).expand(3, -1)
    rope = config.rope_parameters
    cos, sin = rotary.mrope(
        positions, head_dim=config.head_dim, theta=rope["rope_theta"], sections=rope["mrope_section"]
    )
    longest = int(batch["longest"][1])
    for number, layer in enumerate(text.layers):
        q, k, v = part("text in")(layer, hidden, cos, sin)
        mixed = attend(q, k, v, batch["starts"], longest, causal=True)
        hidden = part("text out")(layer, hidden, mixed)
        if taps and number + 1 < len(features):
            hidden = hidden.index_add(0, at, features[number + 1].index_select(0, row).float())
    return model.lm_head(text.norm(hidden[batch["at"]]))


def right_answers(model: Qwen3VLForConditionalGeneration, batch: Batch, **ablation: bool) -> Tensor:
    """For each prompt, whether every token of its answer is the likeliest one.

    That is the case exactly if greedy decoding gives the answer.
    """
    with torch.no_grad():
        logits = decode(model, batch, encode(model, batch), **ablation)
    wrong = logits.argmax(-1) != batch["labels"]
    mistakes = torch.zeros(len(batch["starts"]) - 1, device=logits.device)
    return mistakes.index_add(0, batch["owner"], wrong.float()) == 0
