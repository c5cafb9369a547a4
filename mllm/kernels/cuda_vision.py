"""The op table of NVIDIA GPUs for the vision encoder: cuBLAS with its epilogues, fused kernels between the products."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mllm.batch import PatchBatch
from mllm.config import VisionConfig
from mllm.kernels import flash, flash_hopper, patches, rope, tall
from mllm.kernels.norm import Pending, Stream, add_norm, split_linear
from mllm.kernels.ops import Ops, Qkv
from mllm.kernels.reference_vision import EPS
from mllm.state import State, state, tensor
from mllm.weights import Merger, TapMerger, VisionWeights

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Of PyTorch's attention, best first: cuDNN's is 1.5 times as fast as the next on an H200, and Orin's has none."""


@state
class VisionPlan(State):
    """Computed once per image batch: rotary tables f32 [X Dv/2] and the images' bounds.

    `spans` are the bounds on the host, for attention image by image; empty where a graph may record the pass.
    """

    cos: Tensor
    sin: Tensor
    indptr: Tensor = tensor("I+1")
    spans: tuple[tuple[int, int], ...]
    heads: int


def vision_ops(ops: Ops, *, captured: bool, wide: bool, hopper: bool = False) -> Ops:
    """`ops` with the encoder's. `captured`: nothing is read on the host, so that a graph can hold it. `wide`: capability
    9.0 and up; `hopper`: 9.0 itself, whose tensor cores have an attention of their own."""
    return attrs.evolve(
        ops,
        cut=patches.cut,
        patch_embed=patch_embed,
        vision_plan=partial(vision_plan, captured=captured),
        layer_norm_linear=partial(layer_norm_linear, hopper=hopper),
        attend_images=partial(attend_images, wide=wide, hopper=hopper),
        linear_bias_add=linear_bias_add,
        layer_norm_gelu=layer_norm_gelu,
        merge=merge,
    )


def patch_embed(batch: PatchBatch, weights: VisionWeights, *, config: VisionConfig) -> Tensor:
    scale, shift = _affine(batch.mean, batch.std, batch.patches.device)
    values = patches.normalise(batch.patches, scale, shift, dtype=weights.patch.dtype)
    x = F.linear(values, weights.patch, weights.patch_bias)
    return patches.add_position_(x, batch.coords, weights.position)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(byte / 255 - mean) / std as byte * scale + shift, f32 [channels] each."""
    spread = torch.tensor(std, dtype=torch.float64)
    scale, shift = 1 / (255 * spread), -torch.tensor(mean, dtype=torch.float64) / spread
    return scale.float().to(device), shift.float().to(device)


def vision_plan(batch: PatchBatch, *, config: VisionConfig, captured: bool) -> VisionPlan:
    frequencies = rope.frequencies(config.head_dim // 4, config.rope_theta, batch.coords.device)
    cos, sin = rope.axial(batch.coords, frequencies)
    return VisionPlan(
        cos=cos, sin=sin, indptr=batch.indptr, spans=() if captured else batch.spans(), heads=config.num_heads
    )


class Unmade(NamedTuple):
    """x [X K] @ weight [N K].T + bias, not made yet: attention does it, and turns queries and keys as it goes."""

    x: Tensor
    weight: Tensor
    bias: Tensor

    def made(self) -> Tensor:
        return F.linear(self.x, self.weight, self.bias)


def layer_norm_linear(
    x: Stream, norm: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, *, hopper: bool = False
) -> tuple[Stream, Qkv]:
    x, y = add_norm(x, norm, norm_bias, eps=EPS)
    product = Unmade(y, weight, bias)
    return x, product if hopper and tall.fits(y) and tall.turning_pays(len(y)) else product.made()


def attend_images(qkv: Tensor | Unmade, plan: VisionPlan, *, wide: bool, hopper: bool) -> Tensor:
    if isinstance(qkv, Unmade) and len(qkv.weight) == 3 * plan.heads * tall.HEAD:
        scale = tall.HEAD**-0.5 * flash.LOG2E
        q, k, v = tall.turned(qkv.x, qkv.weight, qkv.bias, plan.cos, plan.sin, scale=scale).unbind(1)
        return _attend(q, k, v, plan, tile=_hopper_tile(v), wide=wide)
    if isinstance(qkv, Unmade):
        qkv = qkv.made()
    v = qkv.view(len(qkv), 3, plan.heads, -1)[:, 2]
    tile = _hopper_tile(v) if hopper else None
    if plan.spans and tile is None:
        q, k = rope.rotate_heads(qkv, plan.cos, plan.sin, plan.heads)
        return _attend_each(q, k, v, plan.spans)
    q, k = rope.rotate_heads(qkv, plan.cos, plan.sin, plan.heads, scale=v.shape[2] ** -0.5 * flash.LOG2E)
    return _attend(q, k, v, plan, tile=tile, wide=wide)


def _hopper_tile(v: Tensor) -> flash_hopper.Tile | None:
    count, heads, size = v.shape
    return flash_hopper.image_tile(count, heads, size, v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: VisionPlan, *, tile: flash_hopper.Tile | None, wide: bool) -> Tensor:
    """[X Ev]: all images at once, within the bounds that the device knows."""
    if tile is not None:
        return flash_hopper.images(q, k, v, plan.indptr, tile=tile)
    return flash.images(q, k, v, plan.indptr, tile=flash.tile_for(len(v), v.shape[2], wide=wide), boxed=wide)


def _attend_each(q: Tensor, k: Tensor, v: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """[X Ev]: the images one by one, by PyTorch."""
    parts = []
    with sdpa_kernel(BACKENDS, set_priority=True):
        for a, b in spans:
            image_q, image_k, image_v = (x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            y = F.scaled_dot_product_attention(image_q, image_k, image_v)
            parts.append(y.squeeze(0).transpose(0, 1).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def linear_bias_add(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Stream:
    return Pending(x, split_linear(y, weight), bias)


def layer_norm_gelu(x: Stream, norm: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Stream, Tensor]:
    """The tanh form of GELU is an epilogue of cuBLAS."""
    x, y = add_norm(x, norm, norm_bias, eps=EPS)
    return x, torch._addmm_activation(bias, y, weight.T, use_gelu=True)


def merge(x: Stream, weights: Merger | TapMerger) -> Tensor:
    joined = weights.up.shape[1]
    if isinstance(x, Pending) and len(weights.norm) == joined:  # neighbours are joined first, so they are added first
        x = x.joined(joined)
    elif not isinstance(x, Pending):
        x = x.view(-1, len(weights.norm))
    y = add_norm(x, weights.norm, weights.norm_bias, eps=EPS)[1]
    y = F.gelu(F.linear(y.view(-1, joined), weights.up, weights.up_bias))  # exact, unlike the blocks'
    return F.linear(y, weights.down, weights.down_bias)
