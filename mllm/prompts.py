"""Prompts: token ids with images in them.

A `Prompt` is what a caller hands in, `from_messages` makes one of a conversation, and `expand` lays it out: each
image's single placeholder becomes as many tokens as the image has, and every token gets its M-RoPE position. All of
it works from image headers; nothing is decoded before a prompt is known to run.
"""

import operator
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray
from PIL import Image

from mllm.errors import PromptError
from mllm.images import ImageConfig, check_image, grid
from mllm.messages import refuse_markers, split
from mllm.positions import positions
from mllm.tokenizer import Tokenizer

TOKEN_LIMIT = 2**31  # ids are int32 from here on


def _ids(values: object) -> tuple[int, ...]:
    """Any sequence of integers, numpy's and torch's included, as plain ints."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"tokens must be a sequence of integers, got {type(values).__name__}")
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Iterable):  # an array without axes
        raise TypeError("tokens must be a sequence of integers, got a single number")
    ids = tuple(listed)
    if not set(map(type, ids)) <= {int}:
        ids = tuple(_id(value, index) for index, value in enumerate(ids))
    if ids and not 0 <= min(ids) <= max(ids) < TOKEN_LIMIT:
        raise PromptError(f"token ids must lie in [0, {TOKEN_LIMIT}), got {min(ids)} to {max(ids)}")
    return ids


def _id(value: object, index: int) -> int:
    kind = getattr(value, "dtype", type(value))
    if "bool" not in str(kind):
        try:
            return operator.index(cast(Any, value))
        except TypeError:
            pass
    raise TypeError(f"tokens[{index}] must be an integer, got {value!r}")


def _images(values: object) -> tuple[Image.Image, ...]:
    if isinstance(values, str | bytes | Image.Image) or not isinstance(values, Iterable):
        raise TypeError(f"images must be a sequence of PIL images, got {type(values).__name__}; pass [image] for one")
    return tuple(check_image(value) for value in values)


@frozen(eq=False)
class Prompt:
    """One request's input, before anything is computed.

    tokens: ids; each image stands as one image token, or as all of its tokens if the caller expanded them.
    images: PIL images in the order of their placeholders.

    Raises `TypeError` for anything but integers and PIL images, `PromptError` for negative ids.
    """

    tokens: tuple[int, ...] = field(converter=_ids)
    images: tuple[Image.Image, ...] = field(default=(), converter=_images)


@frozen(eq=False, kw_only=True)
class Expanded:
    """A prompt laid out token by token.

    tokens: int32 [n]; an image occupies rows * columns / merge^2 placeholders.
    positions: int32 [3, n], M-RoPE time, height and width.
    delta: a token at index i >= n stands at position i + delta.
    grids: (rows, columns) of each image, in patches.
    starts: index of the first placeholder of each image.
    counts: placeholders of each image.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    delta: int
    grids: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]


def from_messages(
    messages: object, tokenizer: Tokenizer, image_token_id: int | None, video_token_id: int | None = None
) -> Prompt:
    """The prompt that asks for the assistant's answer to a conversation in Hugging Face's form.

    messages: as `mllm.messages.split` describes them.
    image_token_id, video_token_id: the model's placeholders; None for a model that reads only text.

    Raises `TypeError` for a value of the wrong type, `PromptError` for messages that cannot be laid out, for text
    that spells a placeholder, and for whatever the chat template refuses.
    """
    plain, images = split(messages)
    if image_token_id is None:
        if images:
            raise PromptError(f"{len(images)} images in messages for a model that reads only text")
        return Prompt(tokens=tokenizer.chat(plain))
    placeholders = (tokenizer.token(id) for id in (image_token_id, video_token_id) if id is not None)
    refuse_markers(plain, filter(None, placeholders))
    tokens = tokenizer.chat(plain)
    if (count := tokens.count(image_token_id)) != len(images):  # the template may leave images out or add its own
        raise PromptError(f"the chat template laid out {count} image placeholders for {len(images)} images")
    return Prompt(tokens=tokens, images=images)


def expand(
    prompt: Prompt,
    image_config: ImageConfig | None,
    image_token_id: int | None,
    vocab_size: int,
    *,
    video_token_id: int | None = None,
) -> Expanded:
    """Lay a prompt out. `image_config` and `image_token_id` are None for a model that reads only text.

    Raises `PromptError` for an empty prompt, an id outside the vocabulary, video tokens, or placeholders that do not
    match the images; `ImageError` for an image outside the limits of `mllm.images.grid`.
    """
    ids = np.array(prompt.tokens, np.int32)
    if not len(ids):
        raise PromptError("a prompt needs at least one token")
    if ids.max() >= vocab_size:
        raise PromptError(f"token id {ids.max()} at index {ids.argmax()} is outside the vocabulary of {vocab_size}")
    if video_token_id is not None and (ids == video_token_id).any():
        raise PromptError(f"video token {video_token_id} in the prompt: videos are not supported")
    if image_config is None or image_token_id is None:
        if prompt.images:
            raise PromptError(f"{len(prompt.images)} images for a model that reads only text")
        where, delta = positions(len(ids), (), ())
        return Expanded(tokens=ids, positions=where, delta=delta, grids=(), starts=(), counts=())
    grids = tuple(grid(image.size, image_config) for image in prompt.images)
    sizes = [(rows // image_config.merge, cols // image_config.merge) for rows, cols in grids]
    counts = [rows * cols for rows, cols in sizes]
    ids, starts = _place(ids, counts, image_token_id)
    where, delta = positions(len(ids), starts, sizes)
    return Expanded(tokens=ids, positions=where, delta=delta, grids=grids, starts=starts, counts=tuple(counts))


def _place(ids: NDArray[np.int32], counts: list[int], image: int) -> tuple[NDArray[np.int32], tuple[int, ...]]:
    """The ids with every image in full, and where each image starts.

    counts: tokens of each image. There are either as many placeholders as images or as many as their tokens; both
    at once only if every count is 1, where the two readings agree. Images may touch, so runs are cut by count.
    """
    found = np.flatnonzero(ids == image)
    total = sum(counts)
    if len(found) == len(counts):
        repeats = np.ones(len(ids), np.int64)
        repeats[found] = counts
        before = np.cumsum([0, *counts])[:-1] - np.arange(len(counts))  # tokens that earlier images added
        return np.repeat(ids, repeats), tuple((found + before).tolist())
    if len(found) != total:
        full = f"{len(counts)} (one per image) or {total} ({' + '.join(map(str, counts))})" if counts else "none"
        raise PromptError(f"{len(found)} image placeholders for {len(counts)} images: expected {full}")
    offsets = np.cumsum([0, *counts])
    starts, stops = found[offsets[:-1]], found[offsets[1:] - 1] + 1
    for index, (start, stop, count) in enumerate(zip(starts, stops, counts, strict=True)):
        if stop - start != count:
            raise PromptError(f"image {index} needs {count} placeholders in a row from index {start} on; they are torn")
    return ids, tuple(starts.tolist())
