"""M-RoPE in both layouts, of whole heads and of parts: the definition against transformers, and the kernels, which turn
queries and keys where they lie, against complex numbers in float64.

TRITON_INTERPRET=1 pytest tests/test_mrope.py
pytest tests/test_mrope.py --device cuda
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st
from tiny import examples
from torch import Tensor

from mllm.errors import ShapeError
from mllm.kernels import rotary

LONGEST = 262_144  # positions of the longest context
Rotate = Callable[..., tuple[Tensor, Tensor]]  # tables and turns q, k in place; returns the tables


def turns(half: int, theta: float, device: str) -> Tensor:
    """Radians per position as a CPU rounds them: a last bit that a GPU rounds otherwise shows at long positions."""
    return rotary.frequencies(half, theta, torch.device("cpu")).to(device)


@pytest.fixture(scope="module")
def rotate(triton_device: str) -> Rotate:
    """Both kernels, one after the other, as this device can run them."""
    pytest.importorskip("triton")
    from mllm.kernels import mrope, step

    pdl = triton_device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)

    def run(
        q: Tensor, k: Tensor, positions: Tensor, half: int, theta: float, sections: Sequence[int], interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        cos, sin = step.rotary(positions, turns(half, theta, triton_device), sections, interleaved=interleaved, pdl=pdl)
        mrope.rotate_(q, k, cos, sin, pdl=pdl)
        return cos, sin

    return run


# the definition against transformers


@frozen(kw_only=True)
class Theirs:
    """A model of transformers that rotates the first `share` of every head."""

    module: str
    embedding: str
    config: str
    interleaved: bool | None = None  # None: one position a token
    share: float = 1.0


THEIRS = (
    Theirs(module="qwen3_vl", embedding="Qwen3VLTextRotaryEmbedding", config="Qwen3VLTextConfig", interleaved=True),
    Theirs(module="qwen2_vl", embedding="Qwen2VLRotaryEmbedding", config="Qwen2VLTextConfig", interleaved=False),
    Theirs(module="qwen2_5_vl", embedding="Qwen2_5_VLRotaryEmbedding", config="Qwen2_5_VLTextConfig",
           interleaved=False),
    Theirs(module="qwen3_5", embedding="Qwen3_5TextRotaryEmbedding", config="Qwen3_5TextConfig", interleaved=True,
           share=0.25),
    Theirs(module="qwen3_next", embedding="Qwen3NextRotaryEmbedding", config="Qwen3NextConfig", share=0.5),
)  # fmt: skip


def turned_by(
    peer: Theirs, q: Tensor, k: Tensor, positions: Tensor, theta: float, sections: Sequence[int]
) -> tuple[Tensor, ...]:
    """q [T H D] and k [T K D] at positions [3 T], as that model turns them."""
    folder = f"transformers.models.{peer.module}"
    hf = importlib.import_module(f"{folder}.modeling_{peer.module}")
    configs = importlib.import_module(f"{folder}.configuration_{peer.module}")
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": peer.share}
    if peer.interleaved is not None:
        rope |= {"mrope_section": list(sections)}
    sizes = {"hidden_size": q[0].numel(), "num_attention_heads": q.shape[1], "head_dim": q.shape[2]}
    config = getattr(configs, peer.config)(**sizes, rope_parameters=rope)
    where = positions[:1] if peer.interleaved is None else positions.unsqueeze(1)
    cos, sin = getattr(hf, peer.embedding)(config)(q, where)
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    if cos.dim() == 4:  # earlier versions choose between the positions where they rotate
        turned = hf.apply_multimodal_rotary_pos_emb(q, k, cos, sin, list(sections))
    else:
        turned = hf.apply_rotary_pos_emb(q, k, cos, sin)
    return tuple(x.squeeze(0).transpose(0, 1) for x in turned)


@pytest.mark.parametrize("by", ["definition", "kernel"])
@pytest.mark.parametrize("eighths", [(3, 3), (0, 5), (8, 0)], ids=str)
@pytest.mark.parametrize("size", [16, 24, 96, 128])
@pytest.mark.parametrize("peer", THEIRS, ids=lambda peer: peer.module)
def test_heads_are_turned_as_in_transformers(
    peer: Theirs, size: int, eighths: tuple[int, int], by: str, device: str, request: pytest.FixtureRequest
) -> None:
    half, interleaved, generator = int(size * peer.share) // 2, bool(peer.interleaved), torch.Generator().manual_seed(0)
    height, width = (0, 0) if peer.interleaved is None else (half * part // 8 for part in eighths)
    sections = (half - height - width, height, width)
    q, k = torch.randn(7, 4, size, generator=generator), torch.randn(7, 2, size, generator=generator)
    positions = torch.randint(0, 3000, (3, 7), generator=generator, dtype=torch.int32)
    want = turned_by(peer, q, k, positions, 1e4, sections)
    if by == "kernel":
        got = [x.to(device) for x in (q, k)]
        request.getfixturevalue("rotate")(*got, positions.to(device), half, 1e4, sections, interleaved)
    else:
        tables = rotary.mrope(positions, head_dim=2 * half, theta=1e4, sections=sections, interleaved=interleaved)
        got = [rotary.rotate(x, *tables) for x in (q, k)]
    for ours, theirs in zip(got, want, strict=True):
        assert float((ours.cpu() - theirs).abs().max()) < 2e-5


def test_sections_one_after_the_other_have_to_hold_every_pair() -> None:
    positions = torch.zeros(3, 2, dtype=torch.int32)
    for sections in ((1, 2, 2), (4, 2, 1), (7, -2, 1), (3, 3), (2, 2, 1, 1)):
        with pytest.raises(ShapeError, match="three sections of 6 rotary pairs"):
            rotary.mrope(positions, head_dim=12, theta=1e4, sections=sections, interleaved=False)


# the kernels against complex numbers


def turned(x: Tensor, positions: Tensor, half: int, theta: float, sections: Sequence[int], interleaved: bool) -> Tensor:
    """The first 2 * half numbers of heads x [T heads D] in float64, as complex numbers times those of unit length.

    The angles are float32, as in every implementation: at long positions their last bit is what shows most.
    """
    if interleaved:
        axes = [next((a for a in (1, 2) if i % 3 == a and i < 3 * sections[a]), 0) for i in range(half)]
    else:
        axes = [a for a in range(3) for _ in range(sections[a])]
    angle = (positions[axes].float().T * turns(half, theta, positions.device.type)).double()
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat((z.real, z.imag), -1)


def _fused(flat: Tensor, T: int, H: int, K: int, D: int) -> tuple[Tensor, ...]:
    return flat[: T * (H + 2 * K) * D].view(T, H + 2 * K, D).split((H, K, K), 1)


def _by_heads(flat: Tensor, T: int, H: int, K: int, D: int) -> tuple[Tensor, ...]:
    return flat[: T * (H + 2 * K) * D].view(H + 2 * K, T, D).transpose(0, 1).split((H, K, K), 1)


def _with_gaps(flat: Tensor, T: int, H: int, K: int, D: int) -> tuple[Tensor, ...]:
    """Every other token, every other head, and each head after three numbers that are not its own."""
    wide = flat[: 4 * T * (H + K) * (D + 3)].view(T, 2, H + K, 2, D + 3)
    return wide[:, 1, :, 0, 3:].split((H, K), 1)


def _apart(flat: Tensor, T: int, H: int, K: int, D: int) -> tuple[Tensor, ...]:
    """k by heads before q by tokens, and neither where 16 bytes begin."""
    k, q = flat[1 : 1 + T * (K + H) * D].split((T * K * D, T * H * D))
    return q.view(T, H, D), k.view(K, T, D).transpose(0, 1)


VIEWS = {"fused": _fused, "by heads": _by_heads, "with gaps": _with_gaps, "apart": _apart}


@frozen(kw_only=True)
class Case:
    """q [T H D] and k [T K D], of whose heads the first 2 * half numbers turn."""

    T: int = 3
    H: int = 4
    K: int = 2
    D: int = 16
    half: int = 8
    sections: tuple[int, ...] = (4, 2, 2)
    interleaved: bool = True
    view: str = "fused"
    dtype: torch.dtype = torch.float32
    theta: float = 1e4
    longest: int = 3000
    seed: int = 0


def check(case: Case, rotate: Rotate, device: str) -> None:
    """Rotate views of noise: they hold what they should, and nothing around them changed by a bit."""
    generator = torch.Generator().manual_seed(case.seed)
    sizes = (case.T, case.H, case.K, case.D)
    flat = torch.randn(4 * case.T * (case.H + 2 * case.K) * (case.D + 3) + 1, generator=generator)
    flat = flat.to(device, case.dtype)
    positions = torch.randint(0, case.longest, (3, case.T), generator=generator, dtype=torch.int32).to(device)
    rule = (positions, case.half, case.theta, case.sections, case.interleaved)
    before, want, mine = flat.clone(), flat.double(), torch.zeros_like(flat, dtype=torch.bool)
    views = VIEWS[case.view]
    rotate(*views(flat, *sizes)[:2], *rule)
    for x, own in zip(views(want, *sizes)[:2], views(mine, *sizes)[:2], strict=True):
        x[..., : 2 * case.half] = turned(x, *rule)
        own[..., : 2 * case.half] = True
    assert int(mine.sum()) == case.T * (case.H + case.K) * 2 * case.half
    assert torch.equal(flat[~mine], before[~mine])
    # one rounding to the dtype, which Triton's interpreter cuts where it is bfloat16; float32 tables and products
    steps = 1.01 if device == "cpu" and case.dtype == torch.bfloat16 else 0.51
    allowed = steps * torch.finfo(case.dtype).eps * want.abs() + 2e-5
    assert bool(((flat.double() - want).abs() <= allowed)[mine].all())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.integers(2, 40))
    half = draw(st.integers(1, size // 2))
    height = draw(st.integers(0, half))
    width = draw(st.integers(0, half - height))
    return Case(
        T=draw(st.integers(1, 4)), H=draw(st.integers(1, 7)), K=draw(st.integers(0, 3)), D=size, half=half,
        sections=(half - height - width, height, width), interleaved=draw(st.booleans()),
        view=draw(st.sampled_from(sorted(VIEWS))), theta=draw(st.sampled_from([10.0, 1e4, 5e6])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        longest=draw(st.sampled_from([1, 100, LONGEST])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@examples(60)
@given(case=cases())
def test_views_of_any_shape_are_turned_in_place(case: Case, rotate: Rotate, device: str) -> None:
    check(case, rotate, device)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "sectioned"])
@pytest.mark.parametrize("shape", [
    {"T": 0}, {"T": 1}, {"K": 0}, {"H": 0}, {"H": 1, "K": 1, "D": 2, "half": 1, "sections": (0, 0, 1)},
    {"H": 16, "K": 8, "D": 128, "half": 64, "sections": (24, 20, 20)},  # of Qwen3-VL 2B
    {"H": 28, "K": 4, "D": 128, "half": 64, "sections": (16, 24, 24)},  # of Qwen2-VL 7B: q takes two programs
    {"H": 16, "K": 2, "D": 256, "half": 32, "sections": (11, 11, 10)},  # of Qwen3.5: a quarter of each head
    {"T": 2, "H": 3, "K": 5, "D": 1500, "half": 600, "sections": (200, 200, 200)},  # more pairs than `PAIRS`
], ids=str)  # fmt: skip
def test_shapes_at_the_edges_and_of_public_models(
    shape: dict[str, Any], interleaved: bool, view: str, rotate: Rotate, device: str
) -> None:
    check(Case(**shape, interleaved=interleaved, view=view, dtype=torch.bfloat16), rotate, device)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "sectioned"])
@pytest.mark.parametrize("position", [0, 1, 1000, 40_000, LONGEST - 1])
def test_tables_hold_at_long_positions_of_any_strides(
    position: int, interleaved: bool, rotate: Rotate, device: str
) -> None:
    own = torch.tensor([[position, position // 2, position // 3], [5, 6, 7]], dtype=torch.int32, device=device)
    nothing = torch.empty(2, 0, 128, device=device)
    for positions in (own.T, own.T.contiguous(), own[:, 0].expand(3, -1)):
        cos, sin = rotate(nothing, nothing, positions, 64, 5e6, (24, 20, 20), interleaved)
        want = rotary.mrope(positions.cpu(), head_dim=128, theta=5e6, sections=(24, 20, 20), interleaved=interleaved)
        for got, table in zip((cos, sin), want, strict=True):
            assert float((got.cpu() - table.squeeze(1)).abs().max()) < 2e-6


@pytest.mark.cuda
def test_heads_may_lie_further_apart_than_32_bits_count(rotate: Rotate, device: str) -> None:
    flat = torch.empty(2**31 + 2**10, dtype=torch.bfloat16, device=device)
    q = flat.as_strided((2, 3, 16), (16, 2**30, 1)).normal_()
    want = rotary.rotate(q, *rotary.mrope(torch.ones(3, 2, device=device), head_dim=16, theta=1e4, sections=(8, 0, 0)))
    rotate(q, q[:, :0], torch.ones(3, 2, dtype=torch.int32, device=device), 8, 1e4, (8, 0, 0), True)
    assert float((q.float() - want.float()).abs().max()) < 0.04


@pytest.mark.parametrize(("q", "k", "tables", "said"), [
    (torch.empty(3, 8), torch.empty(3, 1, 8), torch.empty(3, 4), r"q \[3 heads 8\]"),
    (torch.empty(3, 2, 8), torch.empty(4, 2, 8), torch.empty(3, 4), r"k \[3 heads 8\].*\[4, 2, 8\]"),
    (torch.empty(3, 2, 8), torch.empty(3, 2, 6), torch.empty(3, 4), r"k \[3 heads 8\].*\[3, 2, 6\]"),
    (torch.ones(3, 2, 8).int(), torch.empty(3, 2, 8), torch.empty(3, 4), "q .*int32"),
    (torch.empty(3, 8, 2).mT, torch.empty(3, 2, 8), torch.empty(3, 4), "of q side by side.*contiguous"),
    (torch.empty(3, 2, 8), torch.empty(3, 2, 16)[..., ::2], torch.empty(3, 4), "of k side by side.*contiguous"),
    (torch.empty(3, 2, 8), torch.empty(3, 1, 8).expand(3, 2, 8), torch.empty(3, 4), "k to hold each number once"),
    (torch.empty(3, 2, 8), torch.empty(3, 2, 8), torch.empty(3, 5), "cos .*<= 8"),
    (torch.empty(3, 2, 8), torch.empty(3, 2, 8), torch.empty(2, 4), r"cos float32 \[3 half\]"),
    (torch.empty(3, 2, 8), torch.empty(3, 2, 8), torch.empty(3, 1, 4), r"cos float32 \[3 half\]"),
    (torch.empty(3, 2, 8), torch.empty(3, 2, 8), torch.empty(4, 3).T, "cos .*contiguous"),
    (torch.empty(3, 2, 8), torch.empty(3, 2, 8), torch.empty(3, 4).half(), "cos float32.*float16"),
])  # fmt: skip
def test_what_cannot_be_turned_in_place_is_refused(q: Tensor, k: Tensor, tables: Tensor, said: str) -> None:
    pytest.importorskip("triton")
    from mllm.kernels import mrope

    with pytest.raises(ShapeError, match=said):
        mrope.rotate_(q, k, tables, tables)


def test_tables_of_sections_that_do_not_hold_the_pairs_are_refused() -> None:
    pytest.importorskip("triton")
    from mllm.kernels import step

    with pytest.raises(ShapeError, match="three sections of 8 rotary pairs"):
        step.rotary(torch.zeros(3, 1).int(), torch.ones(8), (4, 2, 1), interleaved=False, pdl=False)
