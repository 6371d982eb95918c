"""Where a pixel looks: attention maps of RCCA (CCNet, TPAMI, Fig. 7).

After R loops the output at position p is a mixture of all positions. Leaving aside values and residuals, its
shares are row p of the product A_R … A_1, where A_r holds the criss-cross weights of loop r. The row is
propagated through the loops from the last to the first along lines, in O(N (H+W)); no N x N table is made.

Shapes: B batch, C channels, S = (H, W) or (T, H, W) spatial sizes, L_a the size of axis a, N = number of
positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ccnet_d2.layers import RCCA
from ccnet_d2.ops import criss_cross_weights

from .drawing import panel_grid, readable, resize_rgb, scale_bar, stack
from .visualize import heat_colors

__all__ = [
    "AttentionMaps",
    "attention_weights",
    "draw_attention",
    "draw_clip_attention",
    "find_rcca",
    "heat_over_image",
    "pixel_attention",
    "propagate",
    "record_input",
    "rows_of",
]


def find_rcca(model: nn.Module, name: str | None = None) -> RCCA:
    """The model's RCCA layer.

    Args:
        model: any module.
        name: which one, by its dotted name, where there are several.

    Raises:
        ValueError: the model has none, several and no name was given, or none of that name.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, RCCA)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no criss-cross attention (RCCA) to look into.")
    if name is None and len(layers) == 1:
        return next(iter(layers.values()))
    if name not in layers:
        problem = "several RCCA layers, name one" if name is None else f"no RCCA layer '{name}'"
        raise ValueError(f"{type(model).__name__} has {problem}: {', '.join(layers)}.")
    return layers[name]


def record_input(module: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Within the block, collect the first argument of every call of `module` in this thread."""
    return _recorded(module.register_forward_pre_hook, lambda args: args[0].detach())


def record_output(module: nn.Module) -> AbstractContextManager[list[Any]]:
    """Within the block, collect what every call of `module` in this thread returns."""
    return _recorded(module.register_forward_hook, lambda out: out)


@contextmanager
def _recorded(
    register: Callable[[Callable[..., None]], RemovableHandle], take: Callable[[Any], Any]
) -> Iterator[list[Any]]:
    """Collect what `take` makes of the last argument of a hook."""
    seen: list[Any] = []
    owner = threading.get_ident()  # others may run the same model on other images meanwhile

    def keep(*arguments: Any) -> None:
        if threading.get_ident() == owner:
            seen.append(take(arguments[-1]))

    handle = register(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def attention_weights(
    rcca: RCCA, features: Tensor, recurrence: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Criss-cross weights of each loop.

    Args:
        rcca: the layer.
        features: (B, C, *S), its input.
        recurrence: R, number of loops; default: the layer's own.

    Returns:
        For loop 1 … R what `criss_cross_weights` gives: for each axis a (B, *S, L_a).
    """
    loops = rcca.recurrence if recurrence is None else recurrence
    if loops < 1:
        raise ValueError(f"recurrence must be at least 1, got {loops}.")
    x = features.to(rcca.gamma.dtype)
    weights = []
    for loop in range(loops):
        query, key, _ = rcca.project(x)
        weights.append(criss_cross_weights(query, key))
        if loop + 1 < loops:
            x = rcca.attend(x)
    return weights


def propagate(row: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Row vector times criss-cross matrix: `out[j] = sum_i row[i] A[i, j]`.

    Args:
        row: (B, *S), how much each position counts.
        weights: for each axis a (B, *S, L_a), as of `criss_cross_weights`.

    Returns:
        (B, *S).
    """
    out = torch.zeros_like(row)
    for axis, table in enumerate(weights, start=1):
        line = row.movedim(axis, -1).unsqueeze(-2)  # (B, *others, 1, L_a)
        out += (line @ table.movedim(axis, -2)).squeeze(-2).movedim(-1, axis)
    return out


def pixel_attention(
    rcca: RCCA, features: Tensor, position: Sequence[int], recurrence: int | None = None
) -> list[Tensor]:
    """How much one position takes from each other position, after 1, 2, … R loops.

    Args:
        rcca: the layer.
        features: (B, C, *S), its input.
        position: one index for each spatial axis.
        recurrence: R; default: the layer's own.

    Returns:
        R maps (B, *S), each summing to 1. The r-th is row `position` of A_r … A_1; the first is zero off the
        lines through the position.

    Raises:
        ValueError: the position does not fit the features.
    """
    sizes = features.shape[2:]
    if len(position) != len(sizes) or not all(0 <= p < size for p, size in zip(position, sizes, strict=True)):
        raise ValueError(f"position {tuple(position)} lies outside features of sizes {tuple(sizes)}.")
    return rows_of(attention_weights(rcca, features, recurrence), position)


def rows_of(weights: Sequence[tuple[Tensor, ...]], position: Sequence[int]) -> list[Tensor]:
    """`pixel_attention` from weights that are known.

    Args:
        weights: of loop 1 … R, as of `attention_weights`.
        position: one index for each spatial axis.

    Returns:
        R maps (B, *S), each summing to 1.
    """
    maps = []
    for loops in range(1, len(weights) + 1):
        row = torch.zeros_like(weights[0][0][..., 0])
        row.movedim(0, -1)[tuple(position)] = 1
        for table in reversed(weights[:loops]):
            row = propagate(row, table)
        maps.append(row)
    return maps


@dataclass(frozen=True)
class AttentionMaps:
    """Where one pixel of an image looks.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        pixel: (x, y) in the image.
        cell: (row, column) of that pixel in the feature map.
        maps: R maps (h, w) on the feature grid, each summing to 1 (float32).
        extent: (rows, columns), possibly fractional, of the feature map that the image covers; the rest is
            padding.
    """

    image: np.ndarray
    pixel: tuple[int, int]
    cell: tuple[int, int]
    maps: list[np.ndarray]
    extent: tuple[float, float]


def draw_attention(attention: AttentionMaps, *, titles: Sequence[str] | None = None) -> np.ndarray:
    """The image with the pixel marked, and beside it a heat map over the image after each loop.

    Brightness grows with the square root of a share, relative to the largest of its map, which the title gives: a
    few positions hold most of the attention, and on a straight scale nothing else would show.

    Returns:
        (height, width, 3) uint8.
    """
    factor = readable(attention.image.shape)
    height, width = attention.image.shape[0] * factor, attention.image.shape[1] * factor
    image = resize_rgb(attention.image, height, width)
    point = tuple((value + 0.5) * factor for value in attention.pixel)
    panels = [_marked(image, point)]
    heads = [f"pixel ({attention.pixel[0]}, {attention.pixel[1]})"]
    for loop, shares in enumerate(attention.maps, start=1):
        panels.append(_marked(heat_over_image(image, shares, attention.extent), point))
        heads.append(f"R = {loop} (max {_percent(shares.max())})")
    if titles is not None:
        if len(titles) != len(panels):
            raise ValueError(f"{len(titles)} titles for {len(panels)} panels.")
        heads = list(titles)
    grid = panel_grid([panels], heads)
    return stack([grid, _scale_bar(grid.shape[1])])


def draw_clip_attention(
    frames: np.ndarray,
    maps: Sequence[np.ndarray],
    pixel: Sequence[int],
    *,
    extent: tuple[float, float] | None = None,
) -> np.ndarray:
    """The same for 3D attention: a row for each frame, the frame itself and its part of each loop's map.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        maps: R maps (T, h, w), as of `pixel_attention`; brightness is relative to the largest share in all
            frames.
        pixel: (t, x, y) of the pixel that looks, in the frames.
        extent: see `AttentionMaps`; default: the frames cover the whole feature map.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: a map has another number of frames.
    """
    factor = readable(frames.shape[1:])
    height, width = frames.shape[1] * factor, frames.shape[2] * factor
    point = tuple((value + 0.5) * factor for value in pixel[1:])
    rows = []
    for time, frame in enumerate(frames):
        image = resize_rgb(frame, height, width)
        panels = [image]
        for shares in maps:
            if len(shares) != len(frames):
                raise ValueError(f"an attention map of {len(shares)} frames for {len(frames)} images.")
            heat = _on_image(shares[time], extent or shares.shape[1:], height, width)
            panels.append(_blend(image, np.sqrt(heat / max(shares.max(), 1e-12))))
        if time == pixel[0]:
            panels = [_marked(panel, point) for panel in panels]
        rows.append(panels)
    heads = ["frame"] + [f"R = {loop} (max {_percent(m.max())})" for loop, m in enumerate(maps, start=1)]
    grid = panel_grid(rows, heads, row_titles=[f"t = {time}" for time in range(len(frames))])
    return stack([grid, _scale_bar(grid.shape[1])])


def heat_over_image(image: np.ndarray, shares: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """One map as colours over the greyed image, on the scale that `draw_attention` tells of.

    Args:
        image: (H, W, 3) uint8 RGB.
        shares: (h, w), on the feature grid.
        extent: see `AttentionMaps`.

    Returns:
        (H, W, 3) uint8.
    """
    heat = _on_image(shares, extent, *image.shape[:2])
    return _blend(image, np.sqrt(heat / max(shares.max(), 1e-12)))


def _on_image(shares: np.ndarray, extent: tuple[float, float], height: int, width: int) -> np.ndarray:
    """Shares on the feature grid -> (height, width), each cell a flat rectangle: what it is, not smoothed."""
    rows = ((np.arange(height) + 0.5) * extent[0] / height).astype(np.int64).clip(0, shares.shape[0] - 1)
    columns = ((np.arange(width) + 0.5) * extent[1] / width).astype(np.int64).clip(0, shares.shape[1] - 1)
    return shares[rows[:, None], columns]


def _blend(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    grey = image.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    weight = np.clip(0.15 + 1.2 * heat, 0, 0.92)[..., None]
    mixed = (1 - weight) * 0.6 * grey[..., None] + weight * heat_colors(heat)
    return mixed.round().clip(0, 255).astype(np.uint8)


def _marked(image: np.ndarray, point: Sequence[float]) -> np.ndarray:
    """Four green arms around the point, edged in black so that they show on any ground; the point stays free."""
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    outer = max(min(image.shape[:2]) // 24, 8)
    inner = outer // 3
    x, y = point
    for color, line, edge in (((0, 0, 0), 6, 2), ((40, 255, 60), 2, 0)):
        for sign in (-1, 1):
            near, far = sign * (inner - edge), sign * (outer + edge)
            draw.line((x + near, y, x + far, y), fill=color, width=line)
            draw.line((x, y + near, x, y + far), fill=color, width=line)
    return np.asarray(canvas)


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1 if share >= 0.01 else 2}f} %"


def _scale_bar(width: int) -> np.ndarray:
    colors = heat_colors(np.linspace(0, 1, min(width // 3, 240)))
    return scale_bar(
        colors, "none", "most in the map", "share of attention, its square root as colour", width
    )
