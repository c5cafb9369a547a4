"""The command: its arguments, its errors, and that what it prints is what the library says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import Tiny

import mllm
import mllm_cli
from mllm import cli, environment, images
from mllm.signs import pictures

ROOT = Path(__file__).parents[1]


def run(*args: str) -> int:
    """The command in this process; its exit code."""
    try:
        return mllm_cli.main(args)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def answers(text: str) -> list[int]:
    """The tokens that a model without a tokenizer answers with."""
    return [int(word) for word in text.split()]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pictures.example("shapes", 3).images[0].save(path)
    return path


# Arguments and help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy_and_are_quick(option: str) -> None:
    code = f"import sys, mllm_cli\ntry: mllm_cli.main(['{option}'])\nfinally: print(*sys.modules, file=sys.stderr)"
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
        taken.append(time.perf_counter() - start)
    assert "mllm" in done.stdout
    assert not set(done.stderr.split()) & {"torch", "numpy", "attrs", "PIL", "mllm"}
    assert min(taken) < 0.3


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"mllm {mllm.__version__}\n"


@pytest.mark.parametrize("command", ["generate", "demo", "bench", "plot", "compare", "env"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert command in capsys.readouterr().out


def test_help_names_the_kinds_of_question_that_demo_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--help") == 0
    assert f"of question: {', '.join(cli.SHOWN)} (default" in " ".join(capsys.readouterr().out.split())


def test_every_command_is_declared_and_defined() -> None:
    assert set(cli.COMMANDS) == {"generate", "demo", "bench", "plot", "compare", "env"}


@pytest.mark.parametrize(
    "args", [[], ["nonsense"], ["generate"], ["env", "--nonsense"], ["generate", "hi", "--top-k", "x"]]
)
def test_wrong_arguments_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == 2
    assert "usage: mllm" in capsys.readouterr().err


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mllm", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mllm {mllm.__version__}\n"


# generate ------------------------------------------------------------------------------------------------------------


def test_generate_prints_what_the_library_answers(
    vision_model: Tiny, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint has no tokenizer, so the question goes in as its bytes and token numbers come out."""
    question = "  " + '!"#'  # ids below the tiny vocabulary
    args = [
        "--model",
        str(vision_model.folder),
        "--image",
        str(picture),
        "--image",
        str(picture),
        "--max-new-tokens",
        "5",
    ]
    assert run("generate", question, *args) == 0
    model = vision_model.ours
    prompt = mllm.Prompt(
        tokens=[*[model.config.image_token_id] * 2, *question.encode()], images=[images.open_image(picture)] * 2
    )
    expected = mllm.generate(model, [prompt], max_new_tokens=5)[0]
    captured = capsys.readouterr()
    assert answers(captured.out) == list(expected.tokens)
    assert f"{expected.prompt_tokens} prompt tokens, 5 new; first token after" in captured.err
    assert "tokens/s" in captured.err
    assert captured.err.startswith("memory        ")  # the budget, in one table
    assert f"tokens of {model.memory.bytes_per_token} bytes, pages of 16" in captured.err


def test_generate_samples_as_the_library_does(text_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 7}
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert run("generate", "!!", "--model", str(text_model.folder), "--max-new-tokens", "12", *options) == 0
    prompt, sampling = mllm.Prompt(tokens=list(b"!!")), mllm.Sampling(**settings)  # type: ignore[arg-type]
    expected = mllm.generate(text_model.ours, [prompt], max_new_tokens=12, sampling=sampling)[0]
    assert answers(capsys.readouterr().out) == list(expected.tokens)


def test_stats_are_json(text_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "!!", "--model", str(text_model.folder), "--max-new-tokens", "3", "--stats") == 0
    figures = json.loads(capsys.readouterr().err)
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (2, 3)
    assert figures["time_to_first_token"] > 0
    assert figures["memory"]["effective_tokens"] > 0
    assert figures["tokens_per_second"] == pytest.approx(2 / figures["decode_time"])


def test_one_token_has_no_rate(text_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "!!", "--model", str(text_model.folder), "--max-new-tokens", "1") == 0
    assert "tokens/s" not in capsys.readouterr().err


BAD = {
    "no such image": (["--image", "absent.png"], "absent.png: No such file"),
    "not an image": (["--image", str(Path(__file__))], "not a readable PNG, JPEG or WEBP file"),
    "no such model": (["--model", "absent"], "absent: not a folder"),
    "no such device": (["--device", "toaster"], "--device toaster"),
    "a device without kernels": (["--device", "mps"], "device 'mps': there are kernels for cpu and cuda"),
    "no such dtype": (["--dtype", "int3"], "dtype: expected"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens: expected 1 or more, got 0"),
    "negative temperature": (["--temperature", "-1"], "temperature: expected"),
    "top_p of zero": (["--top-p", "0"], "top_p: expected"),
    "no fraction": (["--mem-fraction-static", "1.5"], "mem_fraction_static: expected a number between 0 and 1"),
    "a fraction below the weights": (["--mem-fraction-static", "1e-9"], "no room for a KV pool: the weights alone exceed"),
    "not a number": (["--min-p", "nan"], "min_p: expected"),
    "a question beyond the vocabulary": (["--max-new-tokens", "2"], "outside the vocabulary of 96"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_person_can_mend_is_one_line(name: str, text_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    args, expected = BAD[name]
    assert run("generate", "zz" if "question" in name else "!!", "--model", str(text_model.folder), *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("mllm generate: ")
    assert expected in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_pictures_for_a_model_of_text_are_refused(
    text_model: Tiny, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "!!", "--model", str(text_model.folder), "--image", str(picture)) == 2
    assert "reads only text" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--debug", "generate", "hi"], ["generate", "hi", "--debug"]])
def test_debug_lets_the_error_through(args: list[str]) -> None:
    with pytest.raises(mllm.errors.CheckpointError, match="absent"):
        mllm_cli.main([*args, "--model", "absent"])


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "env", interrupted)
    assert run("env") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "env", broken)
    with pytest.raises(ZeroDivisionError):
        mllm_cli.main(["env"])


# demo ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cli.SHOWN)
def test_demo_saves_what_it_asks_about_and_prints_the_truth(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "demo.png"
    assert run("demo", "--seed", "11", "--kind", kind, "--save", str(target)) == 0
    item = pictures.held_out(kind, 11)
    saved = [target, tmp_path / "demo-2.png"][: len(item.images)]
    assert sorted(tmp_path.iterdir()) == sorted(saved)
    for path, image in zip(saved, item.images, strict=True):
        with Image.open(path) as written:
            assert written.tobytes() == image.tobytes()
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["question"] == item.question
    assert lines["truth"].startswith(item.answer)
    assert "first token after" in lines["speed"]
    assert lines["answer"]


def test_demo_without_a_seed_says_which_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--kind", "count", "--save", str(tmp_path / "a.png")) == 0
    seed = capsys.readouterr().out.splitlines()[0].rpartition("seed ")[2]
    assert run("demo", "--kind", "count", "--save", str(tmp_path / "b.png"), "--seed", seed) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "args", [["--kind", "chat"], ["--kind", "poem"], ["--seed", "-1"], ["--save", "absent/demo.png"]]
)
def test_demo_refuses_in_one_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", *args) == 2
    assert capsys.readouterr().err.count("\n") == 1


# bench and env -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "passed"), [
    ([], []), (["-k", "decode", "--benchmark-json=x.json"], ["-k", "decode", "--benchmark-json=x.json"]),
    (["--", "--help"], ["--help"]), (["--debug", "generate"], ["--debug", "generate"]),
])  # fmt: skip
def test_bench_hands_every_option_to_pytest(
    given: list[str], passed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def remember(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "run", remember)
    assert run("bench", *given) == 5
    assert called == [[sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), *passed]]


def test_bench_outside_a_checkout_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mllm, "__file__", str(tmp_path / "mllm" / "__init__.py"))
    assert run("bench") == 2
    assert "run this in a checkout" in capsys.readouterr().err


def test_env_reports_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    memory = values.pop("memory")
    assert (memory["device"], memory["mem_fraction_static"]) == ("cpu", 0.85)
    assert memory["profiled_tokens"] > 0
    assert values == environment.report()
    assert values["torch"] == torch.__version__
    assert values["mllm"] == mllm.__version__
    assert values["python"] == ".".join(map(str, sys.version_info[:3]))
    assert values["cores"] >= 1
    assert values["transformers"] is not None
    assert len(values["gpus"]) == torch.cuda.device_count()


def test_env_as_text_has_a_line_for_each_thing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env") == 0
    report, _, memory = capsys.readouterr().out.partition("\n\n")
    assert [line.split()[0] for line in report.splitlines()] == list(environment.report())
    assert memory.startswith("memory for signs on cpu\n")
    assert "limits        prefill 2048 tokens, decode" in memory


def test_env_reports_a_model_that_does_not_fit_as_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks why has use for the rest of the report as well."""
    args = ("env", "--model", "qwen3-vl-2b", "--mem-fraction-static", "1e-6")
    assert run(*args) == 0
    assert "torch " in (shown := capsys.readouterr().out)
    assert "the weights alone exceed the static share" in shown
    assert run(*args, "--json") == 0
    assert "static share" in json.loads(capsys.readouterr().out)["memory"]["error"]


def test_env_shows_lists_and_what_is_missing() -> None:
    shown = environment.text({"gpus": [{"name": "A", "capability": "9.0"}], "triton": None, "variables": {"X": "1"}})
    assert shown.splitlines() == [
        "gpus          name A, capability 9.0",
        "triton        -",
        "variables     X=1",
    ]
