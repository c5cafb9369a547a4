"""Decode: one step (decode, sample, advance) of rows behind their prompts, eager and as one captured call.

`output_len` counts all new tokens. The first comes from prefill, so there are `output_len - 1` steps.
"""

from __future__ import annotations

import statistics

import pytest

from benchmarks import clock, figures
from benchmarks.checks import RELATIVE, SLACK
from benchmarks.loop import Loop
from benchmarks.session import Case

WARMUP = 3  # steps before the timed ones, from the same start: kernels compile, the graph is recorded


@pytest.mark.benchmark(group="decode")
def test_decode(case: Case, batch: int, input_len: int, output_len: int, mode: str) -> None:
    session = case.session
    session.fits(batch, input_len, output_len)
    if output_len < 2:
        pytest.skip(f"--output-len {output_len}: the first token comes from prefill, so there is no step")
    model, steps = session.model, output_len - 1
    loop = Loop.make(model, rows=batch, input_len=input_len, output_len=output_len, mode=mode,
                     prompt=session.settings.prompt)  # fmt: skip
    if case.enabled:
        loop.steps(min(WARMUP, steps))
        loop.rewind()
    context = input_len + (steps + 1) / 2  # the mean over the steps, the newest token counted
    work = figures.decode(model.config.text, rows=batch, context=context, itemsize=model.dtype.itemsize)
    case.time(loop.step, loop.arguments, rounds=steps, warmup=0, work=work, device_rounds=0)
    made = len(loop.tokens)
    assert made == (steps if case.enabled else 1)
    for row in {0, batch - 1}:
        slack, error = loop.check(row)
        assert slack <= SLACK[model.dtype], f"row {row} left the likeliest tokens"
        assert error <= RELATIVE[model.dtype], f"row {row} has other keys and values than a prefill of its text"
    if case.seconds is not None:
        _note(case, loop, batch, input_len, output_len, mode)
    s = session.settings
    first = output_len // 2 if s.trace_start is None else s.trace_start
    window = min(s.trace_steps, steps - first)
    if "decode" in s.traced and window <= 0:
        session.remarks.append(f"decode: nothing traced, as --trace-start {first} is beyond the last of {steps} steps")
    elif "decode" in s.traced:
        loop.rewind()
        loop.steps(first)
        name = f"bs={batch}-in={input_len}-out={output_len}-{mode}-steps={first}+{window}"
        case.trace("decode", name, lambda: loop.steps(window))


def _note(case: Case, loop: Loop, batch: int, input_len: int, output_len: int, mode: str) -> None:
    """The row of this point; and the steps once more without a stop between them, which is how `generate` runs."""
    steps, session = output_len - 1, case.session
    samples = case.benchmark.stats.stats.data
    loop.rewind()
    free = clock.wall(lambda: loop.steps(steps), case.device)
    loop.rewind()
    busy = clock.device_time(lambda: loop.steps(steps), case.device, head_start=clock.SPIN_S)
    prefill = session.prefill_s.get((batch, input_len)) or _prefill_seconds(loop, case)
    median, total = statistics.median(samples), prefill + sum(samples)
    case.note(loop_ms=free / steps * 1e3, device_ms=busy / steps * 1e3, captured=mode == "graph")
    case.row(
        batch_size=batch, input_len=input_len, output_len=output_len,
        prefill_latency=prefill, prefill_throughput=batch * input_len / prefill,
        median_decode_latency=median, median_decode_throughput=batch / median,
        total_latency=total, overall_throughput=batch * (input_len + output_len) / total,
        cuda_graph=mode == "graph" and session.settings.on_gpu,
    )  # fmt: skip


def _prefill_seconds(loop: Loop, case: Case) -> float:
    """Seconds of prefill where the prefill case did not run before (-k decode): the better of two."""
    found = [clock.wall(loop.prefill_again, case.device) for _ in range(2)]
    return min(found)
