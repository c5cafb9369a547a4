"""The op tables of NVIDIA GPUs for the vision encoder: products with what follows them, fused kernels between them."""

from __future__ import annotations

from functools import lru_cache, partial

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mllm.batch import PatchBatch, joined
from mllm.config import VisionConfig
from mllm.kernels import flash, flash_hopper, mergers, patches, products, resize, rope, tall
from mllm.kernels.norm import Stream
from mllm.kernels.ops import Ops, Qkv
from mllm.kernels.reference_vision import EPS
from mllm.state import State, state, tensor
from mllm.weights import VisionWeights

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
    9.0 and up; `hopper`: 9.0 itself, whose tensor cores have an attention and products of their own, which are a chain."""
    return attrs.evolve(
        ops,
        resize=resize.resize,
        cut=patches.cut,
        patch_embed=partial(patch_embed, pdl=hopper),
        vision_plan=partial(vision_plan, captured=captured, pdl=hopper),
        layer_norm_linear=partial(layer_norm_linear, pdl=hopper),
        attend_images=partial(attend_images, wide=wide, hopper=hopper),
        linear_bias_add=partial(linear_bias_add, pdl=hopper),
        layer_norm_gelu=partial(layer_norm_gelu, pdl=hopper),
        merge=partial(mergers.merge, pdl=hopper),
        features=partial(mergers.features, pdl=hopper),
    )


def patch_embed(
    batch: PatchBatch, weights: VisionWeights, *, config: VisionConfig, pdl: bool
) -> Stream | products.Unadded:
    affine = _affine(batch.mean, batch.std, batch.patches.device)
    values, position = patches.enter(batch.patches, batch.coords, *affine, weights.position, pdl=pdl)
    return linear_bias_add(values, weights.patch, weights.patch_bias, position, pdl=pdl)


@lru_cache(maxsize=1024)  # as in `rope.frequencies`
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(byte / 255 - mean) / std as byte * scale + shift, f32 [channels] each."""
    middle, spread = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (mean, std))
    scale, shift = 1 / (255 * spread), -middle / spread
    return scale.float().to(device), shift.float().to(device)


def vision_plan(batch: PatchBatch, *, config: VisionConfig, captured: bool, pdl: bool) -> VisionPlan:
    frequencies = rope.frequencies(config.head_dim // 4, config.rope_theta, batch.coords.device)
    cos, sin = rope.axial(batch.coords, frequencies, pdl=pdl)
    return VisionPlan(
        cos=cos, sin=sin, indptr=batch.indptr, spans=() if captured else batch.spans(), heads=config.num_heads
    )


def layer_norm_linear(x: Stream | products.Unadded, weight: Tensor, bias: Tensor, *, pdl: bool) -> tuple[Tensor, Qkv]:
    product = partial(products.Unmade, bias=bias) if pdl else partial(products.linear, bias=bias, pdl=False)
    return products.normed(x, None, weight, eps=EPS, product=product, epilogue="turn", pdl=pdl)


def attend_images(qkv: Tensor | products.Unmade, plan: VisionPlan, *, wide: bool, hopper: bool) -> Tensor:
    x, width = (tall.tensor_of(qkv.x), len(qkv.weight)) if isinstance(qkv, products.Unmade) else (qkv, qkv.shape[1])
    count, heads = len(x), plan.heads
    size = width // (3 * heads)
    tile = flash_hopper.image_tile(count, heads, size, x.dtype) if hopper else None
    each = bool(plan.spans) and tile is None
    scale = 1.0 if each else size**-0.5 * flash.LOG2E
    q, k, v = products.turned(qkv, plan.cos, plan.sin, heads, scale=scale, pdl=hopper)
    if each:
        return _attend_each(q, k, v, plan.spans)
    if tile is not None:
        return flash_hopper.images(q, k, v, plan.indptr, tile=tile, pdl=hopper)
    return flash.images(q, k, v, plan.indptr, tile=flash.tile_for(count, size, wide=wide), boxed=wide, pdl=hopper)


def _attend_each(q: Tensor, k: Tensor, v: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """[X Ev]: the images one by one, by PyTorch."""
    parts = []
    with sdpa_kernel(BACKENDS, set_priority=True):
        for a, b in spans:
            image_q, image_k, image_v = (x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            y = F.scaled_dot_product_attention(image_q, image_k, image_v)
            parts.append(y.squeeze(0).transpose(0, 1).flatten(1))
    return joined(parts)


def linear_bias_add(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, *, pdl: bool) -> Stream | products.Unadded:
    return products.Unadded(y, weight, x, bias) if pdl else products.added(y, weight, x, bias, pdl=False)


def layer_norm_gelu(x: Stream | products.Unadded, weight: Tensor, bias: Tensor, *, pdl: bool) -> tuple[Tensor, Tensor]:
    product = partial(products.linear, bias=bias, gelu="tanh", pdl=pdl)
    return products.normed(x, None, weight, eps=EPS, product=product, epilogue="other", pdl=pdl)
