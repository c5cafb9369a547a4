"""Pictures of a result file of the benchmarks: `mllm plot out.json --into plots`.

latency.png      milliseconds over prompt length: prefill, and a decode step, a line for each number of rows
throughput.png   tokens per second over rows: prefill and decode
roofline.png     flops per second over flops per byte, under the limits that were measured in the same session
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mllm import compare
from mllm.errors import MissingPackageError

Case = dict[str, Any]
Points = list[tuple[float, float]]
COLOURS = {"vit": "C0", "prefill": "C1", "multimodal_prefill": "C2", "decode": "C3", "kernels": "C7"}
MARKERS = {"vit": "s", "prefill": "o", "multimodal_prefill": "D", "decode": "^", "kernels": "."}


def plot(data: dict[str, Any], into: Path) -> list[Path]:
    """Draw what the file has figures for, as PNG files in `into`. Returns their paths.

    Raises `MissingPackageError` without matplotlib, `ValueError` where there is nothing to draw.
    """
    pyplot = _pyplot()
    cases = [{**case["extra_info"], "group": case["group"]} for case in data["benchmarks"]]
    made = []
    into.mkdir(parents=True, exist_ok=True)
    for name, draw in (("latency", _latency), ("throughput", _throughput), ("roofline", _roofline)):
        figure = draw(pyplot, cases, data)
        if figure is not None:
            figure.suptitle(_title(cases, data))
            figure.savefig(into / f"{name}.png", dpi=120)
            pyplot.close(figure)
            made.append(into / f"{name}.png")
    if not made:
        raise ValueError("the file has no figures to draw; were the benchmarks run with --benchmark-json?")
    return made


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError("plots need matplotlib: pip install 'mllm-runtime[plot]'") from None
    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot

    return pyplot


def _title(cases: list[Case], data: dict[str, Any]) -> str:
    """Model, number format, device."""
    for case in cases:
        if case.get("model"):
            return f"{case['model']}, {case['dtype']}, {compare.hardware(data)}"
    return compare.hardware(data)


def _lines(cases: list[Case], group: str, along: str, value: Callable[[Case], float]) -> dict[str, Points]:
    """Points (case[along], value), sorted, by the name of the line that joins them."""
    other = "batch_size" if along == "input_len" else "input_len"
    word = {"batch_size": "rows", "input_len": "tokens"}[other]
    found: dict[tuple[int, str], Points] = defaultdict(list)
    for case in cases:
        if case["group"] == group and "wall_ms" in case and along in case:
            mode = "" if "captured" not in case else ", captured" if case["captured"] else ", eager"
            found[case[other], mode].append((case[along], value(case)))
    return {
        f"{count} {word[:-1] if count == 1 else word}{mode}": sorted(points)
        for (count, mode), points in sorted(found.items())
    }


def _panels(pyplot: Any, panels: Sequence[tuple[str, dict[str, Points]]], x: str, y: str) -> Any:
    """Log-log panels side by side; none where there is nothing in them."""
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return None
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linestyle="--" if "eager" in name else "-")
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(_between())
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def _between() -> Any:
    """Ticks at 2 and 5 between the powers of ten: a panel that spans less than a decade has labels as well."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(2.0, 5.0))


def _latency(pyplot: Any, cases: list[Case], data: dict[str, Any]) -> Any:
    panels = [
        (title, _lines(cases, group, "input_len", lambda case: case["wall_ms"]))
        for group, title in (("prefill", "prefill"), ("decode", "one decode step"))
    ]
    return _panels(pyplot, panels, "prompt length, tokens", "latency, ms")


def _throughput(pyplot: Any, cases: list[Case], data: dict[str, Any]) -> Any:
    def prefill(case: Case) -> float:
        return float(case["prefill_throughput"])

    def decode(case: Case) -> float:
        return float(case["median_decode_throughput"])

    panels = [
        ("prefill", _lines(cases, "prefill", "batch_size", prefill)),
        ("decode", _lines(cases, "decode", "batch_size", decode)),
    ]
    return _panels(pyplot, panels, "rows", "tokens per second")


def _roofline(pyplot: Any, cases: list[Case], data: dict[str, Any]) -> Any:
    """Every case with bytes and flops, under the read stream and the matrix product of the session."""
    limit = data.get("limit")
    points = [case for case in cases if case.get("flops") and case.get("bytes") and "tflop_s" in case]
    if not limit or not points:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    intensity = [case["flops"] / case["bytes"] for case in points]
    low, high = min(intensity) / 2, max(*intensity, limit["product_tflop_s"] * 1e3 / limit["read_gb_s"]) * 2
    ridge = limit["product_tflop_s"] * 1e3 / limit["read_gb_s"]
    roof = [(x, min(x * limit["read_gb_s"] / 1e3, limit["product_tflop_s"])) for x in (low, ridge, high)]
    label = f"limit: {limit['read_gb_s']:,.0f} GB/s, {limit['product_tflop_s']:,.3g} TFLOP/s"
    axis.plot(*zip(*roof, strict=True), color="black", label=label)
    for group in COLOURS:
        mine = [(x, case["tflop_s"]) for x, case in zip(intensity, points, strict=True) if case["group"] == group]
        if mine:
            axis.scatter(*zip(*mine, strict=True), color=COLOURS[group], marker=MARKERS[group], label=group, zorder=3)
    # what only moves a few bytes lies far below every roof, and would flatten the rest
    axis.set_ylim(roof[0][1] / 30, 2 * limit["product_tflop_s"])
    axis.set(xlabel="flops per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Prints the files that it made."""
    parser = argparse.ArgumentParser(prog="mllm plot", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("results", help="file written by pytest benchmarks --benchmark-json")
    parser.add_argument("--into", type=Path, default=Path("plots"), help="folder for the pictures (default: plots)")
    args = parser.parse_args(argv)
    try:
        made = plot(compare.read(args.results), args.into)
    except (ValueError, MissingPackageError) as error:
        print(f"mllm plot: {error}", file=sys.stderr)
        return 2
    print(*made, sep="\n")
    return 0
