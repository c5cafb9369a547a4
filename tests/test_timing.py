"""The figures of the benchmarks are the time that passed: steps that take a known time, in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from mllm import compare

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir() or importlib.util.find_spec("pytest_benchmark") is None:
    pytest.skip("the benchmarks come with a checkout and need pytest-benchmark", allow_module_level=True)

STEPS = 15  # decode steps that are timed
STEP_MS = 60  # long beside the 4 ms by which a busy machine wakes a process late
SLOWED = """
import atexit, sys, time
import mllm.stages

stage = sys.modules["mllm.stages.decode"]  # its function has the same name
steps, decode, sample = [], stage.decode, stage.sample

def begin(*args, **kwargs):
    steps.append(time.monotonic())
    return decode(*args, **kwargs)

def wait(*args, **kwargs):
    time.sleep(max(0, steps[-1] + {seconds} - time.monotonic()))
    return sample(*args, **kwargs)

stage.decode, stage.sample = begin, wait
atexit.register(lambda: open({counts!r}, "w").write(f"{{time.monotonic() - steps[0]}} {{len(steps)}}"))
"""


@frozen
class Run:
    """A run of the decode case in a process of its own: by a stopwatch from its first step to its end, and by its file."""

    seconds: float
    taken: int  # steps in all, not only those that were timed
    file: Path

    @property
    def case(self) -> dict[str, Any]:
        (case,) = json.loads(self.file.read_text())["benchmarks"]
        return dict(case)


def run(folder: Path, name: str, milliseconds: float) -> Run:
    """Every step takes so long, however busy the machine is: it waits for what the model left of the time."""
    counts, file = folder / f"{name}.count", folder / f"{name}.json"
    (folder / f"{name}.py").write_text(SLOWED.format(seconds=milliseconds / 1e3, counts=str(counts)))
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-q", "-p", "no:cacheprovider", "-p", name, "--model",
        "small-text", "--batch", "1", "--input-len", "16", "--output-len", str(STEPS + 1), "-k",
        "test_decode and graph", "--benchmark-json", str(file),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    seconds, taken = counts.read_text().split()
    return Run(float(seconds), int(taken), file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("timing"), "base", STEP_MS)


def test_wall_time_device_time_and_a_stopwatch_of_the_process_agree(base: Run) -> None:
    figures = base.case["extra_info"]
    assert len(base.case["stats"]["data"]) == STEPS
    for name in ("wall_ms", "loop_ms", "device_ms"):
        assert figures[name] == pytest.approx(STEP_MS, rel=0.1), name
    longer = run(base.file.parent, "longer", 3 * STEP_MS)
    assert longer.taken == base.taken
    grew = longer.case["extra_info"]["wall_ms"] - figures["wall_ms"]
    assert grew == pytest.approx(2 * STEP_MS, rel=0.1)
    assert longer.seconds - base.seconds == pytest.approx(base.taken * grew / 1e3, rel=0.2)


def test_the_same_code_compares_equal_and_a_fifth_more_does_not(base: Run, capsys: pytest.CaptureFixture[str]) -> None:
    again, slower = (run(base.file.parent, name, ms) for name, ms in (("again", STEP_MS), ("slower", 1.2 * STEP_MS)))
    assert compare.main([str(base.file), str(again.file), "--fail-above=10%"]) == 0
    assert compare.main([str(base.file), str(slower.file), "--fail-above=10%"]) == 1
    assert "SLOWER" in capsys.readouterr().out
