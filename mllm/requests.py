"""Requests: prompts laid out, checked against the limits before anything runs, and their pictures cut into batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from PIL.Image import Image
from torch import Tensor

from mllm import images, prompts
from mllm.batch import PatchBatch, joined, padded_to, upload_all
from mllm.errors import ImageError, PromptError
from mllm.image_config import ImageConfig
from mllm.model import Model
from mllm.prompts import Expanded, Prompt
from mllm.sampling import Sampling

LARGER = 4
"""Pixels of a picture, for each that is left of it, up to which a GPU resizes it."""


@frozen(eq=False, kw_only=True)
class Request:
    """One prompt on its way: what to run, how many tokens to make of it, and why it would end there.

    `slots` counts the tokens whose keys and values it may come to hold: the last token made is never run.
    """

    index: int
    prompt: Prompt
    layout: Expanded
    sampling: Sampling
    new_tokens: int
    limit_reason: str
    slots: int

    @property
    def length(self) -> int:
        """Tokens of the prompt, image tokens counted."""
        return len(self.layout.tokens)

    def cut_to(self, slots: int) -> Request:
        """The same request where only `slots` tokens fit the KV pool, which is then why it ends."""
        return evolve(self, slots=slots, new_tokens=slots - self.length + 1, limit_reason="capacity")


def make(model: Model, prompt: Prompt, *, index: int, new_tokens: int, sampling: Sampling) -> Request:
    """Lay one prompt out. Raises `PromptError` or `ImageError` for what can never run."""
    if not isinstance(prompt, Prompt):
        raise TypeError(f"prompts[{index}]: expected a mllm.Prompt, got {type(prompt).__name__}; see mllm.prompt")
    config, context = model.config, model.config.text.max_position_embeddings
    try:
        layout = prompts.expand(
            prompt, model.images, config.image_token_id, config.text.vocab_size, video_token_id=config.video_token_id
        )
    except (PromptError, ImageError, TypeError) as error:
        raise type(error)(f"prompts[{index}]: {error}") from error
    _check_images(model, layout, index)
    length = len(layout.tokens)
    if length > context:
        raise PromptError(f"prompts[{index}]: {describe(layout)} exceed the model's context of {context} tokens")
    new = min(new_tokens, context - length + 1)
    return Request(
        index=index, prompt=prompt, layout=layout, sampling=sampling, new_tokens=new, limit_reason="length",
        slots=length + new - 1,
    )  # fmt: skip


def _check_images(model: Model, layout: Expanded, index: int) -> None:
    """Raises `ImageError` for a picture beyond the declared limit, which the encoder's memory was planned for."""
    limit = model.memory.image_pixels
    for number, (rows, cols) in enumerate(layout.grids):
        pixels = rows * cols * model.images.patch**2 if model.images else 0
        if pixels > limit:
            raise ImageError(
                f"prompts[{index}]: image {number} is {pixels} pixels after resizing, more than the {limit} that the memory "
                f"of {model.memory.device} has room for; scale it down, or load the model with a lower mem_fraction_static"
            )


def make_all(
    model: Model, prompts: Sequence[Prompt], new_tokens: int | Sequence[int], sampling: Sampling | Sequence[Sampling]
) -> list[Request]:
    """All prompts laid out and checked, before anything runs; the settings are one for all or one for each."""
    if isinstance(prompts, Prompt):
        raise TypeError("prompts: expected a sequence of prompts, got one; pass [prompt]")
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise TypeError(f"prompts: expected a sequence of prompts, got {type(prompts).__name__}")
    limits = _for_each(new_tokens, int, len(prompts), "max_new_tokens")
    settings = _for_each(sampling, Sampling, len(prompts), "sampling")
    for index, limit in enumerate(limits):
        check_limit("max_new_tokens" if isinstance(new_tokens, int) else f"max_new_tokens[{index}]", limit, 1)
    return [
        make(model, prompt, index=index, new_tokens=limit, sampling=own)
        for index, (prompt, limit, own) in enumerate(zip(prompts, limits, settings, strict=True))
    ]


def check_limit(name: str, value: object, low: int) -> None:
    """Raises `TypeError` or `ValueError` for a limit that is neither None nor a whole number of `low` or more."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number or None, got {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected {low} or more, got {value}")


def _for_each(value: Any, kind: type, count: int, name: str) -> list[Any]:
    """`value` for every prompt, or its items where it is a sequence with one for each."""
    values = [value] * count if isinstance(value, kind) else value
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: expected {kind.__name__} or a sequence of them, got {value!r}")
    if len(values) != count:
        raise ValueError(f"{name}: got {len(values)} values for {count} prompts")
    if wrong := [item for item in values if not isinstance(item, kind) or isinstance(item, bool)]:
        raise TypeError(f"{name}: expected {kind.__name__}, got {wrong[0]!r}")
    return list(values)


def describe(layout: Expanded) -> str:
    """How long a prompt is, in words: "1100 tokens (1024 of them image tokens)"."""
    total, pictured = len(layout.tokens), sum(layout.counts)
    return f"{total} tokens ({pictured} of them image tokens)" if pictured else f"{total} tokens"


def image_indices(starts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Index of every image token of a prompt, in order; image i has `counts[i]` of them from `starts[i]` on."""
    if not starts:
        return np.zeros(0, np.int64)
    return np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])


def image_batches(model: Model, request: Request) -> list[slice]:
    """The images of a request in order, in batches of at most as many patches as the largest declared picture has."""
    limit = model.memory.image_pixels // (model.images.patch**2 if model.images else 1)
    starts, patches = [0], 0
    for index, (rows, cols) in enumerate(request.layout.grids):
        patches += rows * cols
        if patches > limit and index > starts[-1]:
            starts.append(index)
            patches = rows * cols
    return [slice(a, b) for a, b in pairwise([*starts, len(request.layout.grids)])]


def largest_batch(model: Model, request: Request) -> int:
    """Patches of the largest of a request's `image_batches`."""
    return max(sum(r * c for r, c in request.layout.grids[part]) for part in image_batches(model, request))


def patch_batch(
    model: Model, request: Request, part: slice = slice(None), size: tuple[int, int] | None = None
) -> PatchBatch:
    """The patches of some images of a request, on the model's device, padded to `size` (patches, images).

    Decodes the images; their bytes are resized, on a GPU, and cut into patches on the device. Raises `ImageError`.
    """
    config, layout = model.images, request.layout
    if config is None:
        raise PromptError("a model that reads only text has no patches")
    pictures = zip(request.prompt.images[part], layout.grids[part], strict=True)
    parts = [_pixels(model, image, grid, config) for image, grid in pictures]
    parts = [model.ops.cut(pixels, patch=config.patch, merge=config.merge) for pixels in parts]
    at = image_indices(layout.starts[part], layout.counts[part])
    return join_patches(parts, layout.grids[part], at, config, device=model.device, size=size)


def _pixels(model: Model, image: Image, grid: tuple[int, int], config: ImageConfig) -> Tensor:
    """The bytes of a picture at the size of its patches: uint8 [height width 3]. A GPU resizes it, unless it is so much
    larger that its bytes would need more memory than the encoder."""
    height, width = (patches * config.patch for patches in grid)
    there = model.device.type == "cuda" and image.width * image.height <= LARGER * height * width
    pixels = np.asarray(images.rgb(image)) if there else images.pixels(image, config)
    staged = torch.empty(pixels.shape, dtype=torch.uint8, device="cpu", pin_memory=model.device.type == "cuda")
    staged.numpy()[...] = pixels
    sent = staged.to(model.device, non_blocking=True)
    return sent if sent.shape[:2] == (height, width) else model.ops.resize(sent, height, width)


def join_patches(
    parts: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    at: np.ndarray,
    config: ImageConfig,
    *,
    device: torch.device,
    size: tuple[int, int] | None = None,
) -> PatchBatch:
    """Images that are cut already (uint8 [X_i U], of `grids` patches) as one batch; merged patch m goes to `at[m]`."""
    bounds = np.cumsum([0, *[len(part) for part in parts]], dtype=np.int32)
    patches, count = size or (int(bounds[-1]), len(parts))
    free = patches - int(bounds[-1])
    host = (
        padded_to(patches, np.concatenate([images.coordinates(grid, config) for grid in grids], axis=1)),
        padded_to(count + 1, bounds, by=bounds[-1]),
        padded_to(patches // config.merge**2, at, by=-1),
    )
    coords, indptr, where = upload_all(host, device)
    padding = [parts[0].new_zeros(free, parts[0].shape[1])] if free else []
    return PatchBatch(
        patches=joined([*parts, *padding]),
        coords=coords,
        indptr=indptr,
        at=where,
        mean=config.mean,
        std=config.std,
        host_indptr=None if size else tuple(bounds.tolist()),
    )
