"""`mllm compare`: equal code passes within its spread, a slowdown and a renamed case do not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm import compare, plot

SUITE = '''
import itertools, os
import pytest

class Clock:
    """Time passes only in `work`: the rounds differ by up to 4 %, in every run alike, on every machine."""
    now = 0.0
    jitter = itertools.cycle([1.00, 1.03, 1.01, 1.04, 1.02])
    def __call__(self):
        self.now += 1e-9
        return self.now
    def work(self, seconds):
        self.now += seconds * next(self.jitter) * float(os.environ["FACTOR"])

clock = Clock()

@pytest.mark.parametrize("name", os.environ["NAMES"].split(","))
@pytest.mark.benchmark(timer=clock)
def test_work(benchmark, name):
    benchmark.pedantic(clock.work, args=(0.01,), rounds=int(os.environ["ROUNDS"]))
'''


def _results(**medians: float) -> dict[str, Any]:
    """A result file as pytest-benchmark writes it, medians in seconds."""
    cases = [
        {
            "fullname": f"benchmarks/test_decode.py::test_decode[{name}]", "name": f"test_decode[{name}]",
            "group": "decode", "extra_info": {}, "stats": {"median": median, "iqr": median / 50, "rounds": 20},
        }
        for name, median in medians.items()
    ]  # fmt: skip
    return {"benchmarks": cases, "machine_info": {"machine": "x86_64", "cpu": {"brand_raw": "a CPU"}}}


def _compare(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], *options: str) -> int:
    for name, data in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])


def test_equal_results_pass_and_ten_percent_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, slow = _results(a=0.010, b=0.020), _results(a=0.010, b=0.022)
    assert _compare(tmp_path, old, old) == 0
    assert _compare(tmp_path, old, slow, "--fail-above", "5%") == 1
    shown = capsys.readouterr()
    assert "+10.0%" in shown.out
    assert "SLOWER" in shown.out
    assert "test_decode[b]" in shown.err
    assert _compare(tmp_path, old, slow, "--fail-above", "15%") == 0


def test_a_renamed_a_missing_and_a_new_case_are_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = _results(a=0.010, b=0.020)
    assert _compare(tmp_path, old, _results(a=0.010, c=0.020)) == 1
    assert _compare(tmp_path, old, _results(a=0.010)) == 1
    assert "MISSING" in capsys.readouterr().out
    more = _results(a=0.010, b=0.020, c=0.030)
    assert _compare(tmp_path, old, more) == 1
    assert _compare(tmp_path, old, more, "--allow-new") == 0
    assert _compare(tmp_path, old, _results()) == 1
    assert _compare(tmp_path, _results(), _results()) == 1, "nothing in common is no success"


def test_results_of_other_hardware_are_not_compared(tmp_path: Path) -> None:
    old, new = _results(a=0.010), _results(a=0.010)
    new["machine_info"]["gpu"] = {"name": "NVIDIA H200"}
    assert _compare(tmp_path, old, new) == 1


def test_a_case_that_is_named_by_a_path_is_a_case_of_its_own(tmp_path: Path) -> None:
    names = [f"benchmarks/test_peer.py::test_peer_{stage}[bs=1-/models/{stage}/x]" for stage in ("prefill", "decode")]
    old, slow, less = (_results(a=0.010, b=b) for b in (0.020, 0.040, 0.020))
    for data in (old, slow, less):
        for case, name in zip(data["benchmarks"], names, strict=True):
            case["fullname"] = name
    assert _compare(tmp_path, old, old) == 0
    assert _compare(tmp_path, old, slow) == 1
    del less["benchmarks"][0]
    assert _compare(tmp_path, old, less) == 1


def test_results_of_other_models_or_dtypes_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _results(a=0.010), _results(a=0.010)
    for data, dtype in ((old, "float32"), (new, "bfloat16")):
        data["benchmarks"][0]["extra_info"] |= {"model": "signs", "dtype": dtype}
    assert _compare(tmp_path, old, new) == 1
    assert "different models: signs in float32 and signs in bfloat16" in capsys.readouterr().err
    assert _compare(tmp_path, new, new) == 0


def test_the_folder_that_pytest_was_started_in_does_not_matter(tmp_path: Path) -> None:
    old, new = _results(a=0.010), _results(a=0.010)
    new["benchmarks"][0]["fullname"] = "test_decode.py::test_decode[a]"
    assert _compare(tmp_path, old, new) == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": 3}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(content)
    assert compare.main([str(tmp_path / "x.json")] * 2) == 2
    assert "x.json" in capsys.readouterr().err


def test_a_slowdown_below_the_spread_of_the_rounds_is_told_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = _results(a=0.010, b=0.020), _results(a=0.011, b=0.020)
    new["benchmarks"][0]["stats"]["iqr"] = 0.002  # a fifth of the median, where the growth is a tenth
    assert _compare(tmp_path, old, new) == 0
    shown = capsys.readouterr().out
    assert "unsure" in shown
    assert "1 case is slower by less than the rounds of one run differ" in shown
    new["benchmarks"][0]["stats"]["iqr"] = 0.0005
    assert _compare(tmp_path, old, new) == 1


def test_a_single_round_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _results(a=0.010), _results(a=0.011)
    for data in (old, new):
        data["benchmarks"][0]["stats"] |= {"rounds": 1, "iqr": 0.0}
    assert _compare(tmp_path, old, new) == 0
    assert "1 round" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(machine_info=5),
        lambda data: data["machine_info"].update(gpu=None),
        lambda data: data["machine_info"].update(cpu="Xeon"),
        lambda data: data["machine_info"].update(packages=["torch"]),
        lambda data: data["benchmarks"].append({}),
        lambda data: data["benchmarks"].append(data["benchmarks"][0]),
        lambda data: data["benchmarks"].append(1),
        lambda data: data["benchmarks"][0].pop("extra_info"),
        lambda data: data["benchmarks"][0]["stats"].update(median="fast"),
        lambda data: data["benchmarks"][0]["stats"].update(median=0.0),
        lambda data: data["benchmarks"][0]["stats"].update(median=float("nan")),
        lambda data: data["benchmarks"][0]["stats"].pop("iqr"),
    ],
)
def test_a_file_that_no_benchmark_wrote_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object]
) -> None:
    change(broken := _results(a=0.010))
    assert _compare(tmp_path, _results(a=0.010), broken) == 2
    assert plot.main([str(tmp_path / "new.json"), "--into", str(tmp_path)]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert re.match(r"mllm (compare|plot): .*new\.json: (benchmarks\[\d\]|machine_info(\.\w+)?) ", line)


def test_a_file_that_is_no_json_is_an_error_of_one_line(tmp_path: Path) -> None:
    for text in ("", "{", "[" * 100_000):
        (tmp_path / "new.json").write_text(text)
        with pytest.raises(ValueError, match=r"new\.json: not JSON"):
            compare.read(tmp_path / "new.json")


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Results as pytest-benchmark writes them, of a suite with a clock of its own."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "test_suite.py").write_text(SUITE)

    def run(names: str = "a,b", *, factor: float = 1, rounds: int = 20) -> dict[str, Any]:
        environment = {**os.environ, "NAMES": names, "FACTOR": str(factor), "ROUNDS": str(rounds)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json", "out.json"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)  # noqa: S603
        return compare.read(tmp_path / "out.json")

    return run


def test_two_runs_are_equal_and_ten_percent_and_a_renamed_case_are_caught(
    tmp_path: Path, bench: Callable[..., dict[str, Any]]
) -> None:
    once = bench()
    assert _compare(tmp_path, once, bench(rounds=23)) == 0, "the same code"
    assert _compare(tmp_path, once, bench(factor=1.1)) == 1, "10 % slower"
    assert _compare(tmp_path, once, bench("a,c")) == 1, "b is called c"
