"""Pictures and tables of a result file of the benchmarks: `mllm plot out.json --into plots`.

latency.png      milliseconds over prompt length: prefill, and a decode step, a line for each number of rows
throughput.png   tokens per second over rows: prefill and decode
roofline.png     flops per second over flops per byte, under the limits that were measured in the same session
results.md       the figures as tables, and the pictures with what they show in words: ready for a README
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from mllm import compare
from mllm.errors import MissingPackageError

Case = dict[str, Any]
Lines = dict[str, list[tuple[float, Any]]]
COLOURS = {"vit": "C0", "prefill": "C1", "multimodal_prefill": "C2", "decode": "C3", "kernels": "C7"}
MARKERS = {"vit": "s", "prefill": "o", "multimodal_prefill": "D", "decode": "^", "kernels": "."}
VERSIONS = ("torch", "triton")
TABLES = (
    ("prefill", "Prefill, by prompt length in tokens", "input_len"),
    ("decode", "One decode step, by prompt length in tokens", "input_len"),
    ("vit", "The vision encoder, by patches of the picture", "patches"),
    ("multimodal_prefill", "Picture and prompt together, by length in tokens", "input_len"),
)

OTHERS = {"test_vit_image": ", a picture"}
"""Functions whose cases may lie at the places of others, and what tells their lines apart."""


@frozen
class Drawing:
    """A matplotlib figure, and in words what it shows."""

    figure: Any
    alt: str


def plot(data: dict[str, Any], into: Path) -> list[Path]:
    """Draw and tabulate what the file has figures for, into the folder `into`. Returns the paths of the files.

    Raises `MissingPackageError` without matplotlib, `ValueError` where there is nothing to draw.
    """
    pyplot = _pyplot()
    cases = read_cases(data)
    title, shown, made = _title(cases, data), "", []
    into.mkdir(parents=True, exist_ok=True)
    for name, draw in (("latency", _latency), ("throughput", _throughput), ("roofline", _roofline)):
        drawing = draw(pyplot, cases, data)
        if drawing is not None:
            alt = f"{title}. {drawing.alt}"
            drawing.figure.suptitle(title)
            drawing.figure.savefig(into / f"{name}.png", dpi=120, metadata={"Description": alt})
            pyplot.close(drawing.figure)
            made.append(into / f"{name}.png")
            shown += f"![{alt}]({name}.png)\n\n"
    if not made:
        raise ValueError("the file has none of the figures that are drawn: prefill, decode, vit, multimodal_prefill")
    made.append(into / "results.md")
    made[-1].write_text(f"{tables(cases, data)}\n{shown}", encoding="utf-8")
    return made


def read_cases(data: dict[str, Any]) -> list[Case]:
    """What the cases of a result file say, the stage of each, and the function that measured it."""
    return [
        {**case["extra_info"], "group": case["group"], "test": name.rpartition("::")[2].partition("[")[0]}
        for name, case in compare.cases(data).items()
    ]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError.of(error, needs="plots need", install="'mllm-runtime[plot]'") from error
    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot

    return pyplot


def _title(cases: list[Case], data: dict[str, Any]) -> str:
    """Model, number format, device."""
    for case in cases:
        if case.get("model"):
            return f"{case['model']}, {case.get('dtype', 'unknown dtype')}, {compare.hardware(data)}"
    return compare.hardware(data)


def _lines(cases: list[Case], group: str, along: str, value: Callable[[Case], Any]) -> Lines:
    """Points (case[along], value), sorted, by the name of the line that joins them."""
    other = "input_len" if along == "batch_size" else "batch_size"
    word = {"batch_size": "rows", "input_len": "tokens"}[other]
    mine = [case for case in cases if case["group"] == group and "wall_ms" in case and along in case]
    lengths = {case.get("output_len") for case in mine}
    found: dict[tuple[int, str], list[tuple[float, Any]]] = defaultdict(list)
    for case in mine:
        mode = "" if "captured" not in case else ", captured" if case["captured"] else ", eager"
        mode += f", {case['output_len']} new" if len(lengths) > 1 else ""
        mode += OTHERS.get(case["test"], "")
        found[case[other], mode].append((case[along], value(case)))
    return {
        f"{count:,} {word[:-1] if count == 1 else word}{mode}": sorted(points)
        for (count, mode), points in sorted(found.items())
    }


# Pictures ------------------------------------------------------------------------------------------------------------


def _panels(pyplot: Any, panels: Sequence[tuple[str, Lines]], x: str, y: str) -> Drawing | None:
    """Log-log panels side by side; none where there is nothing in them. A colour for each size, eager lines dashed."""
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 4.5), squeeze=False, layout="constrained")
    words = []
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        sizes = list(dict.fromkeys(name.partition(", ")[0] for name in lines))
        for name, points in lines.items():
            colour = f"C{sizes.index(name.partition(', ')[0])}"
            style = "--" if "eager" in name else "-"
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linestyle=style, color=colour)
        _dress(axis, title, x, y, lines)
        values = [value for points in lines.values() for _, value in points]
        ends = dict.fromkeys(_short(end(values)) for end in (min, max))
        words.append(f"{title} {' to '.join(ends)} in lines for {', '.join(sizes)}")
    return Drawing(figure, f"{y.capitalize()}, over {x}, on log scales: {'; '.join(words)}.")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _dress(axis: Any, title: str, x: str, y: str, lines: Lines) -> None:
    """Scales, ticks with labels, and the legend beside the panel, where it hides no line."""
    from matplotlib.ticker import LogLocator

    axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.minorticks_off()
    values = [value for points in lines.values() for _, value in points]
    low, high = min(values), max(values)
    if high < 4 * low:  # differences of a few percent should look like it
        middle = (low * high) ** 0.5
        axis.set_ylim(middle / 4, middle * 4)
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))  # a panel within one decade has labels as well
    axis.yaxis.set_minor_formatter("{x:,g}")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _latency(pyplot: Any, cases: list[Case], data: dict[str, Any]) -> Drawing | None:
    panels = [
        (title, _lines(cases, group, "input_len", lambda case: case["wall_ms"]))
        for group, title in (("prefill", "prefill"), ("decode", "one decode step"))
    ]
    return _panels(pyplot, panels, "prompt length, tokens", "latency, ms")


def _throughput(pyplot: Any, cases: list[Case], data: dict[str, Any]) -> Drawing | None:
    panels = [
        (group, _lines(cases, group, "batch_size", lambda case, key=key: float(case[key])))  # type: ignore[misc]
        for group, key in (("prefill", "prefill_throughput"), ("decode", "median_decode_throughput"))
    ]
    return _panels(pyplot, panels, "rows", "tokens per second")


def _roofline(pyplot: Any, cases: list[Case], data: dict[str, Any]) -> Drawing | None:
    """Every case with bytes and flops, under the read stream and the matrix product of the session."""
    limit = data.get("limit")
    points = [case for case in cases if case.get("flops") and case.get("bytes") and "tflop_s" in case]
    if not limit or not points:
        return None
    figure, axis = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    intensity = [case["flops"] / case["bytes"] for case in points]
    ridge = limit["product_tflop_s"] * 1e3 / limit["read_gb_s"]
    roof = [
        (x, min(x * limit["read_gb_s"] / 1e3, limit["product_tflop_s"]))
        for x in (min(intensity) / 2, ridge, max(*intensity, ridge) * 2)
    ]
    axis.plot(*zip(*roof, strict=True), color="black", label=f"limit: {_limit(limit)}")
    words = []
    for group, colour in COLOURS.items():
        for mode, fill in ((", eager", "none"), ("", colour)):
            mine = [
                (x, case["tflop_s"])
                for x, case in zip(intensity, points, strict=True)
                if case["group"] == group and (mode != "") == (case.get("captured") is False)
            ]
            if mine:
                name = f"{group.replace('_', ' ')}{mode}"
                axis.scatter(*zip(*mine, strict=True), edgecolors=colour, facecolors=fill, marker=MARKERS[group],
                             label=name, zorder=3)  # fmt: skip
                words.append(f"{name} reaches {max(y for _, y in mine):.3g} TFLOP/s at most")
    # what only moves a few bytes lies far below every roof, and would flatten the rest
    axis.set_ylim(roof[0][1] / 30, 2 * limit["product_tflop_s"])
    axis.set(xlabel="flops per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return Drawing(figure, f"Roofline, TFLOP/s over flops per byte, limit {_limit(limit)}: {'; '.join(words)}.")


# Tables --------------------------------------------------------------------------------------------------------------


def _limit(limit: dict[str, float]) -> str:
    return f"{limit['read_gb_s']:,.0f} GB/s, {limit['product_tflop_s']:,.3g} TFLOP/s"


def tables(cases: list[Case], data: dict[str, Any]) -> str:
    """The latencies as Markdown: a table for each stage, with what they were measured on above."""
    machine = data.get("machine_info", {})
    facts = [str(data.get("datetime", "undated"))[:10]]
    facts += [f"{name} {version}" for name, version in machine.get("packages", {}).items() if name in VERSIONS]
    if "commit" in machine:
        facts.append(f"commit {machine['commit'][:10]}{' with changes' if machine.get('dirty') else ''}")
    said = [f"{_title(cases, data)}; {', '.join(facts)}. Medians in ms."]
    if limit := data.get("limit"):
        said.append(f"In brackets the share of what the device can do: {_limit(limit)}, measured in the same session.")
    parts = [" ".join(said)]
    for group, title, along in TABLES:
        if lines := _lines(cases, group, along, _cell):
            parts.append(f"{title}:\n\n{_table(lines)}")
    return "\n\n".join(parts) + "\n"


def _cell(case: Case) -> str:
    share = f" ({case['limit_share']:.0%})" if "limit_share" in case else ""
    return f"{case['wall_ms']:,.{1 if case['wall_ms'] >= 100 else 2}f}{share}"


def _table(lines: Lines) -> str:
    """One row a line, one column a place on it."""
    columns = sorted({x for points in lines.values() for x, _ in points})
    rows = [["", *(f"{x:,g}" for x in columns)], ["---", *("---:" for _ in columns)]]
    rows += [[name, *(" / ".join(v for at, v in points if at == x) for x in columns)] for name, points in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Prints the files that it made."""
    parser = argparse.ArgumentParser(prog="mllm plot", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("results", help="file written by pytest benchmarks --benchmark-json")
    parser.add_argument("--into", type=Path, default=Path("plots"), help="folder for the files (default: plots)")
    args = parser.parse_args(argv)
    try:
        made = plot(compare.read(args.results), args.into)
    except (ValueError, MissingPackageError) as error:
        print(f"mllm plot: {error}", file=sys.stderr)
        return 2
    print(*made, sep="\n")
    return 0
