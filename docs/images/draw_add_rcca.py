#!/usr/bin/env python3
"""Draw docs/images/add-rcca.svg: where add_rcca puts RCCA in a Detectron2 detector. Needs matplotlib."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

GREY, BLUE, RED = "#e9ecef", "#d0e1f9", "#f7b6a6"
EDGE = "#495057"


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, **text_options
) -> None:
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=EDGE
    )
    axes.add_patch(patch)
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **text_options)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": EDGE, "shrinkA": 0, "shrinkB": 0})


def draw(path: Path) -> None:
    plt.rcParams.update(
        {"font.size": 9, "svg.hashsalt": "add-rcca", "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    )
    figure, axes = plt.subplots(figsize=(9.6, 3.1))
    axes.set(xlim=(0, 12.8), ylim=(0, 4.1))
    axes.axis("off")

    row = [("image", 0.1), ("stem", 1.5), ("res2", 2.9), ("res3", 4.3), ("res4", 5.7), ("res5", 7.1)]
    row += [("FPN", 8.5), ("RPN, box and\nmask heads", 9.9)]
    for name, x in row:
        width = 1.9 if name.startswith("RPN") else 1.1
        plain = name in ("image", "FPN") or name.startswith("RPN")
        box(axes, x, 2.9, width, 0.9, name, GREY if plain else BLUE)
        if x > 0.1:
            arrow(axes, (x - 0.3, 3.35), (x, 3.35))

    box(axes, 0.1, 0.35, 12.2, 1.75, "", "white")
    axes.plot([5.7, 0.2], [2.9, 2.1], color=EDGE, linewidth=0.8, linestyle=":")
    axes.plot([6.8, 12.2], [2.9, 2.1], color=EDGE, linewidth=0.8, linestyle=":")
    axes.text(0.3, 1.87, "res4 of ResNet-50", color=EDGE, va="center")
    x = 0.6
    for name in ("res4.0", "res4.1", "res4.2", "res4.3", "res4.4", "RCCA", "res4.5"):
        width = 1.9 if name == "RCCA" else 1.2
        text = "RCCA (R=2)\nres4.5.rcca" if name == "RCCA" else name
        box(
            axes,
            x,
            0.65,
            width,
            0.9,
            text,
            RED if name == "RCCA" else BLUE,
            weight="bold" if name == "RCCA" else None,
        )
        if name != "res4.0":
            arrow(axes, (x - 0.4, 1.1), (x, 1.1))
        x += width + 0.4
    arrow(axes, (x - 0.4, 1.1), (x, 1.1))
    arrow(axes, (0.2, 1.1), (0.6, 1.1))
    axes.text(
        6.2,
        0.1,
        "x + gamma · attention(x), twice; gamma starts at 0, so the detector starts as it was",
        ha="center",
        va="center",
        color=EDGE,
    )
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("add-rcca.svg"))
