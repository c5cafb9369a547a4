"""The options of the suite: declared once, read into one frozen record that every case is made from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from attrs import frozen

from mllm.model import DTYPES

T = TypeVar("T")
STAGES = ("all", "prefill", "decode", "vit")
DEVICE_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def numbers(text: str) -> tuple[int, ...]:
    """ "1,8" to (1, 8). Raises `ValueError` for anything but whole numbers of 1 or more, and for repetitions."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected whole numbers of 1 or more like 1,8, got {text!r}")
    return _each_once([int(part) for part in parts], text)


def grids(text: str) -> tuple[tuple[int, int], ...]:
    """ "16x16,64x64" to ((16, 16), (64, 64)), in patches. Raises `ValueError` for anything else, and for repetitions."""
    found = []
    for part in text.split(","):
        sides = part.strip().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(f"expected patch grids like 16x16,64x64, got {text!r}")
        found.append((int(sides[0]), int(sides[1])))
    return _each_once(found, text)


def names(text: str) -> tuple[str, ...]:
    """ "a,b" to ("a", "b"). Raises `ValueError` for repetitions."""
    return _each_once([part.strip() for part in text.split(",") if part.strip()], text)


def _each_once(found: Sequence[T], text: str) -> tuple[T, ...]:
    if len(set(found)) < len(found):
        raise ValueError(f"expected each once, got {text!r}")
    return tuple(found)


@frozen(kw_only=True)
class Option:
    """One command-line option: its default, how its text is read, and what it means."""

    default: str | None
    help: str
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    flag: bool = False


OPTIONS = {
    "model": Option(default=None, help="a folder, a public model's name (random weights), small-text or small-vl"),
    "device": Option(default="cpu", help="cpu, cuda or cuda:N"),
    "dtype": Option(default=None, help="float32, bfloat16 or float16; by device where left out"),
    "batch": Option(default="1,8", read=numbers, help="rows, like 1,8"),
    "input-len": Option(default=None, read=numbers, help="prompt tokens, image tokens counted, like 256,1024"),
    "output-len": Option(default="32", read=numbers, help="new tokens: the first by prefill, the others by decode"),
    "image": Option(default=None, help="a picture for the multimodal cases instead of a drawn one"),
    "prompt": Option(default=None, help="text for the prompts instead of random tokens; needs a tokenizer"),
    "grid": Option(default="8x8,16x16", read=grids, help="patch grids (rows x columns) of the vision cases"),
    "mem-fraction-static": Option(default="0.85", read=float, help="share of the memory for weights and KV pool"),
    "max-total-tokens": Option(default=None, read=numbers, help="tokens of the KV pool; points beyond it are skipped"),
    "examples": Option(default="20", read=numbers, help="held-out questions of each kind; the model card has 500"),
    "peer": Option(default="small-text,small-vl", read=names, help="models compared with transformers; empty: none"),
    "result-jsonl": Option(default=None, help="append one JSON object per point, keyed as SGLang's bench_one_batch"),
    "run-name": Option(default="default", help="run_name of the JSONL rows"),
    "trace-dir": Option(default=None, help="a folder for one *.trace.json.gz per stage (pytest owns --trace)"),
    "trace-stage": Option(default="all", choices=STAGES, help="the stage to trace"),
    "trace-start": Option(default=None, read=numbers, help="first traced decode step; half of the output if left out"),
    "trace-steps": Option(default="8", read=numbers, help="decode steps in a trace"),
    "profiler": Option(default="torch", choices=("torch", "cuda"), help="cuda: write nothing, mark ranges for nsys"),
    "correct": Option(default=None, flag=True, help="only check: prefill whole and in two parts, greedy texts equal"),
}  # fmt: skip


@frozen(kw_only=True)
class Settings:
    """What was asked for. Lengths in tokens, grids in patches; None where the case decides."""

    model: str | None
    device: str
    dtype: torch.dtype
    batch: tuple[int, ...]
    input_len: tuple[int, ...] | None
    output_len: tuple[int, ...]
    image: Path | None
    prompt: str | None
    grid: tuple[tuple[int, int], ...]
    mem_fraction_static: float
    max_total_tokens: int | None
    examples: int
    peer: tuple[str, ...]
    result_jsonl: Path | None
    run_name: str
    trace_dir: Path | None
    trace_stage: str
    trace_start: int | None
    trace_steps: int
    profiler: str
    correct: bool

    @property
    def traced(self) -> tuple[str, ...]:
        """The stages to trace: into a folder, or for nsys, which needs none."""
        if self.trace_dir is None and self.profiler == "torch":
            return ()
        return STAGES[1:] if self.trace_stage == "all" else (self.trace_stage,)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


def add_options(parser: Any) -> None:
    """Declare `OPTIONS`. One that another conftest declared first (tests/ has a --device too) is left to it."""
    group = parser.getgroup("mllm", "mllm")
    for name, option in OPTIONS.items():
        kind: dict[str, Any] = {"action": "store_true"} if option.flag else {"choices": option.choices}
        with contextlib.suppress(ValueError):
            group.addoption(f"--{name}", default=option.default, help=option.help, **kind)


def read(given: Callable[[str], Any]) -> Settings:
    """The settings; `given(name)` is the text of an option, or None. Raises `ValueError` naming the option."""
    values: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        text = given(name)
        text = option.default if text is None else text
        try:
            values[name.replace("-", "_")] = option.read(text) if isinstance(text, str) else text
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from None
    for single in ("max_total_tokens", "examples", "trace_start", "trace_steps"):
        if values[single] is not None:
            values[single] = _one(single, values[single])
    for path in ("image", "result_jsonl", "trace_dir"):
        values[path] = values[path] and Path(values[path])
    if (rows := values["result_jsonl"]) is not None and (rows.is_dir() or not rows.parent.is_dir()):
        raise ValueError(f"--result-jsonl: {rows} is a folder, or in none")
    values["dtype"] = _dtype(values["dtype"], values["device"])
    found = Settings(**values | {"correct": bool(values["correct"])})
    if found.profiler == "cuda" and not found.on_gpu:
        raise ValueError(f"--profiler: cuda marks ranges for nsys and needs a GPU, got --device {found.device}")
    return found


def _one(name: str, found: tuple[int, ...]) -> int:
    if len(found) != 1:
        raise ValueError(f"--{name.replace('_', '-')}: expected one number, got {len(found)}")
    return found[0]


def _dtype(name: str | None, device: str) -> torch.dtype:
    kind = device.partition(":")[0]
    if kind not in DEVICE_DTYPE:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    name = name or DEVICE_DTYPE[kind]
    if name not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
