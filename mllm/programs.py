"""The stages of a model as `generate` runs them: captured where that gains, over the KV pool that recordings belong to.

A recording takes tenths of a second, so on a GPU a model keeps its programs between calls. The stages themselves stay
what they are: every function here has the arguments and results of its stage, without the constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mllm import stages
from mllm.batch import ForwardBatch, PatchBatch, SamplingBatch, VisionTokens
from mllm.cache import KVPool
from mllm.errors import ImageError
from mllm.model import Model
from mllm.shelf import Lease, Programs
from mllm.state import Tree
from mllm.transform import capture, recorder_for

RECORDINGS = 1024
"""Recordings of the decode step, at most; the one not used for longest gives way. One for each size of batch, power of two
of listed pages, and way of drawing (`SamplingBatch`)."""
PADDED = 64
"""Recordings of prefill, and of the encoder, at most."""
INFERENCE = torch.inference_mode()
"""The mode that whole stages run in, never around a `yield`, which would hand it to the caller: a small model's step is a
tenth shorter without autograd's part in every call."""
Fn = TypeVar("Fn", bound=Callable[..., Any])


def new_lease(model: Model, pages: int, page_size: int) -> Lease:
    """Programs that have recorded nothing yet, over an empty pool of `pages` usable pages."""
    text = model.config.text
    pool = KVPool.empty(text, pages=pages, page_size=page_size, device=model.device, dtype=model.dtype)
    return Lease(make_programs(model), pool)


def make_programs(model: Model) -> Programs:
    """Programs that have recorded nothing yet."""
    recorder = recorder_for(model.device)
    wrap = partial(capture, evict=True, recorder=recorder)
    step: Tree = wrap(partial(_step, model), donate=("pool",), carry=("batch",), limit=RECORDINGS)
    prefill: Tree = partial(_prefill, model)
    vit: Tree = partial(_vit, model)
    if model.prompt_ops is not None:
        prefill = _if_padded(prefill, wrap(prefill, donate=("pool",), limit=PADDED))
    if model.vision_ops is not None:
        vit = _if_padded(vit, wrap(vit, limit=PADDED))
    reads = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
    step, prefill, vit = (_as_it_is(fn, model.device.type) for fn in (step, prefill, vit))
    return Programs(step=step, prefill=prefill, vit=vit, reads=reads)


def _as_it_is(fn: Fn, kind: str) -> Fn:
    """`INFERENCE`, and outside a caller's autocast, which would give what ops hand each other other dtypes."""
    inner = INFERENCE(fn)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(kind):
            return inner(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return inner(*args, **kwargs)

    return cast(Fn, call)


def _if_padded(fn: Callable[..., Tree], captured: Callable[..., Tree]) -> Callable[..., Tree]:
    """`captured` for batches that are padded to a size that comes again, `fn` for the others."""

    def call(*args: Tree, padded: bool) -> Tree:
        return captured(*args, padded=True) if padded else fn(*args, padded=False)

    return call


def _step(
    model: Model, pool: KVPool, batch: ForwardBatch, sampling: SamplingBatch
) -> tuple[KVPool, ForwardBatch, Tensor]:
    """One decode step, with the ops that are fastest for as many rows as the batch has."""
    ops = model.step_ops(len(batch.lengths))
    return stages.step(model.weights, pool, batch, sampling, config=model.config, ops=ops)


def _prefill(
    model: Model, pool: KVPool, batch: ForwardBatch, vision: VisionTokens | None, padded: bool
) -> tuple[KVPool, Tensor]:
    """One batch of prompt tokens."""
    ops = model.prompt_ops(len(batch.tokens)) if padded and model.prompt_ops else model.ops
    return stages.prefill(model.weights, pool, batch, vision, config=model.config, ops=ops)


def _vit(model: Model, patches: PatchBatch, padded: bool) -> VisionTokens:
    """The features of a batch of images. Raises `ImageError` where the model has no encoder."""
    if model.config.vision is None or model.weights.vision is None:
        raise ImageError("a model that reads only text was given an image")
    ops = model.vision_ops if padded and model.vision_ops else model.ops
    return stages.vit(model.weights.vision, patches, config=model.config.vision, ops=ops)
