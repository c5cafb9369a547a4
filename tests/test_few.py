"""Products with 2 to 8 rows on tensor cores against their definitions, and which weights they take, which needs no GPU.

pytest tests/test_few.py --device cuda
"""

from __future__ import annotations

import pytest
import torch
from attending import error
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

SHAPES = [(512, 24), (1536, 100), (2048, 4096), (2560, 6144), (4096, 4100)]
"""Inputs and outputs: of one piece and of several, of one tile for each program and of several, with a rest."""


def random(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize("shape", [*SHAPES, (6144, 2048), (9728, 2560), (12288, 4096)], ids=str)
def test_a_product_of_a_few_rows_goes_on_with_what_follows_it(shape: tuple[int, int], rows: int, device: str) -> None:
    from mllm.kernels import cuda, few

    inputs, outputs = shape
    ops = cuda.decode_ops(rows, pdl=torch.cuda.get_device_capability() >= (9, 0), hopper=True)
    x = random(rows, inputs, device=device)
    weight = random(2 * outputs, inputs, device=device, scale=inputs**-0.5)
    norm, residual = random(inputs, device=device), random(rows, outputs, device=device)
    exact = x.double() @ weight[:outputs].double().T
    assert few.fits(weight, kept=False)
    assert error(ops.linear_add(x, weight[:outputs], residual), residual.double() + exact) < 1e-2
    if not few.fits(weight, kept=True):
        return
    normal = F.rms_norm(x.double(), (inputs,), norm.double(), 1e-6)
    gate, up = (normal @ weight.double().T).chunk(2, 1)
    stream, product = ops.norm_linear(x, norm, weight[:outputs], eps=1e-6)
    assert stream is x
    assert error(product, gate) < 1e-2
    assert error(ops.norm_gate(x, norm, weight, eps=1e-6)[1], F.silu(gate) * up) < 1e-2
    logits = ops.head(x, None, norm, weight[:outputs], eps=1e-6)
    assert logits.dtype == torch.float32
    assert error(logits, gate) < 1e-2


@pytest.mark.cuda
def test_a_broken_row_of_a_few_leaves_the_others_as_they_are(device: str) -> None:
    from mllm.kernels import cuda, few

    x, weight = random(3, 1024, device=device), random(300, 1024, device=device)
    assert few.fits(weight, kept=True)
    head = cuda.decode_ops(3, pdl=False, hopper=True).head
    norm = torch.ones(1024, dtype=torch.bfloat16, device=device)
    before = head(x, None, norm, weight, eps=1e-6)
    x[1] = torch.nan
    after = head(x, None, norm, weight, eps=1e-6)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert after[1].isnan().all()


@pytest.mark.parametrize(
    ("weight", "kept"),
    [
        (torch.empty(64, 768, dtype=torch.bfloat16), False),  # no whole pieces
        (torch.empty(64, 6144, dtype=torch.bfloat16), True),  # more of x than registers
        (torch.empty(64, 1024), False),
        (torch.empty(64, 1024, dtype=torch.float16), False),
        (torch.empty(1024, 64, dtype=torch.bfloat16).T, False),
        (torch.empty(64 * 1024 + 1, dtype=torch.bfloat16)[1:].view(64, 1024), False),  # no 16 bytes at once
    ],
    ids=["pieces", "registers", "float32", "float16", "columns", "odd"],
)
def test_weights_of_another_form_are_left_to_others(weight: Tensor, kept: bool) -> None:
    from mllm.kernels import few

    assert not few.fits(weight, kept=kept)


@pytest.mark.parametrize("kept", [False, True])
def test_every_weight_that_is_taken_is_read_in_whole_pieces(kept: bool) -> None:
    from mllm.kernels import few

    for inputs in range(512, 16384, 512):
        weight = torch.empty(16, inputs, dtype=torch.bfloat16, device="meta")
        if few.fits(weight, kept=kept):
            for tiles in (1, 132, 133, 10_000):
                tile = few.tile_for(tiles, inputs, kept=kept)
                assert inputs % (tile.warps * tile.inputs) == 0
                assert tiles <= tile.programs or tile.kept * tile.warps * tile.inputs >= inputs


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("tokens", [30, 300])
def test_what_is_left_of_a_prompt_goes_on_as_the_rows_of_a_step(tokens: int, rows: int, triton_device: str) -> None:
    from mllm.kernels import cuda_prompts
    from mllm.kernels.norm import add_norm
    from mllm.kernels.reference import REFERENCE

    on_hopper = triton_device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    ops = cuda_prompts.prompt_ops(tokens, wide=on_hopper, hopper=on_hopper)
    dtype = torch.bfloat16 if on_hopper else torch.float32  # the interpreter multiplies bfloat16 wrongly
    y, x, norm = (random(*n, device=triton_device).to(dtype) for n in ((rows, 96), (rows, 64), (64,)))
    out, gate = (random(*n, device=triton_device, scale=0.1).to(dtype) for n in ((64, 96), (256, 64)))
    want = REFERENCE.linear_add(*(t.float() for t in (y, out, x)))
    stream, made = ops.norm_gate(ops.linear_add(y, out, x), norm, gate, eps=1e-6)
    assert error(stream, want) < 1e-2
    assert error(made, REFERENCE.norm_gate(want, norm.float(), gate.float(), eps=1e-6)[1]) < 1e-2
    last = torch.arange(rows - 1, -1, -1, device=triton_device)
    normal = add_norm(want, norm.float(), eps=1e-6)[1]
    for chosen in (None, last):  # all of them, or some that are chosen, though they be few
        logits = ops.head(stream, chosen, norm, gate, eps=1e-6)
        assert error(logits, (normal if chosen is None else normal[chosen]) @ gate.float().T) < 1e-2
