"""The arguments of the `mllm` command. What the commands do is in `mllm/cli.py`.

This file lies beside the package, not in it: importing anything of the package imports PyTorch, which takes a second
or more, and `mllm --help` should not.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = "A pure-functional, staged runtime for multimodal language models."
EPILOG = """\
examples:
  mllm demo                                              draw a picture, ask about it, compare with the truth
  mllm generate --image sign.png "What does the sign say?"
  mllm generate --model ~/models/Qwen3-VL-2B-Instruct --device cuda --image cat.jpg "What is this?"
  mllm bench -k decode --benchmark-json=results.json     the same options as pytest
  mllm plot results.json --into plots                    mllm compare before.json after.json
  mllm env --json
"""
MODEL = (
    "a local Hugging Face folder; the embedded model, signs; or a public model's name (qwen3-vl-2b, ...), which gives "
    "its shapes with random weights. Nothing is downloaded"
)


Commands = Any  # what `add_subparsers` returns, for which argparse has no public name


def version() -> str:
    """The version as `mllm/__init__.py` states it, read without importing it."""
    spec = importlib.util.find_spec("mllm")
    tree = ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return next(str(ast.literal_eval(node.value)) for node in assigned if ast.unparse(node.targets[0]) == "__version__")


class _Version(argparse.Action):
    """argparse's own would need the version before anybody asks for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"mllm {version()}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="mllm", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    top.add_argument("--debug", action="store_true", help="show where an error was raised, not just what it says")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_generate, _demo, _bench, _env):
        add(commands)
    return top


def _generate(commands: Commands) -> None:
    generate = commands.add_parser(
        "generate", help="answer a question, about pictures or not",
        description="Answer a question, about pictures or not. The answer streams to standard output, its speed to "
        "standard error.",
    )  # fmt: skip
    generate.add_argument("question", help="what to ask")
    generate.add_argument("--image", metavar="FILE", action="append", default=[], help="PNG, JPEG or WebP; repeatable")
    _model(generate)
    generate.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="at most (default: 128)")
    sampling = generate.add_argument_group("sampling", "without a temperature, the likeliest token each time")
    sampling.add_argument("--temperature", metavar="X", type=float, default=0.0, help="0 is greedy (default: 0)")
    sampling.add_argument("--top-k", metavar="N", type=int, default=0, help="keep the N likeliest (default: 0, all)")
    sampling.add_argument("--top-p", metavar="X", type=float, default=1.0, help="keep so much probability (default: 1)")
    sampling.add_argument("--min-p", metavar="X", type=float, default=0.0, help="of the likeliest's (default: 0)")
    sampling.add_argument("--seed", metavar="N", type=int, default=0, help="the same draws the same (default: 0)")
    generate.add_argument("--stats", action="store_true", help="print the figures as JSON, not in words")


def _demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo", help="draw a picture, ask about it, print the answer beside the truth",
        description="Draw a picture that no training has seen, save it, ask about it, and print the answer beside the "
        "truth, tokens per second and the time to the first token.",
    )  # fmt: skip
    demo.add_argument("--kind", help="of question: shapes, text, count, place, where, change (default: any)")
    demo.add_argument("--seed", metavar="N", type=int, help="of the picture (default: random, and printed)")
    demo.add_argument("--save", metavar="FILE", default="demo.png", help="where the picture goes (default: demo.png)")
    _model(demo)


def _bench(commands: Commands) -> None:
    """What measures, and what is done with its results; these read their options themselves."""
    bench = commands.add_parser(
        "bench", help="run the benchmarks; takes pytest's options",
        usage="mllm bench [PYTEST OPTION ...]",
        description="Run pytest on the benchmarks of the checkout; every option goes to pytest. `mllm bench -- --help` "
        "lists them, those of the benchmarks under 'mllm'.",
    )  # fmt: skip
    bench.set_defaults(options=[])
    commands.add_parser("plot", add_help=False, help="draw a benchmark's results").set_defaults(options=[])
    commands.add_parser("compare", add_help=False, help="compare two results; fail if slower").set_defaults(options=[])


def _env(commands: Commands) -> None:
    env = commands.add_parser(
        "env", help="report versions, processor, GPU, and how memory would be shared out for a model",
        description="Report versions, processor and GPU, and the memory budget that a model would get on a device now: "
        "how many tokens fit, and the largest prefill batch and picture. Nothing is loaded.",
    )  # fmt: skip
    env.add_argument("--json", action="store_true", help="as JSON")
    _model(env)


def _model(to: argparse.ArgumentParser) -> None:
    to.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    to.add_argument("--model", metavar="MODEL", default="signs", help=f"{MODEL} (default: signs)")
    to.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    to.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 (default: auto, the model's own; on a CPU float32)"
    )
    to.add_argument(
        "--mem-fraction-static", metavar="X", type=float, default=0.85,
        help="share of the available memory for weights and KV pool together (default: 0.85)",
    )  # fmt: skip


FORWARDED = ("bench", "plot", "compare")  # these read their options themselves, each with a --help of its own


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; a command of `FORWARDED` finds its own in `options`."""
    own, options = list(argv), []
    at = next((index for index, word in enumerate(own) if not word.startswith("-")), len(own))
    if own[at : at + 1] and own[at] in FORWARDED and (own[at], own[at + 1 :]) not in BENCH_HELP:
        own, options = own[: at + 1], [word for word in own[at + 1 :] if word != "--"]
    args = parser().parse_args(own)
    if options:
        args.options = options
    return args


BENCH_HELP = (("bench", ["-h"]), ("bench", ["--help"]))  # ours; after `--` it is pytest's


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. 2: what was asked for is wrong; 130: interrupted."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        from mllm import cli

        return cli.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
