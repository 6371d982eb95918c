"""Pictures of attention maps: heat over the image, after each loop and in each frame (CCNet, TPAMI, Fig. 7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .attention import AttentionMaps
from .drawing import greyed, panel_grid, readable, resize_rgb, scale_bar, stack
from .visualize import heat_colors

__all__ = ["draw_attention", "draw_clip_attention", "heat_over_image"]


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
    panels = [_marked(image, point, factor)]
    heads = [f"pixel ({attention.pixel[0]}, {attention.pixel[1]})"]
    for loop, shares in enumerate(attention.maps, start=1):
        panels.append(_marked(heat_over_image(image, shares, attention.extent), point, factor))
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
            panels = [_marked(panel, point, factor) for panel in panels]
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
    weight = np.clip(0.15 + 1.2 * heat, 0, 0.92)[..., None]
    mixed = (1 - weight) * 0.6 * greyed(image) + weight * heat_colors(heat)
    return mixed.round().clip(0, 255).astype(np.uint8)


def _marked(image: np.ndarray, point: Sequence[float], size: int) -> np.ndarray:
    """Four green arms around the pixel of this middle and size, edged in black to show on any ground; it stays free."""
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    length = max(min(image.shape[:2]) // 36, 6)
    widest = 2  # edge
    inner = max(length // 2, size // 2 + widest + 1)
    outer = inner + length
    x, y = point
    for color, line, edge in (((0, 0, 0), 6, widest), ((40, 255, 60), 2, 0)):
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
