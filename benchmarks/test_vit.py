"""The vision encoder alone: patches that are on the device already to features."""

from __future__ import annotations

import pytest

from benchmarks import figures, points
from benchmarks.checks import RELATIVE
from benchmarks.session import Case
from mllm import stages
from mllm.batch import PatchBatch
from mllm.kernels.reference import REFERENCE


@pytest.mark.benchmark(group="vit")
def test_vit(case: Case, grid: str) -> None:
    case.session.needs_vision()
    rows, cols = map(int, grid.split("x"))
    _run(case, points.random_patches(case.session.model, (rows, cols)), f"grid={grid}")


@pytest.mark.benchmark(group="vit")
def test_vit_image(case: Case) -> None:
    case.session.needs_vision()
    picture = points.picture(case.session.settings.image)
    model = case.session.model
    patches = points.patches_of(model, [picture], range(points.image_tokens(model, picture)))
    _run(case, patches, f"image={picture.size[0]}x{picture.size[1]}")


def _run(case: Case, patches: PatchBatch, name: str) -> None:
    """Time the encoder, compare with the reference ops, note patches and image tokens a second."""
    model = case.session.model
    vision, weights = model.config.vision, model.weights.vision
    assert vision is not None
    assert weights is not None
    count, tokens = len(patches.patches), len(patches.at)
    work = figures.vit(vision, patches=(count,), itemsize=model.dtype.itemsize)

    def call():
        return stages.vit(weights, patches, config=vision, ops=model.ops)

    out = case.time(call, work=work)
    expected = stages.vit(weights, patches, config=vision, ops=REFERENCE)
    assert points.same_vision(out, expected) <= RELATIVE[model.dtype]
    case.note(patches=count)
    if case.seconds is not None:
        case.row(
            batch_size=1, vit_prefill_ms=case.seconds * 1e3, vit_prefill_tokens=tokens,
            vit_prefill_throughput=tokens / case.seconds, cuda_graph=False,
        )  # fmt: skip
    case.trace("vit", name, call)
