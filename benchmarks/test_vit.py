"""The vision encoder alone: patches that are on the device already to features."""

from __future__ import annotations

import pytest

from benchmarks import figures, points
from benchmarks.checks import RELATIVE
from benchmarks.session import Case
from mllm import stages
from mllm.batch import PatchBatch
from mllm.kernels.reference import REFERENCE
from mllm.programs import make_programs


@pytest.mark.benchmark(group="vit")
def test_vit(case: Case, grid: str, padded: str) -> None:
    """`graph`: padded and recorded, as `generate` runs it up to some thousands of patches; `eager`: as beyond."""
    session = case.session
    session.needs_vision()
    rows, cols = map(int, grid.split("x"))
    exact = session.or_skip(points.random_patches, session.model, (rows, cols))
    patches = session.or_skip(points.random_patches, session.model, (rows, cols), padded)
    _run(case, patches, exact, f"grid={grid}-{padded}", captured=padded == "graph")


@pytest.mark.benchmark(group="vit")
def test_vit_image(case: Case) -> None:
    case.session.needs_vision()
    picture = points.picture(case.session.settings.image)
    model = case.session.model
    patches = points.patches_of(model, [picture], range(points.image_tokens(model, picture)))
    _run(case, patches, patches, f"image={picture.size[0]}x{picture.size[1]}", captured=False)


def _run(case: Case, patches: PatchBatch, exact: PatchBatch, name: str, *, captured: bool) -> None:
    """Time the encoder, compare with the reference ops on `exact`, the same without padding, and note the figures."""
    model = case.session.model
    vision, weights = model.config.vision, model.weights.vision
    assert vision is not None
    assert weights is not None
    count, tokens, programs = len(exact.patches), len(exact.at), make_programs(model)
    work = figures.vit(vision, patches=(count,), itemsize=model.dtype.itemsize)

    def call():
        return programs.vit(patches, padded=captured).first(tokens)

    out = case.time(call, work=work)
    expected = stages.vit(weights, exact, config=vision, ops=REFERENCE)
    assert points.same_vision(out, expected) <= RELATIVE[model.dtype]
    case.note(patches=count)
    if case.seconds is not None:
        case.row(
            batch_size=1, vit_prefill_ms=case.seconds * 1e3, vit_prefill_tokens=tokens,
            vit_prefill_throughput=tokens / case.seconds, captured=captured, cuda_graph=captured,
        )  # fmt: skip
    case.trace("vit", name, call)
