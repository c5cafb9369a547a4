"""Points of the grid as state: prompts of so many rows and tokens, the pool and table that hold them, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from PIL import Image
from torch import Tensor

import mllm
from mllm import buckets, images, prompts, stages, state
from mllm.batch import ForwardBatch, PatchBatch, SamplingBatch, Size, VisionTokens, decode_batch, pack
from mllm.budget import MemoryProfile
from mllm.cache import PAGE_SIZE, KVPool
from mllm.image_config import ImageConfig
from mllm.model import Model
from mllm.prompts import Expanded, Prompt
from mllm.requests import join_patches
from mllm.sampling import Sampling, sampling_batch
from mllm.segments import chunk
from mllm.table import RequestTable

TEXT = 32  # tokens of text beside a picture where no prompt was given
CHUNK = 8192  # tokens in one prefill where only its result is wanted


class TooLargeError(Exception):
    """A point that cannot run here; the message is the arithmetic."""


@frozen(kw_only=True)
class Room:
    """How many tokens the KV pool may have, and how many the model's context."""

    pool_tokens: int
    context: int

    def check(self, rows: int, input_len: int, output_len: int = 0) -> None:
        """Raises `TooLargeError` unless `rows` requests of that length fit."""
        total = input_len + output_len
        if total > self.context:
            raise TooLargeError(f"{input_len}+{output_len} = {total} tokens > {self.context} of context")
        if rows > self.pool_tokens // total:
            need = rows * total
            raise TooLargeError(f"{rows} x ({input_len}+{output_len}) = {need} tokens > {self.pool_tokens} in the pool")


def room(memory: MemoryProfile) -> Room:
    """The room for KV in a model's memory budget."""
    return Room(pool_tokens=memory.effective_tokens, context=memory.context)


def text_tokens(model: Model, rows: int, length: int, prompt: str | None = None) -> list[list[int]]:
    """`rows` prompts of exactly `length` tokens: random ones, the same in every run, or `prompt` cut or repeated.

    No token is a placeholder for a picture or a video.
    """
    config = model.config
    taboo = {config.image_token_id, config.video_token_id}
    if prompt is not None:
        if model.tokenizer is None:
            raise ValueError(f"--prompt: {model.name} has no tokenizer")
        own = [token for token in model.tokenizer.encode(prompt) if token not in taboo]
        if not own:
            raise ValueError(f"--prompt: {prompt!r} has no tokens to fill a prompt with")
        return [(own * -(-length // len(own)))[:length]] * rows
    generator = torch.Generator().manual_seed(length)
    allowed = torch.tensor([t for t in range(min(config.text.vocab_size, 100_000)) if t not in taboo])
    return allowed[torch.randint(len(allowed), (rows, length), generator=generator)].tolist()


def image_tokens(model: Model, image: Image.Image) -> int:
    """Tokens that a picture becomes."""
    config = _image_config(model)
    return images.tokens(images.grid(image.size, config), config)


def picture_tokens(model: Model, image: Image.Image, prompt: str | None, length: int | None = None) -> list[int]:
    """A prompt with one image: `prompt` in the chat template, or `TEXT` random tokens around it.

    With a `length` it has so many tokens in all: only text is cut or repeated to fill them. Raises `ValueError` where
    the image's tokens leave no room for any.
    """
    count, mark = image_tokens(model, image), model.config.image_token_id
    assert mark is not None  # a model that reads pictures has one
    if prompt is None:
        first, *rest = text_tokens(model, 1, TEXT)[0]
        tokens = [first, mark, *rest]
    elif model.tokenizer is None:
        raise ValueError(f"--prompt: {model.name} has no tokenizer")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        tokens = list(mllm.prompt(model, [{"role": "user", "content": content}]).tokens)
    at = tokens.index(mark)
    before, after = tokens[:at], tokens[at + 1 :]
    if length is not None:
        if length <= count:
            raise ValueError(f"--input-len {length} has no room for {count} image tokens and text")
        before = before[: length - count]
        room = length - count - len(before)
        after = (after * -(-room // len(after)))[:room]
    return [*before, *[mark] * count, *after]


def lay_out(model: Model, tokens: Sequence[int], image: Image.Image | None = None) -> Expanded:
    """Tokens and pictures to positions."""
    config = model.config
    prompt = Prompt(tokens=tokens, images=[] if image is None else [image])
    return prompts.expand(prompt, model.images, config.image_token_id, config.text.vocab_size,
                          video_token_id=config.video_token_id)  # fmt: skip


def memory(model: Model, rows: int, tokens: int) -> tuple[KVPool, RequestTable, tuple[int, ...]]:
    """A pool and table that just hold `rows` requests of `tokens` tokens, and the rows, admitted."""
    size = PAGE_SIZE[model.device.type]
    each = -(-tokens // size)
    pool = KVPool.empty(model.config.text, pages=rows * each, page_size=size, device=model.device, dtype=model.dtype)
    table = RequestTable.empty(rows=rows, pages=rows * each, page_size=size, row_pages=each)
    table, admitted = stages.admit(table, [tokens] * rows)
    return pool, table, admitted


def fill(
    model: Model, pool: KVPool, table: RequestTable, rows: Sequence[int], layouts: Sequence[Expanded]
) -> tuple[KVPool, RequestTable, Tensor]:
    """Prefill text prompts, a few rows at a time; returns the first new token of each, i32 [B] on the host."""
    step = max(1, CHUNK // len(layouts[0].tokens))
    firsts = []
    for at in range(0, len(rows), step):
        some = rows[at : at + step]
        parts = [chunk(layout, row) for row, layout in zip(some, layouts[at : at + step], strict=True)]
        batch = pack(table, parts, device=model.device)
        pool, logits = stages.prefill(model.weights, pool, batch, config=model.config, ops=model.ops)
        table = stages.commit(table, some, [len(part.tokens) for part in parts])
        firsts.append(logits.argmax(-1).int().cpu())
    return pool, table, torch.cat(firsts)


def carry(
    model: Model, table: RequestTable, rows: Sequence[int], tokens: Sequence[int], delta: Sequence[int], total: int
) -> ForwardBatch:
    """The decode batch of rows that will grow to `total` tokens: every page is listed from the start."""
    return decode_batch(table, rows, tokens, delta, size=len(rows), listed=table.pages_for(total), device=model.device)


def greedy(model: Model, rows: int) -> SamplingBatch:
    return sampling_batch([Sampling()] * rows, size=rows, device=model.device)


def prompt_size(model: Model, table: RequestTable, tokens: int, rows: int, merged: int, mode: str) -> Size | None:
    """What `generate` pads such a prefill batch to, for mode "graph"; None for "eager".

    Raises `TooLargeError` for a batch that is never recorded.
    """
    if mode == "eager":
        return None
    size = buckets.prompt_size(model.pads, tokens, rows, table.pages_for(-(-tokens // rows)), merged)
    if size is None:
        raise TooLargeError(f"{tokens} tokens > {buckets.CAPTURED_TOKENS}: prefill is not recorded")
    return size


def _patch_size(model: Model, grids: Sequence[tuple[int, int]], unit: int, mode: str) -> tuple[int, int] | None:
    if mode == "eager":
        return None
    count = sum(rows * cols for rows, cols in grids)
    size = buckets.patch_size(model.pads, count, len(grids), unit)
    if size is None:
        raise TooLargeError(f"{count} patches > {buckets.CAPTURED_PATCHES}: the encoder is not recorded")
    return size


def patches_of(model: Model, pictures: Sequence[Image.Image], at: Sequence[int], mode: str = "eager") -> PatchBatch:
    """Preprocess pictures; merged patch m belongs to the token at `at[m]`. Mode "graph": padded, as `generate` does."""
    config = _image_config(model)
    parts = [torch.from_numpy(images.patches(picture, config)).to(model.device) for picture in pictures]
    grids = [images.grid(picture.size, config) for picture in pictures]
    size = _patch_size(model, grids, config.merge**2, mode)
    return join_patches(parts, grids, np.array(at, np.int64), config, device=model.device, size=size)


def random_patches(model: Model, grid: tuple[int, int], mode: str = "eager") -> PatchBatch:
    """One image of `grid` patches of noise, already cut: what the encoder alone is timed on.

    Raises `ValueError` for sides that do not merge, `TooLargeError` beyond the pictures that the memory has room for.
    """
    config = _image_config(model)
    if (pixels := grid[0] * grid[1] * config.patch**2) > model.memory.image_pixels:
        raise TooLargeError(f"{grid[0]} x {grid[1]} patches are {pixels} pixels > {model.memory.image_pixels}")
    if grid[0] % config.merge or grid[1] % config.merge:
        raise ValueError(f"--grid: sides must be multiples of {config.merge}, got {grid[0]}x{grid[1]}")
    count = grid[0] * grid[1]
    noise = np.random.default_rng(count).integers(0, 256, (count, 3 * config.patch**2), np.uint8)
    parts = [torch.from_numpy(noise).to(model.device)]
    size, at = _patch_size(model, [grid], config.merge**2, mode), np.arange(count // config.merge**2)
    return join_patches(parts, [grid], at, config, device=model.device, size=size)


def _image_config(model: Model) -> ImageConfig:
    if model.images is None:
        raise TooLargeError(f"{model.name} reads no pictures")
    return model.images


def drawn_picture(size: tuple[int, int] = (256, 256)) -> Image.Image:
    """A smooth picture of `size` (width, height) pixels, the same on every machine."""
    y, x = np.indices((size[1], size[0]), np.float32)
    bands = [np.sin(x / 9) * np.cos(y / 7), np.sin((x + y) / 13), np.cos(x / 21) * np.sin(y / 5)]
    return Image.fromarray(np.stack([(band * 127 + 128).astype(np.uint8) for band in bands], axis=-1))


def picture(path: Path | None) -> Image.Image:
    return drawn_picture() if path is None else images.open_image(path)


def same_vision(a: VisionTokens, b: VisionTokens) -> float:
    """The largest difference of two encodings, relative to the largest value."""
    pairs = zip(state.leaves((a.embed, a.deep)), state.leaves((b.embed, b.deep)), strict=True)
    return max(relative(x, y) for x, y in pairs if x.numel())


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, infinite where either is not finite."""
    a, b = a.double(), b.double()
    found = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
    return found if np.isfinite(found) else float("inf")
