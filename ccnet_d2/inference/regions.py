"""RANet's regions and representative pixels over the image (RANet, Fig. 5)."""

from __future__ import annotations

import colorsys
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ccnet_d2.data.image_files import read_image
from ccnet_d2.errors import UserError
from ccnet_d2.layers import RegionConstruction

from .attention import record_input, record_output
from .drawing import outlines_of, panel_grid, readable, resize_labels, resize_rgb, stack, text_line
from .images import as_rgb
from .visualize import heat_colors

if TYPE_CHECKING:
    from .predictor import Predictor

__all__ = ["RegionMap", "draw_regions", "find_regions"]

_DOT = (40, 255, 60)
# Neighbouring numbers get hues far apart.
_GOLDEN = 0.618034


@dataclass(frozen=True)
class RegionMap:
    """What RANet makes of an image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        region: (h, w) int64 on the grid of pairs, 0 to Q - 1.
        score: (h, w) float32, J, how well each cell represents its region.
        representatives: (row, column) of the cells that represent their regions.
        count: K, of which smaller regions have as many as they have cells.
        extent: (rows, columns), possibly fractional, of the grid that the image covers; the rest is padding.
    """

    image: np.ndarray
    region: np.ndarray
    score: np.ndarray
    representatives: list[tuple[int, int]]
    count: int
    extent: tuple[float, float]


def find_regions(predictor: Predictor, image: str | os.PathLike[str] | np.ndarray | Any) -> RegionMap:
    """Run one image, as a whole, and see what regions it was divided into.

    Args:
        predictor: of a model with one `RegionConstruction`, such as RANet's.
        image: see `Predictor.__call__`.

    Raises:
        UserError: the model makes no regions.
        ValueError: see `Predictor.__call__`.
    """
    model = predictor.model
    blocks = [module for module in model.modules() if isinstance(module, RegionConstruction)]
    if len(blocks) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(blocks)} region construction blocks, where one is wanted: regions can "
            "be drawn for runs of RANet with context=region."
        )
    rgb = read_image(os.fspath(image)) if isinstance(image, str | os.PathLike) else as_rgb(image)
    inputs = predictor._inputs(rgb)
    with torch.no_grad(), record_output(blocks[0]) as seen, record_input(model.backbone) as padded:
        # Not through torch.compile, if the model is: a graph does not call the hooks.
        model.forward([inputs])
    if not seen:
        raise UserError("the model did not make regions: its head's `output` is 'coarse'; take output=fine.")
    regions = seen[0][0]  # of the one image
    size = regions.size
    given, full = inputs["image"].shape[-2:], padded[0].shape[-2:]
    cells = regions.representatives.tolist()
    return RegionMap(
        rgb,
        regions.region.reshape(size).cpu().numpy(),
        regions.score.reshape(size).float().cpu().numpy(),
        [divmod(cell, size[1]) for cell in cells],
        blocks[0].representatives,
        (size[0] * given[0] / full[0], size[1] * given[1] / full[1]),
    )


def draw_regions(found: RegionMap) -> np.ndarray:
    """The image with the outlines of its regions and their representatives, the regions, and the scores J.

    Representatives are green dots; they are left out where a region has no more cells than K, all of which would be
    dots. Regions of a single cell are grey.

    Returns:
        (height, width, 3) uint8.
    """
    factor = max(readable(found.image.shape), -(-480 // max(found.image.shape[:2])))
    height, width = found.image.shape[0] * factor, found.image.shape[1] * factor
    image = resize_rgb(found.image, height, width)
    rows, columns = (max(round(length), 1) for length in found.extent)
    region = found.region[:rows, :columns]
    score = found.score[:rows, :columns]

    sizes = np.bincount(found.region.ravel())
    on_image = resize_labels(region, height, width)
    # Regions of one cell count as one here: lines between them would be a grid over the image.
    outlines = outlines_of(np.where(sizes[on_image] == 1, -1, on_image))
    dots = [
        ((column + 0.5) * width / columns, (row + 0.5) * height / rows)
        for row, column in found.representatives
        if row < rows and column < columns and sizes[found.region[row, column]] > found.count
    ]
    colors = np.array([_color(q) if sizes[q] > 1 else (150, 150, 150) for q in range(len(sizes))], np.uint8)
    plain = image.copy()
    plain[outlines] = (255, 255, 255)
    tinted = (0.35 * image + 0.65 * colors[on_image]).round().astype(np.uint8)
    tinted[outlines] = (0, 0, 0)
    heat = heat_colors(resize_labels((255 * score.clip(0, 1)).round().astype(np.uint8), height, width) / 255)
    heat[outlines] = (60, 60, 60)
    radius = max(min(height / rows, width / columns) * 0.22, 2)
    shown = int((np.bincount(region.ravel(), minlength=len(sizes)) > 0).sum())
    alone = int((sizes[np.unique(region)] == 1).sum())
    grid = panel_grid(
        [[_dotted(plain, dots, radius), _dotted(tinted, dots, radius), heat]],
        ["representative pixels", f"{shown} region{'s' * (shown != 1)}", "scores J"],
    )
    text = (
        f"{rows}x{columns} cells; {alone} region{'s' * (alone != 1)} of one cell, grey; green: the {found.count} "
        f"representatives of each region of more cells; J from 0, black, to 1, yellow; mean {score.mean():.2f}"
    )
    return stack([grid, text_line(text, grid.shape[1], 13)])


def _dotted(image: np.ndarray, dots: list[tuple[float, float]], radius: float) -> np.ndarray:
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    for x, y in dots:
        for size, color in ((radius + 1, (0, 0, 0)), (radius, _DOT)):
            draw.ellipse((x - size, y - size, x + size, y + size), fill=color)
    return np.asarray(canvas)


def _color(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((number * _GOLDEN) % 1, 0.55 + 0.35 * (number % 2), 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
