"""The vision encoder: image patches to features of the decoder's width, once per image."""

from __future__ import annotations

from mllm.batch import PatchBatch, VisionTokens
from mllm.config import VisionConfig
from mllm.kernels.ops import Merged, Ops, Plan, Stream
from mllm.weights import Block, VisionWeights


def block(x: Stream, w: Block, plan: Plan, *, ops: Ops) -> Stream:
    """One layer of the encoder on the residual stream x [X Ev]."""
    x, qkv = ops.layer_norm_linear(x, w.qkv, w.qkv_bias)
    x = ops.linear_bias_add(ops.attend_images(qkv, plan), w.out, w.out_bias, x)
    x, g = ops.layer_norm_gelu(x, w.up, w.up_bias)
    return ops.linear_bias_add(g, w.down, w.down_bias, x)


def vit(weights: VisionWeights, patches: PatchBatch, *, config: VisionConfig, ops: Ops) -> VisionTokens:
    """Features of all images of a batch: M = X / merge**2 tokens, and J deepstack features for each."""
    plan = ops.vision_plan(patches, config=config)
    x = ops.patch_embed(patches, weights, config=config)
    taps: dict[int, Merged] = {}
    for index, w in enumerate(weights.blocks):
        x = block(x, w, plan, ops=ops)
        if index in config.deepstack_visual_indexes:
            x, taps[index] = ops.merge(x, weights.taps[config.deepstack_visual_indexes.index(index)])
    # the taps in the order of the layers they were taken from, which is the order of the layers they go to
    _, last = ops.merge(x, weights.merger)
    made = ops.features([last, *taps.values()])
    return VisionTokens(embed=made[0], deep=made[1:], at=patches.at)
