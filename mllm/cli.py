"""What the commands do; their arguments are in `mllm_cli.py`. A thin shell around calls of the library."""

from __future__ import annotations

import argparse
import importlib.util
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, frozen
from PIL import Image

import mllm
from mllm import budget, compare, devices, environment, families, images, plot
from mllm.errors import MemoryBudgetError, MissingPackageError, MllmError
from mllm.model import plan
from mllm.signs import pictures

SHOWN = tuple(kind for kind in pictures.KINDS if kind != "chat")
"""Kinds of question that `demo` asks: those about a picture."""


@frozen(kw_only=True)
class Speed:
    """How fast one answer came. Times in seconds, measured here, around the library's stream."""

    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float  # pictures prepared, encoded, prompt run
    decode_time: float  # from the first token to the last

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: the first token is prefill's. None for a single token."""
        return (self.new_tokens - 1) / self.decode_time if self.new_tokens > 1 else None

    def __str__(self) -> str:
        rate = "" if self.tokens_per_second is None else f", then {self.tokens_per_second:.0f} tokens/s"
        return (
            f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new; "
            f"first token after {self.time_to_first_token * 1e3:.0f} ms{rate}"
        )


def run(args: argparse.Namespace) -> int:
    """Run one command; its exit code. What a person can mend is told in one line, without a traceback."""
    try:
        return COMMANDS[args.command](args)
    except (MllmError, ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"mllm {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def generate(args: argparse.Namespace) -> int:
    """Stream the answer to a question; the figures go to standard error."""
    sampling = mllm.Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed
    )
    opened = [images.open_image(file) for file in args.image]
    model = _load(args)
    prompt = _prompt(model, args.question, opened)

    def show(piece: mllm.Piece) -> None:
        print(piece.text if model.tokenizer else f"{piece.token} ", end="", flush=True)

    speed = _answer(model, prompt, show, ledger=not args.stats, max_new_tokens=args.max_new_tokens, sampling=sampling)
    print()
    figures = asdict(speed) | {"tokens_per_second": speed.tokens_per_second, "model": repr(model)}
    figures["memory"] = model.memory.as_dict()
    print(json.dumps(figures) if args.stats else speed, file=sys.stderr)
    return 0


def demo(args: argparse.Namespace) -> int:
    """Draw a picture, ask about it, and print the answer beside the truth."""
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    if seed < 0:
        raise ValueError(f"--seed: expected 0 or more, got {seed}")
    kind = SHOWN[seed % len(SHOWN)] if args.kind is None else args.kind
    if kind not in SHOWN:
        raise ValueError(f"--kind: expected one of {', '.join(SHOWN)}, got {kind!r}")
    item = pictures.held_out(kind, seed)
    for index, image in enumerate(item.images):
        path = Path(args.save)
        path = path if index == 0 else path.with_stem(f"{path.stem}-{index + 1}")
        image.save(path, format="PNG")
        print(f"picture   {path}: {image.width} x {image.height}, kind {kind}, seed {seed}")
    model = _load(args)
    prompt = _prompt(model, item.question, item.images)
    print(f"question  {item.question}", flush=True)
    _answer(model, prompt, lambda piece: None, max_new_tokens=2)  # so that the figures are those of a warm process
    pieces: list[mllm.Piece] = []
    speed = _answer(model, prompt, pieces.append, max_new_tokens=64)
    answer = "".join(piece.text for piece in pieces)
    if model.tokenizer is None:
        answer = f"(random weights, so only token numbers) {' '.join(str(piece.token) for piece in pieces[:8])} ..."
    print(f"answer    {answer}")
    print(f"truth     {item.answer}{'' if model.tokenizer is None else _verdict(answer, item.answer)}")
    print(f"speed     {speed}")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Run pytest on the benchmarks of the checkout, with the caller's options; pytest's exit code."""
    folder = Path(mllm.__file__).resolve().parents[1] / "benchmarks"
    if not folder.is_dir():
        folder = Path("benchmarks").resolve()
    if not any(folder.glob("*.py")):
        raise ValueError("the benchmarks are not in the installed package; run this in a checkout of the repository")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise MissingPackageError("the benchmarks need pytest-benchmark: pip install 'mllm-runtime[bench]'")
    # `--trace` is pytest's own debugger switch, so the suite's option has another name there
    options = ["--trace-dir" + o.removeprefix("--trace") if o.split("=")[0] == "--trace" else o for o in args.options]
    return subprocess.run([sys.executable, "-m", "pytest", str(folder), *options], check=False).returncode  # noqa: S603


def env(args: argparse.Namespace) -> int:
    """Print the environment report, and the memory budget that a model would get here."""
    values = environment.report()
    try:
        found = plan(**_choice(args))
        memory, shown = found.as_dict(), budget.table(found)
    except MemoryBudgetError as error:  # part of the report, which is wanted then more than ever
        memory, shown = {"error": str(error)}, str(error)
    if args.json:
        print(json.dumps(values | {"memory": memory}, indent=2))
    else:
        print(f"{environment.text(values)}\n\nmemory for {args.model} on {args.device}\n{shown}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generate": generate, "demo": demo, "bench": bench, "env": env,
    "plot": lambda args: plot.main(args.options), "compare": lambda args: compare.main(args.options),
}  # fmt: skip


def _choice(args: argparse.Namespace) -> dict[str, Any]:
    """The model that was chosen, as arguments of `mllm.load` or `mllm.dummy`; a path of None is the embedded one.

    `dtype` "auto" is float32 on a CPU: without bfloat16 arithmetic of its own, one is five times as fast in float32.
    """
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if not args.model:
        raise ValueError("--model: expected a folder or a name, got ''")
    devices.choose(args.device)
    dtype = "float32" if args.dtype == "auto" and kind == "cpu" else args.dtype
    return {
        "path": None if args.model == "signs" else args.model, "device": args.device, "dtype": dtype,
        "mem_fraction_static": args.mem_fraction_static,
    }  # fmt: skip


def _load(args: argparse.Namespace) -> mllm.Model:
    """The embedded model, random weights in a public model's shapes, or a folder."""
    choice = _choice(args)
    if args.model in families.PRESETS and not Path(args.model).is_dir():
        print(f"mllm: {args.model} has random weights: its answers mean nothing, its speed does", file=sys.stderr)
        return mllm.dummy(choice.pop("path"), **choice)
    return mllm.load(**choice)


def _prompt(model: mllm.Model, question: str, opened: Sequence[Image.Image]) -> mllm.Prompt:
    """The question as a chat message after its pictures; the question's bytes as ids where there is no tokenizer."""
    if model.tokenizer is None:
        token = model.config.image_token_id
        marks = [] if token is None else [token] * len(opened)
        return mllm.Prompt(tokens=[*marks, *question.encode()], images=opened)
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in opened]
    return mllm.prompt(model, [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])


def _answer(
    model: mllm.Model, prompt: mllm.Prompt, show: Callable[[mllm.Piece], None], *, ledger: bool = False, **settings: Any
) -> Speed:
    """Run one prompt and hand each piece to `show`; `ledger` prints the memory budget before the first.

    Raises `ValueError` if the request fails on its way.
    """
    start = time.perf_counter()
    times = []
    pieces = mllm.stream(model, [prompt], **settings)
    if ledger:
        print(budget.table(model.memory), file=sys.stderr)
    for piece in pieces:
        if piece.error:
            raise ValueError(piece.error)
        times.append(time.perf_counter())
        show(piece)
    return Speed(
        prompt_tokens=_length(model, prompt),
        new_tokens=len(times),
        time_to_first_token=times[0] - start,
        decode_time=times[-1] - times[0],
    )


def _length(model: mllm.Model, prompt: mllm.Prompt) -> int:
    """Tokens of a prompt, image tokens counted."""
    if model.images is None:
        return len(prompt.tokens)
    config = model.images
    return len(prompt.tokens) + sum(images.tokens(images.grid(i.size, config), config) - 1 for i in prompt.images)


def _verdict(answer: str, truth: str) -> str:
    return "   (right)" if answer.strip() == truth else "   (wrong)"
