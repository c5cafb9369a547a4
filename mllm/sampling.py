"""How the next token is chosen: the settings of a request, and those of a batch on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from attrs import field, frozen

from mllm.batch import SamplingBatch, upload


def _number(low: float, high: float, *, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)

    def validate(instance: object, attribute: Any, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{attribute.name}: expected {'a whole number' if whole else 'a number'}, got {value!r}")
        if not low <= value <= high:  # NaN fails every comparison
            bounds = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
            raise ValueError(f"{attribute.name}: expected a number {bounds}, got {value!r}")

    return validate


def _above_zero(instance: object, attribute: Any, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{attribute.name}: expected a number above 0, got {value!r}")


@frozen(kw_only=True)
class Sampling:
    """How one request chooses its tokens; greedy by default. Raises `ValueError` or `TypeError` when made wrongly.

    temperature: 0 takes the likeliest token; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: of those, keep the likeliest whose probabilities together reach top_p, at least one.
    min_p: of those, keep the ones with at least min_p times the probability of the likeliest.
    seed: two requests with the same seed, prompt and settings draw the same tokens, whoever shares their batch.
        Give prompts different seeds to draw different completions.
    """

    temperature: float = field(default=0.0, validator=_number(0.0, 1e4))
    top_k: int = field(default=0, validator=_number(0, 2**31 - 1, whole=True))
    top_p: float = field(default=1.0, validator=[_number(0.0, 1.0), _above_zero])
    min_p: float = field(default=0.0, validator=_number(0.0, 1.0))
    seed: int = field(default=0, validator=_number(0, 2**63 - 1, whole=True))


def sampling_batch(rows: Sequence[Sampling], *, size: int, device: str | torch.device) -> SamplingBatch:
    """The settings of `rows` on the device, padded to `size` rows with greedy ones."""
    if all(row.temperature == 0 for row in rows):
        return _greedy(size, str(device))
    return _upload([*rows, *[Sampling()] * (size - len(rows))], device)


@lru_cache(maxsize=64)
def _greedy(size: int, device: str) -> SamplingBatch:
    """That of greedy rows, whatever else they say: made and sent up once."""
    return _upload([Sampling()] * size, device)


def _upload(rows: Sequence[Sampling], device: str | torch.device) -> SamplingBatch:
    drawing = [row for row in rows if row.temperature > 0]

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device="cpu")

    host = SamplingBatch(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        seed=column("seed", torch.int64),
        greedy=not drawing,
        has_top_k=any(row.top_k > 0 for row in drawing),
        has_top_p=any(row.top_p < 1 for row in drawing),
    )
    return upload(host, device)
