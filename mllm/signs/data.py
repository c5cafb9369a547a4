"""From examples to packed batches of tensors: many pictures and many prompts of different sizes, without padding.

Pictures are prepared, and tokens placed, as for the runtime (`mllm.images`, `mllm.prompts`), and so as transformers
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
from mllm.prompts import Expanded, Prompt, expand
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


def _laid_out(item: Example) -> tuple[Expanded, list[int]]:
    """Question and answer token by token, and the tokens of the answer, which are the last."""
    before = "<|im_start|>user\n" + "<|vision_start|><|image_pad|><|vision_end|>" * len(item.images)
    question = f"{item.question}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = _tokenizer()
    answer = tokenizer.encode(f"{item.answer}<|im_end|>").ids
    prompt = Prompt(tokenizer.encode(before + question).ids + answer, item.images)
    return expand(prompt, IMAGES, tokenizer.token_to_id("<|image_pad|>"), tokenizer.get_vocab_size()), answer


def pack(items: list[Example]) -> Batch:
    """One batch of many examples; pictures that are the same object are encoded once.

    patches [P, 768], places [4, P] (row, column, rows, columns), vision_starts [pictures + 1]; ids
    and positions [3, T] of all tokens one prompt after another, starts [prompts + 1]; `shown_at` the picture
    tokens and `shown_row` their rows of the merged features; `at` the tokens that predict
    the answers' `labels`, and `owner` the prompt that each belongs to.
    """
    seen: dict[int, int] = {}  # the first row of each picture's features
    cut, places, sizes, row = [], [], [0], 0
    ids, positions, starts, shown_at, shown_row = [], [], [0], [], [np.arange(0)]
    at, labels, owner = [], [], []
    pad = _tokenizer().token_to_id("<|image_pad|>")
    for number, item in enumerate(items):
        layout, answer = _laid_out(item)
        for image, grid, count in zip(item.images, layout.grids, layout.counts, strict=True):
            if id(image) not in seen:
                cut.append(images.patches(image, IMAGES))
                places.append(images.coordinates(grid, IMAGES))
                sizes.append(len(cut[-1]))
                seen[id(image)] = row
                row += count
            shown_row.append(seen[id(image)] + np.arange(count))
        shown_at.append(starts[-1] + np.flatnonzero(layout.tokens == pad))
        end = starts[-1] + len(layout.tokens)
        at.append(np.arange(end - len(answer) - 1, end - 1))
        labels += answer
        owner += [number] * len(answer)
        ids.append(layout.tokens)
        positions.append(layout.positions)
        starts.append(end)
    none = [np.zeros((0, 3 * IMAGES.patch**2), np.uint8)], [np.zeros((4, 0), np.int32)]
    arrays = {
        "patches": np.concatenate(cut or none[0]), "places": np.concatenate(places or none[1], 1),
        "vision_starts": np.cumsum(sizes), "ids": np.concatenate(ids),
        "shown_at": np.concatenate(shown_at), "shown_row": np.concatenate(shown_row),
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
