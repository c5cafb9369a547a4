"""What one captured decode step costs the host: batch, donation and bookkeeping, with nothing to compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch

from benchmarks import points
from benchmarks.session import Case
from mllm import stages, state
from mllm.kernels.ops import Ops
from mllm.model import Model
from mllm.transform import Recorder, capture

STEPS = 200


def idle_ops(model: Model, rows: int) -> Ops:
    """The model's table with ops that return tensors made beforehand."""
    s, device = model.config.text.sizes, model.device
    wide = {name: torch.zeros(rows, s[name], device=device) for name in "CAEFV"}
    tokens = torch.ones(rows, dtype=torch.int32, device=device)
    made = {"embed": "E", "attend_": "A", "linear_add": "E", "head": "V"}
    ops = {name: (lambda *_, out=wide[size], **__: out) for name, size in made.items()}
    norms = {"norm_linear": "C", "norm_gate": "F"}  # which hand the residual stream back as well
    ops |= {name: (lambda *_, out=(wide["E"], wide[size]), **__: out) for name, size in norms.items()}
    return attrs.evolve(
        model.ops, **ops, plan=lambda *_, **__: None, sample=lambda *_: tokens, advance_=lambda *_, **__: None
    )


def replay_nothing(run):
    """A recorder like that of CUDA graphs, whose replay is one call that the device works on; here on nothing."""
    out = run()
    kept = state.alias(out)  # `out` is the caller's, who will donate it
    return out, lambda: kept


@pytest.mark.parametrize("replay", ["graph", "eager"])
@pytest.mark.benchmark(group="host")
def test_host(case: Case, batch: int, replay: str) -> None:
    """`graph`: as with CUDA graphs, the stages' Python runs at the recording only. `eager`: it runs every step."""
    model = case.session.model
    case.session.fits(batch, 64, STEPS * 4)
    pool, table, rows = points.memory(model, batch, 64 + STEPS * 4)
    table = stages.commit(table, rows, [64] * batch)
    start = points.carry(model, table, rows, [0] * batch, [0] * batch, 64 + STEPS * 4)
    recorder: Recorder | None = replay_nothing if replay == "graph" else None
    step = capture(
        partial(stages.step, model.weights, config=model.config, ops=idle_ops(model, batch)),
        donate=("pool",), carry=("batch",), recorder=recorder,
    )  # fmt: skip
    sampling = points.greedy(model, batch)
    pool, ready, _ = step(pool, start, sampling)
    box: dict[str, Any] = {"state": (pool, ready, table), "committed": 0}

    def call() -> list[int]:
        """What the loop does between two replays."""
        pool, ready, table = box["state"]
        pool, ready, tokens = step(pool, ready, sampling)
        table = stages.commit(table, rows, [1] * batch)
        box["state"] = pool, ready, table
        box["committed"] += 1
        return tokens.tolist()

    out = case.time(call, rounds=STEPS, warmup=20, device_rounds=0)
    table = box["state"][2]
    assert out == [1] * batch
    assert table.length.tolist() == [64 + box["committed"]] * batch
    if case.seconds is not None:
        case.note(batch_size=batch, host_us=case.seconds * 1e6)
