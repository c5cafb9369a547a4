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


@pytest.mark.benchmark(group="load")
def test_load(case: Case, tmp_path: Path) -> None:
    s, model = case.session.settings, case.session.model
    folder = models.folder(s.model or models.EMBEDDED, model, tmp_path)
    loaded = case.time(
        lambda: mllm.load(folder, device=s.device, dtype=s.dtype, progress=False),
        work=Work(model.weights.nbytes, 0),
    )
    pairs = zip(state.leaves(loaded.weights), state.leaves(model.weights), strict=True)
    for a, b in pairs:  # weights after a norm were centred twice, and rounded (`weights.weight_after_norm`)
        torch.testing.assert_close(a, b, rtol=0, atol=torch.finfo(b.dtype).eps * float(b.abs().max()))
