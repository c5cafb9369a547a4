"""mllm against transformers in one run: the same weights, prompts, threads and greedy tokens, taking turns.

The benchmark's own figure is mllm's; `peer_ms` is that of transformers' forward loop, `peer_generate_ms` that of its
`generate`, per token, and the ratios say how many times as fast mllm is. The turns are taken round by round, so a
machine that slows down slows both.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clock, models, peers, points
from benchmarks.checks import RELATIVE, SLACK
from benchmarks.loop import Loop
from benchmarks.session import Case
from mllm import stages
from mllm.batch import pack
from mllm.model import Model

INPUT_LEN = 64
ROUNDS = 2  # times the whole decode is run


@pytest.fixture(scope="session")
def pairs(session: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(mllm's model, transformers' model) by name; one pair at a time is kept, since they may be large."""
    kept: dict[str, tuple[Model, Any]] = {}

    def pair(name: str) -> tuple[Model, Any]:
        if name not in kept:
            kept.clear()
            s = session.settings
            model = models.get(name, device=s.device, dtype=s.dtype)
            kept[name] = model, peers.load(name, model, tmp_path_factory.mktemp(Path(name).name))
        return kept[name]

    return pair


@pytest.mark.benchmark(group="peer-prefill")
def test_peer_prefill(case: Case, pairs: Any, peer: str, batch: int) -> None:
    model, hf = pairs(peer)
    length = _length(case)
    case.session.fits(batch, length)
    other = peers.Peer(hf, _ids(model, batch, length))
    box: dict[str, Any] = {}
    box["pool"], table, rows = points.memory(model, batch, length)
    layouts = [points.lay_out(model, t) for t in other.ids.tolist()]
    tokens = pack(table, [points.chunk(lay, row) for lay, row in zip(layouts, rows, strict=True)], device=model.device)
    theirs: list[float] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        theirs.append(clock.wall(lambda: box.update(expected=other.prefill()), case.device))
        return (box["pool"],), {}

    def call(pool):
        box["pool"], logits = stages.prefill(model.weights, pool, tokens, config=model.config, ops=model.ops)
        return logits

    logits = case.time(call, setup, device_rounds=0)
    assert points.relative(logits, box["expected"]) <= RELATIVE[model.dtype]
    _compare(case, theirs[-case.rounds :], model=peer, batch_size=batch, input_len=length)


@pytest.mark.benchmark(group="peer-decode")
def test_peer_decode(case: Case, pairs: Any, peer: str, batch: int, output_len: int) -> None:
    model, hf = pairs(peer)
    length, steps = _length(case), output_len - 1
    if not steps:
        pytest.skip("--output-len 1: the first token comes from prefill, so there is no step")
    case.session.fits(batch, length, output_len)
    loop = Loop.make(model, rows=batch, input_len=length, output_len=output_len, mode="graph", prompt=None)
    other = peers.Peer(hf, torch.tensor([lay.tokens.tolist() for lay in loop.layouts], device=model.device))
    theirs: list[float] = []
    made: list[list[int]] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(theirs) % steps == 0:  # both from the start
            loop.rewind()
            made.clear()
            other.prefill()
        theirs.append(clock.wall(lambda: made.append(other.step().tolist()), case.device))
        return loop.arguments()

    case.time(loop.step, setup, rounds=ROUNDS * steps, warmup=steps if case.enabled else 0, device_rounds=0)
    ours = [tokens.tolist() for tokens in loop.tokens]
    if model.dtype == torch.float32:
        assert ours == made, "transformers chose other tokens"
    else:  # both round; neither may leave the likeliest tokens
        slack, error = loop.check(0)
        assert slack <= SLACK[model.dtype]
        assert error <= RELATIVE[model.dtype]
    _compare(case, theirs[-case.rounds :], model=peer, batch_size=batch, input_len=length, output_len=output_len)
    if case.seconds is not None:
        long, short = (min(other.generate_seconds(n) for _ in range(2)) for n in (output_len, 1))
        token = (long - short) / steps
        case.note(peer_generate_ms=token * 1e3, times_as_fast_as_generate=token / case.seconds)
        case.session.remarks[-1] += f"; generate {token * 1e3:.3f} ms, {token / case.seconds:.2f} times"


def _length(case: Case) -> int:
    asked = case.session.settings.input_len
    return asked[0] if asked else INPUT_LEN


def _ids(model: Model, rows: int, length: int) -> torch.Tensor:
    return torch.tensor(points.text_tokens(model, rows, length), device=model.device)


def _compare(case: Case, theirs: list[float], **fields: Any) -> None:
    """Note the peer's median and the ratio; and a line for the end of the run."""
    case.note(**fields)
    if case.seconds is None:
        return
    median = statistics.median(theirs)
    case.note(peer_ms=median * 1e3, times_as_fast=median / case.seconds)
    case.session.remarks.append(
        f"{case.benchmark.name}: mllm {case.seconds * 1e3:.3f} ms, transformers {median * 1e3:.3f} ms, "
        f"{median / case.seconds:.2f} times as fast"
    )
