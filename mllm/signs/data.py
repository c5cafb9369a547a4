"""From examples to packed batches of tensors: many pictures and many prompts of different sizes, without padding.

Pictures are prepared as transformers' Qwen2-VL image processor does: resized with bicubic interpolation to multiples
of 32, cut into patches of 16 x 16 in blocks of 2 x 2. Values stay uint8; the model's side scales them to -1..1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from attrs import evolve
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset

from mllm.signs import tokens
from mllm.signs.pictures import KINDS, Example, examples, held_out

PATCH, MERGE = 16, 2
MIN_PIXELS, MAX_PIXELS = 64 * 64, 512 * 512
# The share of each kind among the training pictures: text is by far the hardest, then telling shapes of one colour apart
SHARES = {
    "shapes": 0.05, "text": 0.41, "count": 0.13, "place": 0.06, "where": 0.02, "change": 0.12, "chat": 0.02, "alike": 0.19
}  # fmt: skip
# Further questions about each picture: drawing one costs more than learning from it
FURTHER = dict.fromkeys(SHARES, 2) | {"alike": 4}

Batch = dict[str, torch.Tensor]


def resized(height: int, width: int) -> tuple[int, int]:
    """The size that the image processor gives a picture."""
    unit = PATCH * MERGE
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    if rows * columns > MAX_PIXELS:
        shrink = math.sqrt(height * width / MAX_PIXELS)
        return tuple(max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))  # type: ignore[return-value]
    if rows * columns < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        return tuple(math.ceil(side * grow / unit) * unit for side in (height, width))  # type: ignore[return-value]
    return rows, columns


def patches(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture's patches, uint8 [patches, 3 * 16 * 16] in blocks of 2 x 2, and its grid (rows, columns)."""
    height, width = resized(image.size[1], image.size[0])
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = height // PATCH, width // PATCH
    pixels = np.asarray(image).reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1), (rows, columns)


@lru_cache(maxsize=4096)
def patch_places(rows: int, columns: int) -> np.ndarray:
    """Row and column of each patch, and the grid's size, int16 [patches, 4]."""
    at = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    at = at.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return np.concatenate([at, np.broadcast_to([rows, columns], at.shape)], 1).astype(np.int16)


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    return tokens.build()


def _prompt(item: Example, grids: list[tuple[int, int]]) -> tuple[list[int], list[int], np.ndarray]:
    """Token ids of question and answer, how many of them the answer has, and M-RoPE positions [3, tokens]."""
    before = "<|im_start|>user\n" + "<|vision_start|><|image_pad|><|vision_end|>" * len(item.images)
    question = f"{item.question}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = _tokenizer()
    prompt = tokenizer.encode(before + question).ids
    answer = tokenizer.encode(f"{item.answer}<|im_end|>").ids
    pad, left = tokenizer.token_to_id("<|image_pad|>"), list(grids)
    ids: list[int] = []
    positions, start = [], 0
    for token in prompt + answer:
        if token == pad:
            rows, columns = (side // MERGE for side in left.pop(0))
            where = np.indices((1, rows, columns)).reshape(3, -1)
            ids += [token] * (rows * columns)
            positions.append(where + start)
            start += max(rows, columns)
        else:
            ids.append(token)
            positions.append(np.full((3, 1), start))
            start += 1
    return ids, answer, np.concatenate(positions, 1)


def pack(items: list[Example]) -> Batch:
    """One batch of many examples; pictures that are the same object are encoded once.

    patches [P, 768], places [P, 4], vision_starts [pictures + 1]; ids
    and positions [3, T] of all tokens one prompt after another, starts [prompts + 1]; `shown_at` the picture
    tokens and `shown_row` their rows of the merged features; `at` the tokens that predict
    the answers' `labels`, and `owner` the prompt that each belongs to.
    """
    seen: dict[int, tuple[int, tuple[int, int]]] = {}
    cut, places, sizes, row = [], [], [0], 0
    ids, positions, starts, shown_at, shown_row = [], [], [0], [], []
    at, labels, owner = [], [], []
    pad = _tokenizer().token_to_id("<|image_pad|>")
    for number, item in enumerate(items):
        for image in item.images:
            if id(image) not in seen:
                pixels, grid = patches(image)
                cut.append(pixels)
                places.append(patch_places(*grid))
                sizes.append(len(pixels))
                seen[id(image)] = (row, grid)
                row += len(pixels) // MERGE**2
        shown = [seen[id(image)] for image in item.images]
        new, answer, where = _prompt(item, [grid for _, grid in shown])
        shown_at.append(starts[-1] + np.flatnonzero(np.array(new) == pad))
        shown_row += [np.arange(first, first + r * c // MERGE**2) for first, (r, c) in shown]
        end = starts[-1] + len(new)
        at.append(np.arange(end - len(answer) - 1, end - 1))
        labels += answer
        owner += [number] * len(answer)
        ids += new
        positions.append(where)
        starts.append(end)
    none = [np.zeros((0, 3 * PATCH * PATCH), np.uint8)], [np.zeros((0, 4), np.int16)]
    arrays = {
        "patches": np.concatenate(cut or none[0]), "places": np.concatenate(places or none[1]),
        "vision_starts": np.cumsum(sizes), "ids": ids,
        "shown_at": np.concatenate(shown_at), "shown_row": np.concatenate(shown_row or [np.arange(0)]),
        "positions": np.concatenate(positions, 1), "starts": starts, "at": np.concatenate(at), "labels": labels,
        "owner": owner,
    }  # fmt: skip
    small = {"patches": torch.uint8, "places": torch.int16, "positions": torch.int16, "starts": torch.int32,
             "vision_starts": torch.int32}  # fmt: skip
    batch = {
        key: torch.as_tensor(np.asarray(value), dtype=small.get(key, torch.int64)) for key, value in arrays.items()
    }
    batch["longest"] = torch.tensor([max(sizes), int(np.diff(starts).max())])
    return batch


class Stream(IterableDataset[Batch]):
    """Training batches number `first`, `first` + 1, ...: the same ones whatever the number of workers."""

    def __init__(self, seed: int, size: int, first: int, end: int) -> None:
        if not 0 <= seed < 64:
            raise ValueError(f"seed: expected 0 to 63, got {seed}: from there on the examples are held out")
        self.seed, self.size, self.first, self.end = seed, size, first, end

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(self.first + offset, self.end, step):
            yield self.batch(number)

    @staticmethod
    def seeds(seed: int, number: int, size: int) -> range:
        """The example seeds of one batch, all below `HELD_OUT`."""
        return range(start := seed * (1 << 34) + number * size, start + size)

    def batch(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        kinds = rng.choice(len(SHARES), self.size, p=list(SHARES.values()))
        items = []
        for kind, seed in zip(kinds, self.seeds(self.seed, number, self.size), strict=True):
            name = list(SHARES)[kind]
            items += examples(name, seed, more=FURTHER[name])
        return pack(items)


class HeldOut(torch.utils.data.Dataset[tuple[str, Batch]]):
    """Held-out batches, `size` examples of one kind each: (kind, batch) pairs; with `swap`, pairs of pictures swapped."""

    def __init__(self, each: int, size: int = 100, swap: bool = False) -> None:
        self.swap = swap
        kinds = ("change",) if swap else KINDS
        self.jobs = [(kind, range(i, min(i + size, each))) for kind in kinds for i in range(0, each, size)]

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[str, Batch]:
        kind, indices = self.jobs[index]
        items = [held_out(kind, i) for i in indices]
        return kind, pack([evolve(item, images=item.images[::-1]) for item in items] if self.swap else items)
