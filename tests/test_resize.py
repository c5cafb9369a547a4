"""Pictures resized by our kernel against Pillow, byte for byte: in Triton's interpreter on a CPU, compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/test_resize.py
pytest tests/test_resize.py --device cuda
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import Tiny
from torch import Tensor

import mllm
from mllm import images, requests
from mllm.kernels import reference_vision
from mllm.sampling import Sampling

pytest.importorskip("triton")


@pytest.fixture
def resize(triton_device: str) -> Callable[[Tensor, int, int], Tensor]:
    from mllm.kernels import resize

    return lambda pixels, height, width: resize.resize(pixels.to(triton_device), height, width).cpu()


def noise(height: int, width: int, *, extreme: bool = False) -> Tensor:
    """Of bytes, or of black and white, at whose edges the filter leaves what a byte holds."""
    made = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(np.where(made < 128, 0, 255).astype(np.uint8) if extreme else made)


side = st.integers(1, 48)


@given(rows=side, columns=side, height=side, width=side, extreme=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size_to_any_other(
    resize: Callable[..., Tensor], rows: int, columns: int, height: int, width: int, extreme: bool
) -> None:
    pixels = noise(rows, columns, extreme=extreme)
    got = resize(pixels, height, width)
    assert torch.equal(got, reference_vision.resize(pixels, height, width))


@pytest.mark.parametrize(
    "sizes",
    [
        (54, 96, 64, 96), (96, 54, 96, 64), (64, 64, 64, 64),  # one side, and none
        (100, 80, 60, 60), (101, 80, 60, 60), (100, 80, 99, 160),  # about where Pillow 13 begins with the height
        (1, 200, 32, 704), (400, 2, 704, 32),  # the longest that are taken
        (333, 157, 64, 64),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_as_they_come(resize: Callable[..., Tensor], sizes: tuple[int, int, int, int]) -> None:
    rows, columns, height, width = sizes
    pixels = noise(rows, columns, extreme=True)
    assert torch.equal(resize(pixels, height, width), reference_vision.resize(pixels, height, width))


def test_a_flat_picture_stays_flat(resize: Callable[..., Tensor]) -> None:
    for value in (0, 1, 127, 254, 255):
        assert resize(torch.full((37, 23, 3), value, dtype=torch.uint8), 64, 32).unique().tolist() == [value]


@pytest.mark.cuda
@pytest.mark.parametrize("size", [(90, 70), (64, 64), (300, 500), (900, 40), (1, 90)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_the_patches_of_a_request_are_those_of_the_host(vision_model: Tiny, mode: str, size: tuple[int, int]) -> None:
    """With pictures that are resized on the GPU, on the host as they are far too large, and not at all."""
    model = mllm.load(vision_model.folder, device="cuda")
    assert model.images is not None
    picture = Image.fromarray(noise(size[1], size[0]).numpy()).convert(mode)
    prompt = mllm.Prompt(tokens=[1, model.config.image_token_id], images=[picture])
    request = requests.make(model, prompt, index=0, new_tokens=1, sampling=Sampling())
    got = requests.patch_batch(model, request).patches
    assert np.array_equal(got.cpu().numpy(), images.patches(picture, model.images))
