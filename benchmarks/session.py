"""What the cases of one run share: the model, the measured limit, and the rows and remarks for the end of the run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from PIL import Image

from benchmarks import clock, models, points, trace
from benchmarks.figures import Limit, Work, rates
from benchmarks.settings import Settings
from mllm import budget, devices
from mllm.budget import MemoryProfile
from mllm.model import Model

T = TypeVar("T")
Setup = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
BUDGET_S = 1.0  # of timed rounds in a case
ROW = (
    "run_name", "batch_size", "input_len", "output_len", "prefill_latency", "prefill_throughput",
    "median_decode_latency", "median_decode_throughput", "total_latency", "overall_throughput",
)  # fmt: skip
"""The keys of a row of SGLang's bench_one_batch, in its order; null where a case has no such figure."""
ROUNDS = (5, 50)  # at least and at most, where a case does not fix them


class Session:
    """Made once per run; everything dear is made when a case first asks for it."""

    def __init__(self, settings: Settings) -> None:
        devices.choose(settings.device)
        self.settings = settings
        self.remarks: list[str] = []  # printed after the run
        self.prefill_s: dict[tuple[int, int], float] = {}  # median by (rows, input length), for the rows of decode
        self.rows: list[dict[str, Any]] = []  # of the JSONL file

    @cached_property
    def model(self) -> Model:
        name = self.settings.model or models.EMBEDDED
        s = self.settings
        return models.get(name, device=s.device, dtype=s.dtype, mem_fraction_static=s.mem_fraction_static)

    @cached_property
    def limit(self) -> Limit:
        return clock.measure_limit(self.settings.device, self.settings.dtype)

    @cached_property
    def room(self) -> points.Room:
        return points.room(self.memory)

    @cached_property
    def memory(self) -> MemoryProfile:
        """The budget that the cases run in."""
        return budget.bound(self.model.memory, self.settings.max_total_tokens)

    @property
    def common(self) -> dict[str, Any]:
        """The fields that every row has."""
        return {
            "run_name": self.settings.run_name,
            "model": self.model.name,
            "device": self.settings.device,
            "dtype": str(self.settings.dtype).removeprefix("torch."),
        }

    def fits(self, rows: int, input_len: int, output_len: int = 0) -> None:
        """Skip the case, with the arithmetic, where the KV pool or the context cannot hold the point."""
        try:
            self.room.check(rows, input_len, output_len)
        except points.TooLargeError as error:
            pytest.skip(str(error))

    def or_skip(self, make: Callable[..., T], *args: Any) -> T:
        """What `make` makes of `args`; the case is skipped where that cannot run here."""
        try:
            return make(*args)
        except points.TooLargeError as error:
            pytest.skip(str(error))

    def needs_vision(self) -> None:
        if self.model.images is None:
            pytest.skip(f"{self.model.name} reads no pictures")

    def picture_prompt(self, length: int | None) -> tuple[Image.Image, list[int]]:
        """The picture and the tokens of a prompt about it, `length` in all or as many as they are.

        A length that is too short for the picture fails the case if the picture was asked for, and skips it if not.
        """
        s = self.settings
        picture = points.picture(s.image)
        try:
            return picture, points.picture_tokens(self.model, picture, s.prompt, length)
        except ValueError as error:
            wrong = str(error)
        if s.image is None and s.prompt is None:
            pytest.skip(wrong)
        pytest.fail(wrong, pytrace=False)

    def write_rows(self) -> None:
        if self.settings.result_jsonl is not None and self.rows:
            with self.settings.result_jsonl.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)


class Case:
    """One benchmark: times a call, notes what the time means, traces the same call afterwards."""

    def __init__(self, session: Session, benchmark: Any) -> None:
        self.session, self.benchmark = session, benchmark
        self.device = session.settings.device
        self.enabled = not benchmark.disabled
        self.seconds: float | None = None  # the median of the timed rounds
        self.rounds = 1  # that were timed

    def time(
        self,
        fn: Callable[..., Any],
        setup: Setup | None = None,
        *,
        rounds: int | None = None,
        warmup: int = 1,
        work: Work | None = None,
        device_rounds: int = 5,
    ) -> Any:
        """Time `fn` and return its last result. `setup` makes its arguments, untimed, for every round.

        `device_rounds` more rounds take the device's own time; 0 where the case does that itself.
        Under --benchmark-disable `fn` runs once and no time is noted.
        """
        make = setup or (lambda: ((), {}))
        if self.enabled and rounds is None:
            rounds = self._rounds(fn, make)
        self.rounds = rounds or 1
        fn = clock.synced(fn, self.device)
        out = self.benchmark.pedantic(fn, setup=make, rounds=self.rounds, warmup_rounds=warmup)
        if self.enabled:
            self.seconds = self.benchmark.stats.stats.median
            self.note(wall_ms=self.seconds * 1e3)
            if device_rounds:
                self.note(device_ms=self._device_ms(fn, make, self.seconds, device_rounds))
            if work is not None:
                self.note(**rates(work, self.seconds, self.session.limit))
        self.note(**self.session.common)
        return out

    def _rounds(self, fn: Callable[..., Any], make: Setup) -> int:
        """So many rounds as take about `BUDGET_S`; the trial run is warm-up as well."""
        args, kwargs = make()
        taken = clock.wall(lambda: fn(*args, **kwargs), self.device)
        return max(ROUNDS[0], min(ROUNDS[1], int(BUDGET_S / taken)))

    def _device_ms(self, fn: Callable[..., Any], make: Setup, head_start: float, rounds: int) -> float:
        """The device's own time, in rounds of their own; on a CPU it is the wall time."""
        if not self.session.settings.on_gpu:
            return head_start * 1e3
        found = []
        for _ in range(rounds):
            args, kwargs = make()
            call = partial(fn.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]  # set in clock.py
            found.append(clock.device_time(call, self.device, head_start=head_start))
        return statistics.median(found) * 1e3

    def note(self, **fields: Any) -> None:
        self.benchmark.extra_info.update(fields)

    def row(self, **fields: Any) -> None:
        """Note the fields, and make a row of the JSONL file of everything noted. Every row has every key of `ROW`."""
        self.note(**fields)
        self.session.rows.append({**dict.fromkeys(ROW), **self.benchmark.extra_info})

    def trace(self, stage: str, name: str, call: Callable[[], Any]) -> None:
        """Run `call`, which is warm by now, once more under the profiler, if this stage is to be traced."""
        s = self.session.settings
        if stage not in s.traced:
            return
        if s.profiler == "cuda":
            trace.mark(call, self.device)
            self.session.remarks.append(f"{stage} {name}: marked for nsys")
            return
        path = Path(s.trace_dir or "") / f"{trace.file_name(stage, self.session.model.name, name)}.trace.json.gz"
        table = trace.record(call, path, device=self.device)
        self.session.remarks.append(f"{stage} {name}: {path}\n{table}")
