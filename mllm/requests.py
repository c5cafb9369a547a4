"""Requests: prompts laid out, checked against the limits before anything runs, and cut into chunks to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from PIL.Image import Image
from torch import Tensor

from mllm import images, prompts
from mllm.batch import Chunk, PatchBatch, VisionTokens, upload_all
from mllm.errors import PromptError
from mllm.image_config import ImageConfig
from mllm.model import Model
from mllm.prompts import Expanded, Prompt
from mllm.sampling import Sampling


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
    layout = prompts.expand(
        prompt, model.images, config.image_token_id, config.text.vocab_size, video_token_id=config.video_token_id
    )
    length = len(layout.tokens)
    if length > context:
        raise PromptError(f"prompts[{index}]: {describe(layout)} exceed the model's context of {context} tokens")
    new = min(new_tokens, context - length + 1)
    return Request(
        index=index, prompt=prompt, layout=layout, sampling=sampling, new_tokens=new, limit_reason="length",
        slots=length + new - 1,
    )  # fmt: skip


def make_all(
    model: Model, prompts: Sequence[Prompt], new_tokens: int | Sequence[int], sampling: Sampling | Sequence[Sampling]
) -> list[Request]:
    """All prompts laid out and checked, before anything runs; the settings are one for all or one for each."""
    if isinstance(prompts, Prompt):
        raise TypeError("prompts: expected a sequence of prompts, got one; pass [prompt]")
    limits = _for_each(new_tokens, int, len(prompts), "max_new_tokens")
    settings = _for_each(sampling, Sampling, len(prompts), "sampling")
    for limit in limits:
        check_limit("max_new_tokens", limit, 1)
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


def image_indices(layout: Expanded) -> np.ndarray:
    """Index of every image token of the prompt, in order."""
    if not layout.starts:
        return np.zeros(0, np.int64)
    return np.concatenate([np.arange(s, s + n) for s, n in zip(layout.starts, layout.counts, strict=True)])


def patch_batch(model: Model, request: Request, size: tuple[int, int] | None = None) -> PatchBatch:
    """The patches of all images of a request, on the model's device, padded to `size` (patches, images).

    Decodes and resizes the images; their bytes are cut into patches on the device. Raises `ImageError`.
    """
    config = model.images
    if config is None:
        raise PromptError("a model that reads only text has no patches")
    parts = [_pixels(image, config, model.device) for image in request.prompt.images]
    parts = [model.ops.cut(part, patch=config.patch, merge=config.merge) for part in parts]
    at = image_indices(request.layout)
    return join_patches(parts, request.layout.grids, at, config, device=model.device, size=size)


def _pixels(image: Image, config: ImageConfig, device: torch.device) -> Tensor:
    """The bytes of a picture at the size of its patches: uint8 [height width 3]."""
    pixels = images.pixels(image, config)
    staged = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    staged.numpy()[...] = pixels
    return staged.to(device, non_blocking=True)


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
    coords = np.concatenate([images.coordinates(grid, config) for grid in grids], axis=1)
    host = (
        np.pad(coords, ((0, 0), (0, free))),
        np.append(bounds, np.repeat(bounds[-1:], count - len(parts))),
        np.pad(at, (0, free // config.merge**2), constant_values=-1),
    )
    coords_there, indptr, where = upload_all([torch.from_numpy(array) for array in host], device)
    padding = [parts[0].new_zeros(free, parts[0].shape[1])] if free else []
    return PatchBatch(
        patches=torch.cat([*parts, *padding]),
        coords=coords_there,
        indptr=indptr,
        at=where,
        mean=config.mean,
        std=config.std,
    )


@frozen(eq=False, kw_only=True)
class Segment:
    """Tokens [start, stop) of a request, to run in row `row`."""

    request: Request
    row: int
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        """Whether the prompt ends with this segment, so that its last logits choose the first new token."""
        return self.stop == self.request.length

    def chunk(self) -> Chunk:
        return chunk(self.request.layout, self.row, self.start, self.stop)


def chunk(layout: Expanded, row: int, start: int = 0, stop: int | None = None) -> Chunk:
    """Tokens [start, stop) of a prompt, to run in row `row`."""
    return Chunk(
        row=row,
        tokens=torch.from_numpy(layout.tokens[start:stop]),
        positions=torch.from_numpy(layout.positions[:, start:stop]),
    )


def cut(requests: Sequence[tuple[Request, int]], *, limit: int) -> Iterator[list[Segment]]:
    """Cut prompts of (request, row) into batches of at most `limit` tokens, in order; a long one takes several."""
    batch: list[Segment] = []
    room = limit
    for request, row in requests:
        start = 0
        while start < request.length:
            stop = min(start + room, request.length)
            batch.append(Segment(request=request, row=row, start=start, stop=stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def crop(
    features: dict[int, VisionTokens], segments: Sequence[Segment], merged: int | None = None
) -> VisionTokens | None:
    """The image tokens that fall into a batch of segments, padded to `merged`; None where there are none.

    `features` holds those of each request, by its index.
    """
    embed: list[Tensor] = []
    deep: list[Tensor] = []
    at: list[np.ndarray] = []
    offset = 0
    for segment in segments:
        index = image_indices(segment.request.layout)
        first, last = np.searchsorted(index, (segment.start, segment.stop))
        if first < last:
            mine = features[segment.request.index]
            embed.append(mine.embed[first:last])
            deep.append(mine.deep[:, first:last])
            at.append(index[first:last] - segment.start + offset)
        offset += segment.stop - segment.start
    if not embed:
        return None
    where = np.concatenate(at)
    if merged is not None and (free := merged - len(where)):
        embed.append(embed[0].new_zeros(free, embed[0].shape[1]))
        deep.append(deep[0].new_zeros(len(deep[0]), free, deep[0].shape[2]))
        where = np.pad(where, (0, free), constant_values=-1)
    (places,) = upload_all([torch.from_numpy(where)], embed[0].device)
    return VisionTokens(embed=torch.cat(embed), deep=torch.cat(deep, dim=1), at=places)


def pictured(segments: Sequence[Segment]) -> int:
    """Image tokens in a batch of segments."""
    counts = [np.searchsorted(image_indices(s.request.layout), (s.start, s.stop)) for s in segments]
    return int(sum(last - first for first, last in counts))
