"""The figures of benchmark_op.py as tables and as a picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from op_candidates import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_TITLES = {"core": "attention core", "module": "whole layer, NCHW in and out"}
"""The sections of which a picture has a panel."""

Row = dict[str, Any]
"""The figures of one candidate in one pass of a case."""


def fit_exponent(points: list[tuple[int, float]]) -> float:
    """The slope of log(time) over log(N), by least squares."""
    x = [math.log(n) for n, _ in points]
    y = [math.log(seconds) for _, seconds in points]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def render_rows(rows: list[Row], case: Case) -> str:
    """The rows of one case as a table."""
    dtype = str(case.dtype).removeprefix("torch.")
    rows = [row for row in rows if row["size"] == case.name and row["dtype"] == dtype]
    if not rows:
        return ""
    columns = ("pass", "candidate", "ms", "speedup", "to_floor", "mb")
    against = "x one thread" if rows[0]["section"] == "threads" else "x textbook"
    heads = ("", "", "ms", against, "x floor", "peak MB")
    shown = [i for i, column in enumerate(columns) if any(row.get(column) is not None for row in rows)]
    table = [[heads[i] for i in shown]]
    for row in rows:
        table.append([_cell(row.get(columns[i])) for i in shown])
    widths = [max(len(line[i]) for line in table) for i in range(len(shown))]
    lines = [
        "  ".join(
            cell.ljust(width) if columns[shown[i]] in ("pass", "candidate") else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return f"\n{rows[0]['section']}: {case.name}, {dtype}\n" + "\n".join(lines)


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def plot(rows: list[Row], growth: list[Row], path: Path) -> None:
    """Bars of the speed-up over the textbook form, and growth with N, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [section for section in PANEL_TITLES if any(row["section"] == section for row in rows)]
    count = len(panels) + bool(growth)
    figure, axes = pyplot.subplots(1, count, figsize=(6.5 * count, 4.5), squeeze=False)
    for axis, section in zip(axes[0], panels, strict=False):
        _draw_speedups(axis, [row for row in rows if row["section"] == section])
        axis.set_title(PANEL_TITLES[section])
    if growth:
        _draw_growth(axes[0][-1], growth)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _draw_speedups(axis: Axes, rows: list[Row]) -> None:
    """One group of bars for each dtype, size and pass; one bar in it for each candidate."""
    groups = list(dict.fromkeys((row["dtype"], row["size"], row["pass"]) for row in rows))
    names = [name for name in dict.fromkeys(row["candidate"] for row in rows) if name != "textbook"]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        found = [row for row in rows if row["candidate"] == name]
        places = [
            groups.index((row["dtype"], row["size"], row["pass"])) + (i + 0.5) * height for row in found
        ]
        axis.barh(places, [row["speedup"] for row in found], height=height, label=name)
    axis.axvline(1.0, color="black", linewidth=0.8)
    labels = [f"{size} {dtype}\n{what}" for dtype, size, what in groups]
    axis.set_yticks([g + 0.4 for g in range(len(groups))], labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("times as fast as the textbook form")
    # Below: bars may fill the panel.
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(names))


def _draw_growth(axis: Axes, growth: list[Row]) -> None:
    for series in growth:
        label = f"{series['dtype']} {series['pass']}: N^{series['exponent']:.2f}"
        axis.loglog(*zip(*((n, 1e3 * s) for n, s in series["points"]), strict=True), marker="o", label=label)
    axis.set_xlabel("number of positions N")
    axis.set_ylabel("ms")
    axis.set_title("growth")
    axis.legend(fontsize=7)
