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

STEPS = 30  # decode steps that are timed
SLEEPING = """
import atexit, sys, time
import mllm.stages

decode = sys.modules["mllm.stages.decode"]  # its function has the same name
calls, sample = [], decode.sample

def slowed(*args, **kwargs):
    calls.append(time.sleep({seconds}))
    return sample(*args, **kwargs)

decode.sample = slowed
start = time.monotonic()  # what was imported until here takes as long as the machine is busy
atexit.register(lambda: open({counts!r}, "w").write(f"{{time.monotonic() - start}} {{len(calls)}}"))
"""


@frozen
class Run:
    """A run of the decode case in a process of its own: by a stopwatch until it ends, and by its file."""

    seconds: float
    slept: int  # steps in all, not only those that were timed
    file: Path

    @property
    def case(self) -> dict[str, Any]:
        (case,) = json.loads(self.file.read_text())["benchmarks"]
        return dict(case)


def run(folder: Path, name: str, milliseconds: float) -> Run:
    """Every step sleeps for so long before it takes its token."""
    counts, file = folder / f"{name}.count", folder / f"{name}.json"
    (folder / f"{name}.py").write_text(SLEEPING.format(seconds=milliseconds / 1e3, counts=str(counts)))
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-q", "-p", "no:cacheprovider", "-p", name, "--model",
        "small-text", "--batch", "1", "--input-len", "16", "--output-len", str(STEPS + 1), "-k",
        "test_decode and graph", "--benchmark-json", str(file),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    seconds, slept = counts.read_text().split()
    return Run(float(seconds), int(slept), file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("timing"), "base", 20)


def test_wall_time_device_time_and_a_stopwatch_of_the_process_agree(base: Run) -> None:
    figures = base.case["extra_info"]
    assert len(base.case["stats"]["data"]) == STEPS
    for name in ("wall_ms", "loop_ms", "device_ms"):
        assert 20 <= figures[name] < 35, name
    longer = run(base.file.parent, "longer", 60)
    assert longer.slept == base.slept
    grew = longer.case["extra_info"]["wall_ms"] - figures["wall_ms"]
    assert grew == pytest.approx(40, rel=0.1)
    assert longer.seconds - base.seconds == pytest.approx(base.slept * grew / 1e3, rel=0.3)


def test_the_same_code_compares_equal_and_a_tenth_more_does_not(base: Run, capsys: pytest.CaptureFixture[str]) -> None:
    again, slower = (run(base.file.parent, name, ms) for name, ms in (("again", 20), ("slower", 22.5)))
    assert compare.main([str(base.file), str(again.file)]) == 0
    assert compare.main([str(base.file), str(slower.file)]) == 1
    assert "SLOWER" in capsys.readouterr().out
