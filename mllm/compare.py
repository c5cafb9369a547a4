"""Comparing two result files of the benchmarks: `mllm compare base.json new.json --fail-above 5%`.

pytest-benchmark's own comparison looks only at cases whose names are in both files: it passes when a case was renamed
or dropped, even when none is left. Here a case that is in one file alone is a failure too. A growth within the spread
of a case's rounds is none: the same code, run twice, differs by that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen


@frozen(kw_only=True)
class Change:
    """One case in both files; medians in seconds.

    spread: the larger interquartile range of the rounds, over its median: what the same code may differ by. Infinite
    for a case of a single round, of which nobody knows.
    """

    name: str
    old: float
    new: float
    spread: float

    @property
    def ratio(self) -> float:
        """1.1 is 10 % slower."""
        return self.new / self.old


@frozen(kw_only=True)
class Comparison:
    """What two files have in common, and what only one of them has."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    hardware: tuple[str, str]
    models: tuple[str, str]

    def slower(self, threshold: float) -> tuple[Change, ...]:
        """The cases whose median grew by more than `threshold` (0.05 is 5 %) and by more than their spread."""
        return tuple(change for change in self.changes if change.ratio > 1 + max(threshold, change.spread))

    def unsure(self, threshold: float) -> tuple[Change, ...]:
        """The cases that look slower, but whose rounds differ by more than that among themselves."""
        return tuple(change for change in self.changes if threshold < change.ratio - 1 <= change.spread)


def read(path: str | Path) -> dict[str, Any]:
    """A result file. Raises `ValueError` for one that pytest-benchmark did not write."""
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise ValueError(f"{path}: not a result file of pytest --benchmark-json")
    machine = data.get("machine_info", {})
    if not isinstance(machine, dict):
        raise ValueError(f"{path}: machine_info is not an object")
    for part in ("gpu", "cpu", "packages"):
        if not isinstance(machine.get(part, {}), dict):
            raise ValueError(f"{path}: machine_info.{part} is not an object")
    seen = set()
    for index, case in enumerate(data["benchmarks"]):
        if not _is_case(case):
            raise ValueError(
                f"{path}: benchmarks[{index}] lacks what pytest-benchmark writes of a case, or its median is 0"
            )
        if (name := _without_folder(case["fullname"])) in seen:
            raise ValueError(f"{path}: benchmarks[{index}] is the second called {name}")
        seen.add(name)
    return data


def _is_case(case: object) -> bool:
    """Whether a case of a file holds what is read here and in `mllm.plot`."""
    if not isinstance(case, dict) or not isinstance(case.get("fullname"), str) or "group" not in case:
        return False
    stats, numbers = case.get("stats"), ("median", "iqr", "rounds")
    if not isinstance(case.get("extra_info"), dict) or not isinstance(stats, dict):
        return False
    return all(isinstance(stats.get(name), int | float) for name in numbers) and stats["median"] > 0


def cases(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cases by file and name, whatever folder pytest was started in: test_vit.py::test_vit[grid=16x16]."""
    return {_without_folder(case["fullname"]): case for case in data["benchmarks"]}


def _without_folder(name: str) -> str:
    file, separator, rest = name.partition("::")
    return file.rpartition("/")[2] + separator + rest  # what is in brackets may be a path


def hardware(data: dict[str, Any]) -> str:
    """What was measured on, as far as it decides whether two figures may be compared."""
    machine = data.get("machine_info", {})
    gpu = machine.get("gpu", {}).get("name")
    return str(gpu or machine.get("cpu", {}).get("brand_raw") or machine.get("machine"))


def models(data: dict[str, Any]) -> str:
    """The models that were measured, with their dtypes."""
    found = {(case["extra_info"].get("model"), case["extra_info"].get("dtype")) for case in data["benchmarks"]}
    return ", ".join(sorted(f"{model} in {dtype}" for model, dtype in found if model))


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Match the cases of two files by name."""
    before, after = cases(old), cases(new)
    changes = []
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name]["stats"], after[name]["stats"]
        spread = max(_spread(before[name]["stats"]), _spread(after[name]["stats"]))
        changes.append(Change(name=name, old=a["median"], new=b["median"], spread=spread))
    return Comparison(
        changes=tuple(changes),
        missing=tuple(sorted(before.keys() - after.keys())),
        added=tuple(sorted(after.keys() - before.keys())),
        hardware=(hardware(old), hardware(new)),
        models=(models(old), models(new)),
    )


def _spread(stats: dict[str, Any]) -> float:
    return stats["iqr"] / stats["median"] if stats["rounds"] > 1 else math.inf


def percent(text: str) -> float:
    """ "5%" or "5" to 0.05."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a percentage like 5%, got {text!r}") from None
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a percentage of 0 or more, got {text!r}")
    return value / 100


def table(found: Comparison, threshold: float) -> str:
    """One line a case: medians in milliseconds, the change, the spread of the rounds, and what is wrong with it."""
    width = max((len(name) for name in (*(c.name for c in found.changes), *found.missing, *found.added)), default=4)
    lines = [f"{'case':{width}}  {'old ms':>10}  {'new ms':>10}  {'change':>8}  {'spread':>7}"]
    words = dict.fromkeys(found.slower(threshold), "  SLOWER")
    words |= dict.fromkeys(found.unsure(threshold), "  unsure")
    for c in found.changes:
        spread = "1 round" if math.isinf(c.spread) else f"{c.spread:7.1%}"
        line = f"{c.name:{width}}  {c.old * 1e3:10.4f}  {c.new * 1e3:10.4f}  {c.ratio - 1:+8.1%}  {spread}"
        lines.append(line + words.get(c, ""))
    lines += [f"{name:{width}}  MISSING from the new file" for name in found.missing]
    lines += [f"{name:{width}}  NEW: not in the old file" for name in found.added]
    return "\n".join(lines)


def problems(found: Comparison, threshold: float, *, allow_new: bool = False) -> list[str]:
    """Why the comparison fails; nothing where it does not."""
    wrong = []
    if found.hardware[0] != found.hardware[1]:
        wrong.append(f"measured on different hardware: {found.hardware[0]} and {found.hardware[1]}")
    if found.models[0] != found.models[1]:
        wrong.append(f"measured with different models: {found.models[0] or 'none'} and {found.models[1] or 'none'}")
    if not found.changes:
        wrong.append("no case is in both files")
    if found.missing:
        wrong.append(f"{_cases(len(found.missing))} missing from the new file: renamed, skipped or not run")
    if found.added and not allow_new:
        wrong.append(f"{_cases(len(found.added))} new (--allow-new accepts that)")
    if slow := found.slower(threshold):
        worst = max(slow, key=lambda change: change.ratio)
        wrong.append(f"{_cases(len(slow))} more than {threshold:.0%} slower, most of all {worst.name}: "
                     f"{worst.ratio - 1:+.1%}")  # fmt: skip
    return wrong


def _cases(count: int) -> str:
    return "1 case is" if count == 1 else f"{count} cases are"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 0: as quick as before; 1: slower, or other cases; 2: unreadable files."""
    parser = argparse.ArgumentParser(prog="mllm compare", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("base", help="result file to compare with")
    parser.add_argument("new", help="result file to judge")
    parser.add_argument("--fail-above", type=percent, default=0.05, metavar="PERCENT",
                        help="growth of a median that is a failure (default: 5%%)")  # fmt: skip
    parser.add_argument("--allow-new", action="store_true", help="cases that only the new file has are no failure")
    args = parser.parse_args(argv)
    try:
        found = compare(read(args.base), read(args.new))
    except ValueError as error:
        print(f"mllm compare: {error}", file=sys.stderr)
        return 2
    print(table(found, args.fail_above))
    wrong = problems(found, args.fail_above, allow_new=args.allow_new)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    if not wrong:
        count = len(found.changes)
        print(f"{count} case{'s' * (count > 1)}, none slower by more than {args.fail_above:.0%} and its spread")
    if unsure := found.unsure(args.fail_above):
        print(f"{_cases(len(unsure))} slower by less than the rounds of one run differ: more rounds would tell")
    return 1 if wrong else 0
