"""The ops of the vision encoder in plain PyTorch, and of pictures in Pillow; see `kernels/reference.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mllm.batch import PatchBatch
from mllm.config import VisionConfig
from mllm.kernels.rotary import axial, rotate_pairs
from mllm.state import State, state
from mllm.weights import Merger, TapMerger, VisionWeights

EPS = 1e-6  # of every layer norm of the encoder; not a key of config.json


@state
class VisionPlan(State):
    """Computed once per image batch: `cos`, `sin` f32 [X 1 Dv/2] and the (first, last + 1) patches of each image."""

    cos: Tensor
    sin: Tensor
    spans: tuple[tuple[int, int], ...]
    heads: int


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """A picture's bytes [rows columns 3] at another size [height width 3], by Pillow on the host."""
    picture = Image.fromarray(pixels.cpu().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).to(pixels.device)


def cut(pixels: Tensor, *, patch: int, merge: int) -> Tensor:
    """A picture's bytes [height width 3], one row per patch: channel, then row, then column in the patch. Patches that
    merge into one token are neighbours."""
    height, width, channels = pixels.shape
    tiles = pixels.view(height // patch // merge, merge, patch, width // patch // merge, merge, patch, channels)
    return tiles.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * patch**2)


def patch_embed(batch: PatchBatch, weights: VisionWeights, *, config: VisionConfig) -> Tensor:
    """Bytes to features: normalise, project, add the learned position grid stretched over each image."""
    pixels = batch.patches.view(-1, config.in_channels, config.patch_size**2).float()
    mean = torch.tensor(batch.mean, dtype=pixels.dtype, device=pixels.device).view(-1, 1)
    std = torch.tensor(batch.std, dtype=pixels.dtype, device=pixels.device).view(-1, 1)
    pixels = ((pixels / 255 - mean) / std).flatten(1)
    x = F.linear(pixels.to(weights.patch.dtype), weights.patch, weights.patch_bias)
    return x + position_embedding(batch.coords, weights.position).to(x.dtype)


def position_embedding(coords: Tensor, table: Tensor) -> Tensor:
    """The learned grid at each patch, bilinear between its entries with the corners aligned: [X Ev].

    `coords` [4 X] are row, column, rows, columns; `table` [W Ev] is a square grid.
    """
    side = math.isqrt(len(table))
    place = coords[:2].float() * (side - 1) / (coords[2:] - 1).clamp(min=1)
    low = place.long()  # floor: a place is never negative
    high = (low + 1).clamp(max=side - 1)
    part = (place - low).unsqueeze(-1).to(table.dtype)
    top = torch.lerp(table[low[0] * side + low[1]], table[low[0] * side + high[1]], part[1])
    bottom = torch.lerp(table[high[0] * side + low[1]], table[high[0] * side + high[1]], part[1])
    return torch.lerp(top, bottom, part[0])


def vision_plan(batch: PatchBatch, *, config: VisionConfig) -> VisionPlan:
    """2-D rotary tables: the first half of the frequencies turns with the row, the second with the column."""
    cos, sin = axial(batch.coords[:2], head_dim=config.head_dim, theta=config.rope_theta)
    return VisionPlan(
        cos=cos,
        sin=sin,
        spans=batch.spans(),
        heads=config.num_heads,
    )


def layer_norm_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x, F.linear(F.layer_norm(x, x.shape[1:], eps=EPS), weight, bias)


def attend_images(qkv: Tensor, plan: VisionPlan) -> Tensor:
    """Every patch attends to all patches of its image: qkv [X Cv] -> [X Ev]."""
    q, k, v = qkv.view(len(qkv), 3, plan.heads, -1).unbind(1)
    q, k = rotate_pairs(q, plan.cos, plan.sin), rotate_pairs(k, plan.cos, plan.sin)
    parts = []
    for a, b in plan.spans:
        image_q, image_k, image_v = (x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        y = F.scaled_dot_product_attention(image_q, image_k, image_v)
        parts.append(y.squeeze(0).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def linear_bias_add(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return F.linear(y, weight, bias).add_(x)


def layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x, F.gelu(layer_norm_linear(x, weight, bias)[1], approximate="tanh")


def merge(x: Tensor, weights: Merger | TapMerger) -> tuple[Tensor, Tensor]:
    """Neighbouring patches (adjacent rows of x) to one feature: [X Ev] -> [M E].

    The width of the norm tells whether patches are normalised one by one or after they are joined.
    """
    y = F.layer_norm(x.view(-1, len(weights.norm)), weights.norm.shape, weights.norm, weights.norm_bias, EPS)
    y = F.gelu(F.linear(y.view(-1, weights.up.shape[1]), weights.up, weights.up_bias))  # exact, unlike the blocks'
    return x, F.linear(y, weights.down, weights.down_bias)


def features(merged: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(merged))
