"""From examples to packed batches of tensors: many pictures and many prompts of different sizes, without padding.

Pictures are prepared, and tokens placed, as for the runtime (`mllm.images`, `mllm.positions`), and so as transformers
does. Values stay uint8; the model's side scales them to -1..1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from attrs import evolve
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset

from mllm import images
from mllm.image_config import ImageConfig
from mllm.positions import positions
from mllm.signs import tokens
from mllm.signs.pictures import KINDS, Example, examples, held_out

IMAGES = ImageConfig(patch=16, merge=2, min_pixels=64 * 64, max_pixels=512 * 512)
# The share of each kind among the training pictures: text is by far the hardest, then telling shapes of one colour apart
SHARES = {
    "shapes": 0.05, "text": 0.41, "count": 0.13, "place": 0.06, "where": 0.02, "change": 0.12, "chat": 0.02, "alike": 0.19
}  # fmt: skip
# Further questions about each picture: drawing one costs more than learning from it
FURTHER = dict.fromkeys(SHARES, 2) | {"alike": 4}

Batch = dict[str, torch.Tensor]


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
    starts = []
    for token in prompt + answer:
        if token == pad:
            starts.append(len(ids))
            ids += [token] * images.tokens(left.pop(0), IMAGES)
        else:
            ids.append(token)
    merged = [(rows // IMAGES.merge, columns // IMAGES.merge) for rows, columns in grids]
    return ids, answer, positions(len(ids), starts, merged)[0]


def pack(items: list[Example]) -> Batch:
    """One batch of many examples; pictures that are the same object are encoded once.

    patches [P, 768], places [4, P] (row, column, rows, columns), vision_starts [pictures + 1]; ids
    and positions [3, T] of all tokens one prompt after another, starts [prompts + 1]; `shown_at` the picture
    tokens and `shown_row` their rows of the merged features; `at` the tokens that predict
    the answers' `labels`, and `owner` the prompt that each belongs to.
    """
    seen: dict[int, tuple[int, tuple[int, int]]] = {}
    cut, places, sizes, row = [], [], [0], 0
    ids, where, starts, shown_at, shown_row = [], [], [0], [], []
    at, labels, owner = [], [], []
    pad = _tokenizer().token_to_id("<|image_pad|>")
    for number, item in enumerate(items):
        for image in item.images:
            if id(image) not in seen:
                grid = images.grid(image.size, IMAGES)
                cut.append(images.patches(image, IMAGES))
                places.append(images.coordinates(grid, IMAGES))
                sizes.append(len(cut[-1]))
                seen[id(image)] = (row, grid)
                row += images.tokens(grid, IMAGES)
        shown = [seen[id(image)] for image in item.images]
        new, answer, at_positions = _prompt(item, [grid for _, grid in shown])
        shown_at.append(starts[-1] + np.flatnonzero(np.array(new) == pad))
        shown_row += [np.arange(first, first + images.tokens(grid, IMAGES)) for first, grid in shown]
        end = starts[-1] + len(new)
        at.append(np.arange(end - len(answer) - 1, end - 1))
        labels += answer
        owner += [number] * len(answer)
        ids += new
        where.append(at_positions)
        starts.append(end)
    none = [np.zeros((0, 3 * IMAGES.patch**2), np.uint8)], [np.zeros((4, 0), np.int32)]
    arrays = {
        "patches": np.concatenate(cut or none[0]), "places": np.concatenate(places or none[1], 1),
        "vision_starts": np.cumsum(sizes), "ids": ids,
        "shown_at": np.concatenate(shown_at), "shown_row": np.concatenate(shown_row or [np.arange(0)]),
        "positions": np.concatenate(where, 1), "starts": starts, "at": np.concatenate(at), "labels": labels,
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
