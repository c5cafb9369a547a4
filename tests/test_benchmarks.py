"""The benchmarks' arithmetic, options, comparison and plots. The cases themselves run in `pytest benchmarks`."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllm import compare, families, plot

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir() or importlib.util.find_spec("pytest_benchmark") is None:
    pytest.skip("the benchmarks come with a checkout and need pytest-benchmark", allow_module_level=True)
sys.path.append(str(ROOT))  # the benchmarks are a folder of the checkout, not part of the package

from benchmarks import figures, points, settings  # noqa: E402

# The keys of SGLang's bench_one_batch results, which scripts written for those read.
SGLANG = {
    "run_name", "batch_size", "input_len", "output_len", "prefill_latency", "prefill_throughput",
    "median_decode_latency", "median_decode_throughput", "total_latency", "overall_throughput", "device", "dtype",
    "cuda_graph",
}  # fmt: skip
H200 = figures.Limit(4.55e12, 790e12)  # read stream and matrix product of that card, bytes/s and flops/s


@pytest.mark.parametrize(
    ("name", "gigabytes", "kv"),
    [("qwen3-vl-2b", 3.44, 114_688), ("qwen3-vl-4b", 8.05, 147_456), ("qwen3-vl-8b", 15.14, 147_456)],
)
def test_bytes_of_the_public_models_are_the_known_ones(name: str, gigabytes: float, kv: int) -> None:
    config = families.preset(name).text
    assert figures.decode(config, rows=1, context=0, itemsize=2).bytes / 1e9 == pytest.approx(gigabytes, abs=0.006)
    assert figures.kv_bytes(config, 2) == kv


@pytest.mark.parametrize(
    ("rows", "context", "milliseconds"),
    [(1, 256, 0.763), (1, 2048, 0.808), (32, 2048, 2.41), (64, 2048, 4.06), (128, 1024, 4.06)],
)
def test_decode_limits_of_the_2b_model_are_the_known_ones(rows: int, context: int, milliseconds: float) -> None:
    work = figures.decode(families.preset("qwen3-vl-2b").text, rows=rows, context=context, itemsize=2)
    assert H200.seconds(work) * 1e3 == pytest.approx(milliseconds, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "rows", "milliseconds"),
    [("qwen3-vl-2b", 1, 7.9), ("qwen3-vl-2b", 8, 63), ("qwen3-vl-4b", 1, 20.4), ("qwen3-vl-8b", 8, 301)],
)
def test_prefill_limits_are_the_known_ones(name: str, rows: int, milliseconds: float) -> None:
    work = figures.prefill(families.preset(name).text, rows=rows, length=2048, itemsize=2)
    assert H200.seconds(work) * 1e3 == pytest.approx(milliseconds, rel=1e-2)


@pytest.mark.parametrize(("patches", "milliseconds"), [(1024, 0.9), (4096, 5.2), (9216, 17)])
def test_vision_limits_are_the_known_ones(patches: int, milliseconds: float) -> None:
    config = families.preset("qwen3-vl-2b").vision
    assert config is not None
    work = figures.vit(config, patches=(patches,), itemsize=2)
    # the known figures leave out the mergers, which are 7 % of a small image
    assert H200.seconds(work) * 1e3 == pytest.approx(milliseconds, rel=0.1)


def test_images_attend_to_themselves_only() -> None:
    config = families.preset("qwen3-vl-2b").vision
    assert config is not None
    one, two = (figures.vit(config, patches=counts, itemsize=2) for counts in ((256,), (256, 256)))
    assert two.flops == 2 * one.flops
    assert two.bytes == one.bytes


def test_rates_are_work_over_time_and_the_share_of_the_limit() -> None:
    found = figures.rates(figures.Work(bytes=2e9, flops=4e12), 0.5, figures.Limit(8e9, 8e13))
    assert found == {
        "bytes": 2e9, "flops": 4e12, "gb_s": 4.0, "tflop_s": 8.0, "limit_ms": 250.0, "limit_share": 0.5,
    }  # fmt: skip


def test_a_point_that_does_not_fit_says_its_arithmetic() -> None:
    room = points.Room(pool_tokens=12288, context=4096)
    room.check(5, 2048, 128)
    with pytest.raises(points.TooLargeError, match=r"8 x \(2048\+128\) = 17408 tokens > 12288 in the pool"):
        room.check(8, 2048, 128)
    with pytest.raises(points.TooLargeError, match=r"4000\+128 = 4128 tokens > 4096 of context"):
        room.check(1, 4000, 128)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("batch", "0"), ("batch", "1,x"), ("batch", "1,1"), ("batch", ""), ("input-len", "-5"), ("output-len", "1.5"),
        ("grid", "16"), ("grid", "16x"), ("grid", "0x4"), ("device", "tpu"), ("dtype", "int8"), ("trace-start", "1,2"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_by_name(option: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"--{option}"):
        settings.read(lambda name: text if name == option else None)


def test_options_have_their_meaning() -> None:
    given = {"batch": "1,8", "grid": "16x32", "max-total-tokens": "4096", "device": "cuda:1", "output-len": "128"}
    found = settings.read(given.get)
    assert found.batch == (1, 8)
    assert found.grid == ((16, 32),)
    assert found.max_total_tokens == 4096
    assert found.on_gpu
    assert str(found.dtype) == "torch.bfloat16"


def _results(**medians: float) -> dict[str, Any]:
    """A result file as pytest-benchmark writes it, medians in seconds."""
    cases = [
        {
            "fullname": f"benchmarks/test_decode.py::test_decode[{name}]", "name": f"test_decode[{name}]",
            "group": "decode", "extra_info": {}, "stats": {"median": median, "iqr": median / 50},
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


def test_the_folder_that_pytest_was_started_in_does_not_matter(tmp_path: Path) -> None:
    old, new = _results(a=0.010), _results(a=0.010)
    new["benchmarks"][0]["fullname"] = "test_decode.py::test_decode[a]"
    assert _compare(tmp_path, old, new) == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": 3}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(content)
    assert compare.main([str(tmp_path / "x.json")] * 2) == 2
    assert "x.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run of the suite; the folder with its files."""
    folder = tmp_path_factory.mktemp("run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-q", "-p", "no:cacheprovider", "--model", "small-vl",
        "--batch", "1,2", "--input-len", "16,96", "--output-len", "4", "--grid", "4x4", "--max-total-tokens", "150",
        "-k", "vit or test_prefill or test_decode or multimodal", "--benchmark-json", str(folder / "out.json"),
        "--result-jsonl", str(folder / "rows.jsonl"), "--trace-dir", str(folder / "traces"), "--trace-stage", "decode",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stdout[-3000:]
    (folder / "log").write_text(done.stdout)
    return folder


def test_every_row_has_the_keys_of_sglang(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    decode = [row for row in rows if "median_decode_latency" in row]
    assert decode
    assert all(row.keys() >= SGLANG for row in decode)
    one = decode[0]
    assert one["prefill_throughput"] == pytest.approx(one["batch_size"] * one["input_len"] / one["prefill_latency"])
    assert one["total_latency"] > one["prefill_latency"] + one["median_decode_latency"]
    keys = set().union(*rows)
    assert keys >= {f"{stage}_{what}" for stage in ("vit_prefill", "multimodal_prefill")
                    for what in ("ms", "tokens", "throughput")}  # fmt: skip


def test_the_json_file_holds_figures_limits_and_the_machine(run: Path) -> None:
    data = json.loads((run / "out.json").read_text())
    names = {case["name"] for case in data["benchmarks"]}
    assert "test_decode[bs=1-in=16-out=4-graph]" in names
    assert "test_vit[grid=4x4]" in names
    for case in data["benchmarks"]:
        assert case["extra_info"].keys() >= {"wall_ms", "device_ms", "bytes", "flops", "gb_s", "tflop_s", "limit_share"}
        assert case["extra_info"]["wall_ms"] == pytest.approx(case["stats"]["median"] * 1e3)
    assert data["limit"]["read_gb_s"] > 0
    assert (data["memory"]["requested_tokens"], data["memory"]["effective_tokens"]) == (150, 144)
    assert data["memory"]["left_bytes"] > data["memory"]["peak_bytes"] > 0
    assert data["machine_info"]["packages"].keys() >= {"torch"}


def test_a_point_beyond_the_pool_is_skipped(run: Path) -> None:
    names = [case["name"] for case in json.loads((run / "out.json").read_text())["benchmarks"]]
    assert "test_decode[bs=2-in=96-out=4-graph]" not in names
    assert "skipped" in (run / "log").read_text()


def test_traces_are_one_file_a_point_named_by_it(run: Path) -> None:
    names = {path.name for path in (run / "traces").iterdir()}
    assert "decode-small-vl-bs=1-in=16-out=4-graph-steps=2+1.trace.json.gz" in names
    assert not any(name.startswith(("vit", "prefill")) for name in names)


def test_plots_are_drawn_from_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plot.main([str(run / "out.json"), "--into", str(tmp_path)]) == 0
    made = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in made] == ["latency.png", "throughput.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_a_run_compares_equal_with_itself_and_not_with_a_slower_one(run: Path, tmp_path: Path) -> None:
    data = json.loads((run / "out.json").read_text())
    slow = copy.deepcopy(data)
    slow["benchmarks"][0]["stats"]["median"] *= 1.1
    assert _compare(tmp_path, data, data) == 0
    assert _compare(tmp_path, data, slow) == 1
