"""The benchmarks' arithmetic and options, and one small run. The cases themselves run in `pytest benchmarks`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mllm
from mllm import compare, families, plot
from mllm.model import Model

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir() or importlib.util.find_spec("pytest_benchmark") is None:
    pytest.skip("the benchmarks come with a checkout and need pytest-benchmark", allow_module_level=True)
sys.path.append(str(ROOT))  # the benchmarks are a folder of the checkout, not part of the package

from benchmarks import figures, points, settings, trace  # noqa: E402

# The keys of SGLang's bench_one_batch results (python/sglang/bench_one_batch.py), which scripts written for those read.
SGLANG = [
    "run_name", "batch_size", "input_len", "output_len", "prefill_latency", "prefill_throughput",
    "median_decode_latency", "median_decode_throughput", "total_latency", "overall_throughput",
]  # fmt: skip
MEASURED = {"wall_ms", "device_ms", "bytes", "flops", "gb_s", "tflop_s", "limit_ms", "limit_share"}
ASKED = {"run_name", "model", "device", "dtype"}
VISION = {f"vit_prefill_{what}" for what in ("ms", "tokens", "throughput")}
# What the cases of a group have to say, in the JSON file and in the rows of the JSONL file.
FIELDS = {
    "vit": MEASURED | ASKED | VISION | {"batch_size", "cuda_graph", "patches"},
    "prefill": MEASURED | ASKED | {*SGLANG, "cuda_graph"} - {"median_decode_latency", "median_decode_throughput"},
    "multimodal_prefill": MEASURED | ASKED | VISION | {f"multimodal_{name[4:]}" for name in VISION}
    | {*SGLANG, "cuda_graph"} - {"median_decode_latency", "median_decode_throughput"},
    "decode": MEASURED | ASKED | {*SGLANG, "cuda_graph", "captured", "loop_ms"},
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
    """Which count all tokens in all of the last layer."""
    config = families.preset(name).text
    work = figures.prefill(config, rows=rows, length=2048, itemsize=2)
    after = config.hidden_size * (config.sizes["A"] + 3 * config.intermediate_size)
    whole = work + figures.Work(0, 2 * after * rows * 2047)
    assert H200.seconds(whole) * 1e3 == pytest.approx(milliseconds, rel=1e-2)
    assert 0.97 < work.flops / whole.flops < 0.985


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
        ("grid", "16"), ("grid", "16x"), ("grid", "0x4"), ("grid", "8x8,8x8"), ("peer", "a,b,a"),
        ("device", "tpu"), ("dtype", "int8"), ("trace-start", "1,2"), ("result-jsonl", "absent/rows.jsonl"),
        ("result-jsonl", "."), ("profiler", "cuda"),  # which needs --device cuda
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


@pytest.fixture(scope="module")
def signs() -> Model:
    return mllm.load(dtype="float32")


@pytest.mark.parametrize("prompt", [None, "What does the sign say?"])
@pytest.mark.parametrize("length", [None, 17, 18, 40, 200])
def test_only_text_fills_a_prompt_with_a_picture(signs: Model, prompt: str | None, length: int | None) -> None:
    picture = points.drawn_picture((128, 128))  # 4 x 4 tokens
    found = points.picture_tokens(signs, picture, prompt, length)
    assert found.count(signs.config.image_token_id) == points.image_tokens(signs, picture) == 16
    own = points.picture_tokens(signs, picture, prompt)
    assert len(found) == length or (length is None and found == own)
    assert points.lay_out(signs, found, picture).counts == (16,)


def test_a_prompt_without_tokens_is_refused(signs: Model) -> None:
    with pytest.raises(ValueError, match="--prompt: '' has no tokens"):
        points.text_tokens(signs, 1, 8, "")


def test_a_prompt_about_a_picture_is_what_the_processor_makes(signs: Model) -> None:
    picture, text = points.drawn_picture(), "What does the sign say?"
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    made = mllm.prompt(signs, [{"role": "user", "content": content}])
    assert points.lay_out(signs, points.picture_tokens(signs, picture, text), picture).tokens.tolist() == (
        points.lay_out(signs, made.tokens, picture).tokens.tolist()
    )


@pytest.mark.parametrize("length", [1, 15, 16])
def test_a_length_without_room_for_the_picture_is_refused(signs: Model, length: int) -> None:
    with pytest.raises(ValueError, match=f"--input-len {length} has no room for 16 image tokens"):
        points.picture_tokens(signs, points.drawn_picture((128, 128)), None, length)


def test_nsys_sees_the_traced_call_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: seen.append(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("idle"))
    trace.mark(lambda: seen.append("call"), "cuda")
    assert seen == ["idle", "start", "call", "idle", "stop"]


def test_stages_are_traced_into_a_folder_or_for_nsys() -> None:
    assert settings.read({}.get).traced == ()
    assert settings.read({"trace-dir": "x", "trace-stage": "vit"}.get).traced == ("vit",)
    assert settings.read({"profiler": "cuda", "device": "cuda"}.get).traced == ("prefill", "decode", "vit")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run of the suite; the folder with its files."""
    folder = tmp_path_factory.mktemp("run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-q", "-p", "no:cacheprovider", "--model", "small-vl",
        "--batch", "1,2", "--input-len", "16,96", "--output-len", "1,4", "--grid", "4x4", "--max-total-tokens", "150",
        "-k", "vit or test_prefill or test_decode or multimodal", "--benchmark-json", str(folder / "out.json"),
        "--result-jsonl", str(folder / "rows.jsonl"), "--trace-dir", str(folder / "traces"), "--trace-stage", "decode",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stdout[-3000:]
    (folder / "log").write_text(done.stdout)
    return folder


def test_every_row_has_the_keys_of_sglang(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert all(list(row)[: len(SGLANG)] == SGLANG for row in rows)
    decode = [row for row in rows if row["median_decode_latency"] is not None]
    assert all(row[key] is not None for row in decode for key in SGLANG)
    assert all(row.keys() >= FIELDS["decode"] for row in decode)
    one = decode[0]
    assert one["prefill_throughput"] == pytest.approx(one["batch_size"] * one["input_len"] / one["prefill_latency"])
    assert one["median_decode_throughput"] == pytest.approx(one["batch_size"] / one["median_decode_latency"])
    assert one["total_latency"] > one["prefill_latency"] + one["median_decode_latency"]
    whole = one["batch_size"] * (one["input_len"] + one["output_len"])
    assert one["overall_throughput"] == pytest.approx(whole / one["total_latency"])


def test_the_json_file_holds_figures_limits_and_the_machine(run: Path) -> None:
    data = json.loads((run / "out.json").read_text())
    names = {case["name"] for case in data["benchmarks"]}
    assert "test_decode[bs=1-in=16-out=4-graph]" in names
    assert "test_vit[grid=4x4-eager]" in names
    assert {case["group"] for case in data["benchmarks"]} == FIELDS.keys()
    for case in data["benchmarks"]:
        assert case["extra_info"].keys() >= FIELDS[case["group"]]
        assert case["extra_info"]["wall_ms"] == pytest.approx(case["stats"]["median"] * 1e3)
    assert data["limit"]["read_gb_s"] > 0
    assert (data["memory"]["requested_tokens"], data["memory"]["effective_tokens"]) == (150, 144)
    assert data["memory"]["left_bytes"] > data["memory"]["peak_bytes"] > 0
    assert data["machine_info"]["packages"].keys() >= {"torch"}


def test_where_one_new_token_is_asked_for_prefill_makes_the_row(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    alone = [row for row in rows if row["output_len"] == 1 and "multimodal_prefill_ms" not in row]
    assert [(row["batch_size"], row["input_len"]) for row in alone] == [(1, 16), (1, 96), (2, 16)]
    assert all(row["total_latency"] == row["prefill_latency"] for row in alone)


def test_a_point_beyond_the_pool_is_skipped(run: Path) -> None:
    names = [case["name"] for case in json.loads((run / "out.json").read_text())["benchmarks"]]
    assert "test_decode[bs=2-in=96-out=4-graph]" not in names
    assert "skipped" in (run / "log").read_text()


def test_traces_are_one_file_a_point_named_by_it(run: Path) -> None:
    names = {path.name for path in (run / "traces").iterdir()}
    assert "decode-small-vl-bs=1-in=16-out=4-graph-steps=2+1.trace.json.gz" in names
    assert not any(name.startswith(("vit", "prefill")) for name in names)


def test_a_run_is_drawn_described_and_tabulated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plot.main([str(run / "out.json"), "--into", str(tmp_path)]) == 0
    *drawn, text = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in drawn] == ["latency.png", "throughput.png", "roofline.png"]
    shown = text.read_text()
    for path in drawn:
        with Image.open(path) as image:
            assert f"![{image.info['Description']}]({path.name})" in shown
    assert "lines for 1 row, 2 rows" in shown
    data = json.loads((run / "out.json").read_text())
    one = next(case for case in data["benchmarks"] if case["name"] == "test_prefill[bs=1-in=96-eager]")
    assert f" {one['extra_info']['wall_ms']:.2f} (" in shown
    assert "| 2 rows, eager |" in shown


def test_the_tables_on_the_front_page_are_those_of_the_committed_results() -> None:
    (file,) = (ROOT / "benchmarks" / "results").glob("*.json")
    data = compare.read(file)
    made = plot.tables(plot.read_cases(data), data)
    page = (ROOT / "README.md").read_text("utf-8")
    assert f"benchmarks/results/{file.name}" in page
    shown = [line for line in page.splitlines() if re.search(r"\d \(\d+%\)", line)]
    assert len(shown) > 10
    assert [line for line in shown if line not in made] == []


def test_a_point_that_fits_no_pool_is_skipped_beside_a_peer_too() -> None:
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-q", "-p", "no:cacheprovider", "-k", "peer", "-rs",
        "--peer", "small-text", "--batch", "100000", "--input-len", "4096", "--benchmark-disable",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 skipped" in done.stdout
    assert "100000 x (4096+0) = 409600000 tokens > " in done.stdout


@pytest.mark.parametrize("folders", [("tests/test_table.py", "benchmarks"), ("benchmarks", "tests/test_table.py")])
def test_tests_and_benchmarks_run_together(folders: tuple[str, ...]) -> None:
    """Both have an option --device. An empty value makes pytest load both, too."""
    for more in ((), ("--peer", "")):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--device", "cpu", *folders, *more]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)  # noqa: S603
        assert found.returncode == 0, found.stdout[-500:] + found.stderr[-500:]
        assert "test_table.py" in found.stdout
        assert "benchmarks/test_decode.py" in found.stdout
