"""Loading: a folder of safetensors to a model on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mllm
from benchmarks import models
from benchmarks.figures import Work
from benchmarks.session import Case
from mllm import state
from mllm.weights import Weights, weight_after_norm


@pytest.mark.benchmark(group="load")
def test_load(case: Case, tmp_path: Path) -> None:
    s, model = case.session.settings, case.session.model
    folder = models.folder(s.model or models.EMBEDDED, model, tmp_path)
    loaded = case.time(
        lambda: mllm.load(folder, device=s.device, dtype=s.dtype, progress=False),
        work=Work(model.weights.nbytes, 0),
    )
    written = folder.is_relative_to(tmp_path)  # random weights, for this
    expected = _saved_and_loaded(model.weights) if written else model.weights
    pairs = zip(state.leaves(loaded.weights), state.leaves(expected), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in pairs)


def _saved_and_loaded(saved: Weights) -> Weights:
    """What loading makes of weights that were saved: those after a layer norm are centred once more, and rounded."""
    if saved.vision is None:
        return saved
    blocks = tuple(
        state.replace(b, qkv=weight_after_norm(b.qkv.float(), dtype=b.qkv.dtype),
                      up=weight_after_norm(b.up.float(), dtype=b.up.dtype))
        for b in saved.vision.blocks
    )  # fmt: skip
    return state.replace(saved, vision=state.replace(saved.vision, blocks=blocks))
