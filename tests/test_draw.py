"""Drawing without a sort: the kernels keep what the reference keeps and draw its tokens.

TRITON_INTERPRET=1 pytest tests/test_draw.py
pytest tests/test_draw.py --device cuda
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from test_sampling import KNOWN
from torch import Tensor

import mllm
from mllm import stages
from mllm.batch import SamplingBatch
from mllm.kernels.noise import gumbel
from mllm.kernels.ops import NOT_FINITE
from mllm.kernels.reference import REFERENCE, kept
from mllm.sampling import Sampling, sampling_batch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  (after it is known to be there)

from mllm.kernels import cuda, cuda_prompts, draw  # noqa: E402

BLOCK = 64  # of a small vocabulary, that it has several parts
pytestmark = pytest.mark.usefixtures("triton_device")


@triton.jit
def limit_kernel(sums, top_k, top_p, limit, equals, V, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """`draw.limit_of` each row."""
    b = tl.program_id(0)
    row = sums + b * 2 * draw.LEVELS * draw.WIDTH
    below, at, _ = draw.limit_of(row, tl.load(top_k + b), tl.load(top_p + b), V, TOP_K, TOP_P)
    tl.store(limit + b, below)
    tl.store(equals + b, at)


@triton.jit
def philox_kernel(seed, counter, words):
    """The words of Philox for one seed i64 and counter i32 [4], as `draw.noise_of` takes them from Triton."""
    a, b, c, d = tl.philox(
        tl.load(seed), tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    )
    tl.store(words, a.to(tl.int64))
    tl.store(words + 1, b.to(tl.int64))
    tl.store(words + 2, c.to(tl.int64))
    tl.store(words + 3, d.to(tl.int64))


@triton.jit
def noise_kernel(seed, position, index, out):
    b = tl.program_id(0)
    tl.store(out + b, draw.noise_of(tl.load(seed + b), tl.load(position + b), tl.load(index + b)))


def kept_of(logits: Tensor, sampling: SamplingBatch, sums: Tensor) -> Tensor:
    """bool [B V]: what is kept by the `sums` of a search, ties by index."""
    rows, vocabulary = logits.shape
    limit = torch.empty(rows, 1, dtype=torch.int32, device=logits.device)
    equals = torch.empty_like(limit)
    limit_kernel[(rows,)](
        sums, sampling.top_k, sampling.top_p, limit, equals, vocabulary, TOP_K=sampling.has_top_k,
        TOP_P=sampling.has_top_p,
    )  # fmt: skip
    distance = scaled(logits, sampling).abs()
    key = (distance.view(torch.int32) - draw.FLOOR.value).clamp(0, draw.END.value - 1)
    tie = key == limit
    return ((key < limit) | (tie & (tie.cumsum(-1) <= equals))) & (torch.exp(-distance) >= sampling.min_p[:, None])


def drawn(logits: Tensor, sampling: SamplingBatch, lengths: Tensor, block: int = BLOCK) -> Tensor:
    found = draw.search(logits, sampling, block=block, pdl=False)
    return draw.draw(logits, sampling, lengths, found, block=block, pdl=False)


def scaled(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    return (logits - logits.amax(-1, keepdim=True)) / sampling.temperature.unsqueeze(1)


def batch_of(rows: list[Sampling], device: str) -> SamplingBatch:
    return sampling_batch(rows, size=len(rows), device=device)


LOGITS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "normal": lambda r, n: r.normal(0, 4, n),
    "narrow": lambda r, n: r.normal(0, 1e-3, n),
    "minute": lambda r, n: r.normal(0, 1e-30, n),
    "huge": lambda r, n: r.normal(0, 1e30, n),
    "equal": lambda r, n: np.full(n, r.normal()),
    "few": lambda r, n: r.integers(0, 4, n),
    "rounded": lambda r, n: np.round(r.normal(0, 3, n) * 4) / 4,
    "one far above": lambda r, n: r.normal(0, 1, n) + 60.0 * (np.arange(n) == r.integers(n)),
    "two alike above": lambda r, n: r.normal(0, 1, n) + 9.0 * (np.arange(n) % (n // 2 + 1) == n // 3),
    "steep": lambda r, n: r.permutation(n) * -0.7,
}


def setting(random: np.random.Generator, vocabulary: int) -> Sampling:
    """Settings of every kind, extreme ones often."""

    def one(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    return Sampling(
        temperature=one(0.0, 1e-4, 0.7, 1.0, 1e4, float(random.uniform(0.05, 5))),
        top_k=one(0, 0, 1, vocabulary - 1, vocabulary, 2**31 - 1, *map(int, random.integers(1, vocabulary + 1, 5))),
        top_p=one(1.0, 1.0, 5e-324, 1e-6, 0.999, *map(float, random.uniform(0.05, 0.99, 4))),
        min_p=one(0.0, 0.0, 0.001, 0.1, 1.0),
        seed=int(random.integers(0, 2**63)),
    )  # fmt: skip


def nearly(logits: Tensor, sampling: SamplingBatch, by: float) -> Tensor:
    """bool [B V]: what the reference keeps with limits that are wider by `by`."""
    top_p = torch.where(sampling.top_p < 1, sampling.top_p + by, 1.0)
    wider = attrs.evolve(sampling, top_p=top_p, min_p=sampling.min_p * (1 - by))  # type: ignore[misc]
    return kept(scaled(logits, sampling), wider)


def compare(seed: int, vocabulary: int, block: int, device: str) -> int:
    """A batch of every kind of row, compared; how many of them drew under limits that rounding does not decide."""
    random = np.random.default_rng(seed)
    rows = [setting(random, vocabulary) for _ in LOGITS]
    made = np.stack([make(random, vocabulary) for make in LOGITS.values()])
    logits, sampling = torch.tensor(made, dtype=torch.float32, device=device), batch_of(rows, device)
    lengths = torch.tensor(random.integers(1, 2**31, len(rows)), dtype=torch.int32, device=device)
    found = draw.search(logits, sampling, block=block, pdl=False)
    tokens = draw.draw(logits, sampling, lengths, found, block=block, pdl=False)
    expected = REFERENCE.sample(logits, sampling, lengths)
    keeps, score = kept_of(logits, sampling, found.sums), scaled(logits, sampling)
    near = score > -31.9  # what is further down is never drawn, and may be kept or not
    by = 1e-5 if vocabulary < 10_000 else 1e-4  # the reference adds up float32, too
    least, most = (near & nearly(logits, sampling, by) for by in (-by, by))
    own = torch.where(keeps, score + gumbel(sampling.seed, lengths, vocabulary), -math.inf).argmax(-1)
    certain = (least == most).all(-1) & (sampling.temperature > 0)
    for i, (kind, s) in enumerate(zip(LOGITS, rows, strict=True)):
        if s.temperature > 0:
            assert not (least[i] & ~keeps[i]).any(), (kind, s)
            assert not (keeps[i] & near[i] & ~most[i]).any(), (kind, s)
            assert int(tokens[i]) == int(own[i]), (kind, s)
        if certain[i] or s.temperature == 0:
            assert int(tokens[i]) == int(expected[i]), (kind, s)
    return int(certain.sum())


@pytest.mark.parametrize(
    ("vocabulary", "block", "turns"), [(1, 64, 1), (37, 64, 3), (64, 64, 2), (150, 64, 3), (1500, 1024, 1)]
)
def test_mixed_rows_keep_and_draw_what_the_reference_does(vocabulary: int, block: int, turns: int, device: str) -> None:
    turns *= {"cpu": 1, "cuda": 20}[device]
    compared = sum(compare(1000 * vocabulary + turn, vocabulary, block, device) for turn in range(turns))
    assert compared >= 4 * turns or vocabulary == 1


@pytest.mark.cuda
@pytest.mark.parametrize("block", [512, 1024])
@pytest.mark.parametrize("vocabulary", [5000, 8192, 151_936])
def test_large_vocabularies_keep_and_draw_what_the_reference_does(vocabulary: int, block: int, device: str) -> None:
    assert sum(compare(seed, vocabulary, block, device) for seed in range(10)) > 20


@pytest.mark.parametrize("top_k", [1, 63, 64, 65, 130, 149])
def test_of_equal_tokens_the_first_are_kept_across_parts(top_k: int, device: str) -> None:
    logits = torch.zeros(2, 150, device=device)
    logits[1, 149] = 1.0  # takes the place of one of them
    sampling = batch_of([Sampling(temperature=1.0, top_k=top_k)] * 2, device)
    found = draw.search(logits, sampling, block=BLOCK, pdl=False)
    keeps = kept_of(logits, sampling, found.sums).cpu()
    assert keeps[0].nonzero().flatten().tolist() == list(range(top_k))
    assert keeps[1].nonzero().flatten().tolist() == [*range(top_k - 1), 149]


@pytest.mark.parametrize("top_p", [1 / 128, 0.25, 0.5, 0.75])
def test_a_share_of_equal_tokens_is_exact(top_p: float, device: str) -> None:
    logits = torch.zeros(2, 128, device=device)
    sampling = batch_of(
        [Sampling(temperature=1.0, top_p=top_p), Sampling(temperature=1.0, top_k=64, top_p=top_p)], device
    )
    found = draw.search(logits, sampling, block=BLOCK, pdl=False)
    counts = kept_of(logits, sampling, found.sums).sum(-1).tolist()
    assert counts == [128 * top_p, max(64 * top_p, 1)]


def test_draws_from_ties_are_the_kept_ones_across_parts_and_steps_of_one(device: str) -> None:
    logits = torch.zeros(5, 1500, device=device)
    sampling = batch_of([Sampling(temperature=1.0, top_k=700, top_p=0.9999, seed=i) for i in range(5)], device)
    lengths = torch.full((5,), 6, dtype=torch.int32, device=device)
    noise = gumbel(sampling.seed, lengths, 1500)
    tokens = drawn(logits, sampling, lengths, block=1024)
    assert tokens.tolist() == noise[:, :700].argmax(-1).tolist() == [53, 650, 621, 337, 555]
    assert noise[:, :1024].argmax(-1).tolist() == [53, 650, 945, 337, 893]  # had others of the first part been kept
    assert noise.argmax(-1).tolist() == [1115, 650, 1115, 1143, 1498]


@pytest.mark.parametrize("by", [-0.1, 0.1])
def test_the_largest_noise_draws_a_token_far_below_the_likeliest(by: float, device: str) -> None:
    sampling = batch_of([Sampling(temperature=1.0, seed=145_994)], device)
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    noise = gumbel(sampling.seed, lengths, 100)[0]
    likeliest = int(noise[:64].argmin())
    below = noise[95] - noise[likeliest] + by
    assert below > 16
    logits = torch.full((1, 100), -60.0, device=device)
    logits[0, likeliest], logits[0, 95] = 0.0, -below
    assert drawn(logits, sampling, lengths).item() == (95 if by < 0 else likeliest)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99, slice(0, 100, 2)])
def test_a_row_that_is_not_finite_says_so_and_no_other_notices(value: float, place: Any, device: str) -> None:
    rows = [Sampling(temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, seed=i) for i in range(3)]
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)).mul_(3).to(device)
    lengths = torch.tensor([4, 5, 6], dtype=torch.int32, device=device)
    expected = REFERENCE.sample(logits, batch_of(rows, device), lengths).tolist()
    logits[1, place] = value
    assert drawn(logits, batch_of(rows, device), lengths).tolist() == [expected[0], NOT_FINITE, expected[2]]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_philox_gives_the_known_answers(key: Any, counter: Any, words: Any, device: str) -> None:
    seed = np.array([key[0] | key[1] << 32], np.uint64).view(np.int64)
    given = np.array(counter, np.uint32).view(np.int32)
    out = torch.empty(4, dtype=torch.int64, device=device)
    philox_kernel[(1,)](torch.tensor(seed, device=device), torch.tensor(given, device=device), out)
    assert tuple(out.tolist()) == words


def test_the_noise_is_that_of_the_reference(device: str) -> None:
    """The first two are the largest and the smallest there is."""
    random = np.random.default_rng(0)
    seed = torch.tensor([68, 348, 0, 2**63 - 1, *random.integers(0, 2**63, 60)], device=device)
    position = torch.tensor([5, 5, 0, 2**31 - 1, *random.integers(0, 2**31, 60)], dtype=torch.int32, device=device)
    index = torch.tensor([81571, 124025, 0, 1, *random.integers(0, 2000, 60)], dtype=torch.int32, device=device)
    out = torch.empty(64, device=device)
    noise_kernel[(64,)](seed, position, index, out)
    expected = [gumbel(seed[i, None], position[i, None], int(index[i]) + 1)[0, -1].item() for i in range(64)]
    assert out.tolist() == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert float(out[0]) == float(out.max()) == pytest.approx(16.635532)
    assert float(out[1]) == float(out.min()) == pytest.approx(-2.811541, rel=1e-5)


def test_draws_follow_the_softmax_of_what_is_kept(device: str) -> None:
    """Chi-square over seeds."""
    count, temperature = {"cpu": 200, "cuda": 20_000}[device], 0.8
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0])
    chance = (logits.double() / temperature).softmax(0).numpy()
    chance[chance < 0.08 * chance.max()] = 0.0
    rows = batch_of([Sampling(temperature=temperature, min_p=0.08, seed=i) for i in range(count)], device)
    lengths = torch.full((count,), 9, dtype=torch.int32, device=device)
    seen = np.bincount(drawn(logits.to(device).repeat(count, 1), rows, lengths).cpu(), minlength=8)
    assert seen[chance == 0].sum() == 0
    expected = (chance / chance.sum() * count)[chance > 0]
    assert len(expected) == 6
    assert ((seen[chance > 0] - expected) ** 2 / expected).sum() < 20.5  # 5 degrees: exceeded once in a thousand seeds


@pytest.mark.parametrize(
    ("s", "launched"),
    [
        (Sampling(), 0),
        (Sampling(temperature=1.0, min_p=0.1), 0),
        (Sampling(temperature=1.0, top_k=5), 6),
        (Sampling(temperature=1.0, top_p=0.5), 6),
        (Sampling(temperature=1.0, top_k=5, top_p=0.5), 12),
    ],
)
def test_a_search_that_no_row_needs_is_not_launched(
    s: Sampling, launched: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    real = draw.search_kernel

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            counted.append(grid)
            return real[grid]

    monkeypatch.setattr(draw, "search_kernel", Counting())
    rows = [s, Sampling(top_k=3, top_p=0.5)]  # the other is greedy, whose limits ask for nothing
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(device)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    tokens = cuda_prompts.prompt_ops(64, wide=False).sample(logits, batch_of(rows, device), lengths)
    assert torch.equal(tokens, REFERENCE.sample(logits, batch_of(rows, device), lengths))
    assert len(counted) == launched


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_recorded_draw_equals_the_reference_time_and_again(rows: int, device: str) -> None:
    table = cuda.decode_ops(rows, pdl=torch.cuda.get_device_capability() >= (9, 0))
    captured = mllm.capture(partial(stages.sample, ops=table))
    for turn in range(20):
        logits = torch.randn(rows, 151_936, generator=torch.Generator().manual_seed(turn)).mul_(3).to(device)
        sampling = batch_of(
            [Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=turn + i) for i in range(rows)], device
        )
        lengths = torch.arange(rows, dtype=torch.int32, device=device)
        tokens = [captured(logits, sampling, lengths) for _ in range(3)]
        expected = REFERENCE.sample(logits, sampling, lengths)
        assert all(torch.equal(t, expected) for t in tokens)
