"""Sampling: the kept tokens are transformers', the noise is Philox, and no row notices its neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import Tiny, examples, four_prompts
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mllm
from mllm.errors import ShapeError
from mllm.kernels.noise import gumbel, philox
from mllm.kernels.reference import REFERENCE, kept
from mllm.sampling import Sampling, sampling_batch
from mllm.stages import sample


def draw(logits: torch.Tensor, rows: list[Sampling], lengths: list[int]) -> list[int]:
    """The next token of each row, by the stage."""
    settings = sampling_batch(rows, size=len(rows), device="cpu")
    out = sample(logits, settings, torch.tensor(lengths, dtype=torch.int32), ops=REFERENCE)
    assert (out.dtype, out.shape) == (torch.int32, (len(rows),))
    return list(out.tolist())


def noise_of(seed: int, shape: tuple[int, ...], scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def theirs(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """What transformers' processors leave of logits [V], in the order in which it applies them."""
    scores, ids = logits[None], torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(float(s.temperature))(ids, scores)
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(ids, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(float(s.top_p))(ids, scores)
    if s.min_p:
        scores = MinPLogitsWarper(float(s.min_p))(ids, scores)
    return scores[0]


def ours(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    return kept(logits[None] / s.temperature, sampling_batch([s], size=1, device="cpu"))[0]


def near_an_edge(logits: torch.Tensor, s: Sampling) -> bool:
    """Whether a probability lies so near a limit that the order of a sum decides."""
    scores = (logits.double() / s.temperature).sort(descending=True).values
    if s.top_k:
        scores = scores[: s.top_k]
    chance = scores.softmax(0)
    total = chance.cumsum(0)
    if s.top_p < 1 and bool(((total - s.top_p).abs() < 1e-5).any()):
        return True
    return bool((chance / chance[0] / s.min_p - 1).abs().min() < 1e-5) if s.min_p else False


settings_of = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1.0) | st.just(1.0),
    min_p=st.floats(0.001, 1.0) | st.just(0.0),
)


@examples(300)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), scale=st.floats(0.1, 20), s=settings_of)
def test_the_tokens_kept_are_those_that_transformers_keeps(seed: int, size: int, scale: float, s: Sampling) -> None:
    logits = noise_of(seed, (size,), scale)
    assume(not near_an_edge(logits, s))
    want = theirs(logits, s) > -math.inf
    assert ours(logits, s).tolist() == want.tolist()


def test_top_p_of_one_and_no_limits_keep_everything() -> None:
    logits = torch.tensor([60.0, 0.0, -60.0, 20.0])  # the first has probability 1 in float32
    assert ours(logits, Sampling(temperature=1.0)).tolist() == [True] * 4
    assert ours(logits, Sampling(temperature=1.0, top_k=9)).tolist() == [True] * 4


def test_the_likeliest_token_is_always_kept() -> None:
    for s in (
        Sampling(temperature=1, top_p=1e-9),
        Sampling(temperature=1, min_p=1.0),
        Sampling(temperature=9, top_k=1),
    ):
        assert ours(torch.tensor([0.0, 0.5, 0.2]), s).tolist() == [False, True, False]


def test_of_equal_tokens_top_k_keeps_the_first() -> None:
    assert ours(torch.zeros(4), Sampling(temperature=1.0, top_k=2)).tolist() == [True, True, False, False]


# Random123's known answers for philox4x32-10: key, counter, words.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_philox_gives_the_known_answers(key: Any, counter: Any, words: Any) -> None:
    got = philox(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))  # type: ignore[arg-type]
    assert tuple(int(word) for word in got) == words


def test_the_noise_is_philox_of_seed_and_position_and_index() -> None:
    seed, position = 0x299F31D0_A4093822, 77
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), 5)
    for index in range(5):
        word = philox((torch.tensor(0xA4093822), torch.tensor(0x299F31D0)),
                      tuple(map(torch.tensor, (index, position, 0, 0))))[0]  # type: ignore[arg-type]  # fmt: skip
        uniform = ((int(word) >> 9) + 0.5) / 2**23
        assert float(noise[0, index]) == pytest.approx(-math.log(-math.log(uniform)), rel=1e-4)


@pytest.mark.parametrize(("seed", "index"), [(68, 81571), (190, 104535), (213, 92235), (348, 124025)])
def test_the_largest_and_smallest_words_of_philox_are_finite_noise(seed: int, index: int) -> None:
    """Word 2**32 - 1 as 24 bits and a half was 1 in float32, and some token in a hundred had infinite noise."""
    noise = float(gumbel(torch.tensor([seed]), torch.tensor([5]), index + 1)[0, index])
    assert -2.82 < noise < 16.64


def test_the_noise_is_never_infinite_and_is_gumbel() -> None:
    noise = gumbel(torch.arange(64), torch.arange(64), 4096).double()
    assert bool(noise.isfinite().all())
    n = noise.numel()
    assert abs(float(noise.mean()) - 0.5772157) < 5 * math.pi / math.sqrt(6 * n)  # Euler's constant, 5 deviations
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_softmax(vary: str) -> None:
    """Chi-square against the probabilities, over seeds and over positions of one seed."""
    count, logits = 20_000, torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0])
    s = Sampling(temperature=0.8)
    rows = [Sampling(temperature=0.8, seed=i if vary == "seed" else 5) for i in range(count)]
    lengths = [9] * count if vary == "seed" else list(range(count))
    tokens = draw(logits.expand(count, -1), rows, lengths)
    expected = (logits.double() / s.temperature).softmax(0).numpy() * count
    seen = np.bincount(tokens, minlength=len(logits))
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert chi < 24.3  # 7 degrees of freedom: exceeded once in a thousand seeds
    # neighbours are independent: as often equal as their probabilities say
    equal = float(np.mean(np.equal(tokens[:-1], tokens[1:])))
    chance = float(((expected / count) ** 2).sum())
    assert abs(equal - chance) < 4 * math.sqrt(chance * (1 - chance) / count)


def test_draws_stay_inside_what_is_kept() -> None:
    logits = noise_of(3, (16,))
    s = Sampling(temperature=2.0, top_k=5, top_p=0.9)
    inside = set(ours(logits, s).nonzero().flatten().tolist())
    rows = [Sampling(temperature=2.0, top_k=5, top_p=0.9, seed=i) for i in range(500)]
    assert set(draw(logits.expand(500, -1), rows, [1] * 500)) == inside


@examples(60)
@given(data=st.data(), count=st.integers(1, 8), pad=st.integers(0, 4))
def test_a_row_draws_the_same_token_in_any_company(data: st.DataObject, count: int, pad: int) -> None:
    rows = [
        data.draw(st.just(Sampling()) | st.builds(Sampling, temperature=st.floats(0.1, 3), top_k=st.integers(0, 9),
                                                  seed=st.integers(0, 2**63 - 1)))
        for _ in range(count)
    ]  # fmt: skip
    lengths = data.draw(st.lists(st.integers(1, 2**31 - 1), min_size=count, max_size=count))
    logits = noise_of(count, (count, 33))
    alone = [draw(logits[i : i + 1], [rows[i]], [lengths[i]])[0] for i in range(count)]
    order = data.draw(st.permutations(range(count)))
    together = draw(logits[order], [rows[i] for i in order], [lengths[i] for i in order])
    assert together == [alone[i] for i in order]
    padded = sampling_batch(rows, size=count + pad, device="cpu")
    wide = torch.cat([logits, torch.zeros(pad, 33)])
    at = torch.tensor([*lengths, *[0] * pad], dtype=torch.int32)
    assert sample(wide, padded, at, ops=REFERENCE)[:count].tolist() == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 20, 40, slice(None)])
def test_a_row_that_is_not_finite_fails_and_no_other_notices(value: float, where: Any, temperature: float) -> None:
    rows = [Sampling(temperature=temperature, top_p=0.9, min_p=0.01, seed=i) for i in range(3)]
    logits = noise_of(1, (3, 41))
    good = draw(logits, rows, [4, 5, 6])
    assert min(good) >= 0
    for bad in range(3):
        broken = logits.clone()
        broken[bad, where] = value
        want = [-1 if row == bad else token for row, token in enumerate(good)]
        assert draw(broken, rows, [4, 5, 6]) == want


def test_opposite_infinities_fail_the_row() -> None:
    logits = torch.zeros(2, 9)
    logits[0, 2], logits[0, 3] = math.inf, -math.inf
    assert draw(logits, [Sampling()] * 2, [1, 1])[0] == -1


def test_a_thousand_random_settings_draw_a_token_that_is_kept() -> None:
    random = np.random.default_rng(0)
    extreme: dict[str, list[Any]] = {
        "temperature": [0.0, 1e-45, 1e-38, 1e-20, 1e-6, 1e4], "top_k": [0, 1, 2**31 - 1],
        "top_p": [5e-324, 1e-45, 1e-9, 1.0], "min_p": [0.0, 5e-324, 1.0], "seed": [0, 2**32, 2**63 - 1],
    }  # fmt: skip

    def setting() -> Sampling:
        chosen: dict[str, Any] = {
            "temperature": float(random.uniform(0, 3)), "top_k": int(random.integers(0, 60)),
            "top_p": float(random.uniform(1e-3, 1)), "min_p": float(random.uniform(0, 1)),
            "seed": int(random.integers(0, 2**63)),
        }  # fmt: skip
        return Sampling(**{k: extreme[k][random.integers(len(extreme[k]))] if random.random() < 0.3 else v
                           for k, v in chosen.items()})  # fmt: skip

    for turn in range(20):
        rows = [setting() for _ in range(50)]
        logits = noise_of(turn, (50, 48), float(10 ** random.uniform(-3, 4)))
        tokens = draw(logits, rows, random.integers(1, 2**31, 50).tolist())
        for token, row, s in zip(tokens, logits, rows, strict=True):
            assert 0 <= token < 48
            scores = row.double() / max(s.temperature, 1e-300)
            limit = scores.sort(descending=True).values[min(s.top_k or 48, 48) - 1]
            assert scores[token] >= limit, s
            # (a temperature of 1e4 makes equal probabilities of unequal logits)
            if s.temperature <= 1e-20 or s.top_k == 1 or s.top_p <= 1e-9 or (s.min_p == 1.0 and s.temperature < 9):
                assert token == int(row.argmax()), s


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        *(({"temperature": v}, ValueError) for v in (-1, -1e-9, math.nan, math.inf, 1e5)),
        *(({"top_p": v}, ValueError) for v in (0, 0.0, -0.1, 1.0001, math.nan, math.inf)),
        *(({"top_k": v}, ValueError) for v in (-5, -1, 2**31)),
        *(({"min_p": v}, ValueError) for v in (-0.1, 1.1, math.nan)),
        *(({"seed": v}, ValueError) for v in (-1, 2**63)),
        *(({"temperature": v}, TypeError) for v in ("1", None, True, [1.0], 1j)),
        *(({"top_k": v}, TypeError) for v in (1.0, "5", None, False, math.nan)),
        *(({"top_p": v}, TypeError) for v in ("0.5", None, True)),
        *(({"seed": v}, TypeError) for v in (1.5, "0", None, True)),
    ],
)
def test_a_bad_setting_is_refused_by_name(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(bad))):
        Sampling(**bad)


def test_settings_are_keywords_and_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        Sampling(0.5)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Sampling().temperature = 1.0  # type: ignore[misc]
    assert Sampling() == Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def test_settings_of_another_number_of_rows_are_a_shape_error() -> None:
    one, two = (sampling_batch([Sampling()] * n, size=n, device="cpu") for n in (1, 2))
    with pytest.raises(ShapeError):
        type(one)(
            temperature=one.temperature, top_k=two.top_k, top_p=one.top_p, min_p=one.min_p, seed=one.seed,
            greedy=True, has_top_k=False, has_top_p=False,
        )  # fmt: skip


def test_the_same_seed_answers_alike_and_another_one_differently(vision_model: Tiny) -> None:
    prompt = four_prompts(vision_model)[1]
    rows = [Sampling(temperature=1.5, seed=s) for s in (1, 1, 2)]
    a, b, c = mllm.generate(vision_model.ours, [prompt] * 3, max_new_tokens=20, sampling=rows)
    assert a.tokens == b.tokens != c.tokens
    alone = mllm.generate(vision_model.ours, [prompt], max_new_tokens=20, sampling=rows[2])[0]
    assert alone.tokens == c.tokens
