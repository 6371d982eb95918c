"""Laying out pictures: panels under titles, legends, text. Arrays are (H, W, 3) uint8 RGB throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .classes import ClassTable

__all__ = [
    "INK",
    "PAPER",
    "greyed",
    "legend",
    "legend_text_size",
    "outlines_of",
    "panel_grid",
    "readable",
    "resize_labels",
    "resize_rgb",
    "scale_bar",
    "stack",
    "text_line",
    "text_size",
]

PAPER = (255, 255, 255)
INK = (32, 32, 36)
_MARGIN = 8
_TEXT_MARGIN = 4  # of a line of text, at both ends together
# Smaller pictures are enlarged until their longer side reaches this, larger ones in grids reduced to the
# second.
_MIN_SIDE = 240
_MAX_CELL_SIDE = 720


def readable(shape: Sequence[int]) -> int:
    """The whole factor by which a small picture of (H, W, …) is enlarged so that details and text can be
    read."""
    return max(-(-_MIN_SIDE // max(shape[0], shape[1])), 1)


def resize_rgb(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge by repeating pixels (they stay visible as such), reduce by averaging."""
    if image.shape[:2] == (height, width):
        return image
    larger = height >= image.shape[0] and width >= image.shape[1]
    resample = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour resize of (H, W) integers of any dtype."""
    if labels.shape == (height, width):
        return labels
    rows = (np.arange(height) * 2 + 1) * labels.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * labels.shape[1] // (2 * width)
    return labels[rows[:, None], columns]


def outlines_of(labels: np.ndarray) -> np.ndarray:
    """Where (H, W) labels change: bool, true for pixels whose right or lower neighbour has another label."""
    edges = np.zeros(labels.shape, bool)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    return edges


def greyed(image: np.ndarray) -> np.ndarray:
    """The luminance (ITU-R BT.601) of an image in each of its three channels, (H, W, 3) float32."""
    grey = image.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    return np.repeat(grey[:, :, None], 3, axis=2)


def text_line(text: str, width: int, size: int = 14, *, color: Sequence[int] = INK) -> np.ndarray:
    """One line of text on paper, centred; shortened with dots when it is too long."""
    font = _font(size)
    shown = text
    while shown and font.getlength(shown) > width - _TEXT_MARGIN:
        shown = shown[:-4] + "..." if len(shown) > 4 else ""
    canvas = Image.new("RGB", (width, size + 8), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text(
        ((width - font.getlength(shown)) / 2, (size + 8) / 2),
        shown,
        font=font,
        fill=tuple(color),
        anchor="lm",
    )
    return np.asarray(canvas)


def legend(
    classes: ClassTable,
    present: Sequence[int],
    width: int,
    *,
    size: int = 14,
    notes: Sequence[str] | None = None,
) -> np.ndarray:
    """Swatches and names of the given classes in as few columns of equal width as it takes, read downwards.

    Args:
        classes: names and colours.
        present: class indices in the order wanted; the ignored label's index may be among them.
        width: of the picture in pixels; for a narrow one the legend is wider, so that its words can be read.
        size: of the text in pixels.
        notes: a short text after each name, for instance its share of the picture.
    """
    if not present:
        return np.empty((0, width, 3), np.uint8)
    width = max(width, _MIN_SIDE)
    font = _font(size)
    texts = []
    for position, index in enumerate(present):
        name = classes.names[index] if 0 <= index < len(classes) else "void"
        texts.append(f"{name} {notes[position]}" if notes else name)
    swatch = size
    needed = max(font.getlength(text) for text in texts) + swatch + 18
    columns = int(max(min((width - _MARGIN) // needed, len(texts)), 1))
    rows = -(-len(texts) // columns)
    columns = -(-len(texts) // rows)
    line = size + 8
    column_width = (width - _MARGIN) / columns
    canvas = Image.new("RGB", (width, rows * line + _MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for position, (index, text) in enumerate(zip(present, texts, strict=True)):
        left = _MARGIN + (position // rows) * column_width
        top = _MARGIN // 2 + (position % rows) * line
        color = tuple(int(c) for c in classes.colors[index]) if 0 <= index < len(classes) else (0, 0, 0)
        draw.rectangle(
            (left, top + 4, left + swatch, top + 4 + swatch), fill=color, outline=tuple(c // 2 for c in color)
        )
        draw.text((left + swatch + 6, top + 4 + swatch / 2), text, font=font, fill=INK, anchor="lm")
    return np.asarray(canvas)


def scale_bar(
    colors: np.ndarray, low: str, high: str, caption: str, width: int, size: int = 13
) -> np.ndarray:
    """What the colours of a map mean: a bar between the names of its two ends, over a caption.

    Args:
        colors: (n, 3) uint8, from the lowest to the highest; a column of the bar each.
        low, high: what the ends stand for.
        caption: what is shown.
        width: of the picture in pixels; for a narrow one the scale is wider, so that its words can be read.
        size: of the text in pixels.
    """
    font = _font(size)
    ends = max(font.getlength(low), font.getlength(high)) + 2 * _MARGIN
    width = max(width, math.ceil(max(len(colors) + 2 * ends, font.getlength(caption) + _TEXT_MARGIN)))
    left, middle = (width - len(colors)) // 2, (size + 8) / 2
    canvas = Image.new("RGB", (width, size + 8), PAPER)
    canvas.paste(Image.fromarray(np.repeat(colors[None], size, axis=0)), (left, 4))
    draw = ImageDraw.Draw(canvas)
    draw.text((left - _MARGIN, middle), low, font=font, fill=INK, anchor="rm")
    draw.text((left + len(colors) + _MARGIN, middle), high, font=font, fill=INK, anchor="lm")
    return stack([np.asarray(canvas), text_line(caption, width, size)])


def stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures below each other, each centred on paper of the widest one's width."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([_centred(part, part.shape[0], width) for part in parts], axis=0)


def panel_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    titles: Sequence[str],
    *,
    row_titles: Sequence[str] | None = None,
) -> np.ndarray:
    """Rows of panels of one cell size under column titles.

    Args:
        rows: panels; None leaves a cell empty. Those of a row should have one aspect ratio.
        titles: one for each column; columns of narrow panels are wider, so that they can be read.
        row_titles: a line above each row.
    """
    panels = [panel for row in rows for panel in row if panel is not None]
    enlarge = min(readable(panel.shape) for panel in panels)
    height = max(panel.shape[0] for panel in panels) * enlarge
    width = max(panel.shape[1] for panel in panels) * enlarge
    reduce = min(_MAX_CELL_SIDE / max(height, width), 1.0)
    height, width = max(round(height * reduce), 1), max(round(width * reduce), 1)

    size = text_size(width)
    longest = math.ceil(max(_font(size).getlength(title) for title in titles)) + _TEXT_MARGIN
    column = max(width, min(longest, _MIN_SIDE))
    gap = np.full((1, _MARGIN, 3), PAPER, np.uint8)
    lines = [_beside([text_line(title, column, size) for title in titles], gap)]
    for position, row in enumerate(rows):
        if row_titles:
            lines.append(text_line(row_titles[position], lines[0].shape[1], max(size - 2, 11)))
        cells = [_centred(_cell(panel, height, width), height, column) for panel in row]
        cells += [_cell(None, height, column)] * (len(titles) - len(cells))
        lines.append(_beside(cells, gap))
        lines.append(np.full((_MARGIN, lines[0].shape[1], 3), PAPER, np.uint8))
    return _framed(np.concatenate(lines, axis=0))


def text_size(width: int) -> int:
    """Pixels of a title over a panel of that width."""
    return int(min(max(width // 22, 13), 22))


def legend_text_size(width: int) -> int:
    """Pixels of a legend's text below a picture of that width."""
    return int(min(max(width // 45, 13), 20))


def _cell(panel: np.ndarray | None, height: int, width: int) -> np.ndarray:
    if panel is None:
        return np.full((height, width, 3), PAPER, np.uint8)
    factor = min(height / panel.shape[0], width / panel.shape[1])
    size = max(round(panel.shape[0] * factor), 1), max(round(panel.shape[1] * factor), 1)
    return _centred(resize_rgb(panel, min(size[0], height), min(size[1], width)), height, width)


def _centred(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    canvas = np.full((height, width, 3), PAPER, np.uint8)
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _beside(pictures: Sequence[np.ndarray], gap: np.ndarray) -> np.ndarray:
    height = pictures[0].shape[0]
    space = np.broadcast_to(gap, (height, *gap.shape[1:]))
    parts = [part for picture in pictures for part in (picture, space)]
    return np.concatenate(parts[:-1], axis=1)


def _framed(picture: np.ndarray) -> np.ndarray:
    return _centred(picture, picture.shape[0], picture.shape[1] + 2 * _MARGIN)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
