"""Pictures of predictions: overlays, comparisons with the ground truth, grids.

Images are (H, W, 3) uint8 RGB arrays, label maps (H, W) integer arrays; values that are no class are drawn
black.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .classes import ClassTable
from .drawing import (
    greyed,
    legend,
    legend_text_size,
    outlines_of,
    panel_grid,
    readable,
    resize_labels,
    resize_rgb,
    stack,
    text_line,
    text_size,
)
from .images import write_image

__all__ = [
    "colorize",
    "confidence_map",
    "difference",
    "heat_colors",
    "overlay",
    "save_labels",
    "save_prediction_grid",
    "side_by_side",
]

_WRONG = np.array((224, 36, 48), np.float32)
_UNLABELLED = np.array((40, 44, 60), np.float32)
# Black - purple - orange - pale yellow: brightness rises evenly, so it also reads in grey print.
_HEAT = np.array(
    (
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 255, 164),
    ),
    np.float32,
)


def colorize(labels: np.ndarray, classes: ClassTable) -> np.ndarray:
    """(H, W) labels -> (H, W, 3) in class colours."""
    table = np.zeros((len(classes) + 1, 3), np.uint8)
    table[:-1] = classes.colors
    index = labels.astype(np.int64)
    return table[np.where((index >= 0) & (index < len(classes)), index, len(classes))]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    classes: ClassTable,
    *,
    alpha: float = 0.5,
    outlines: bool = True,
    with_legend: bool = True,
) -> np.ndarray:
    """Class colours over the image, outlines between classes, and a legend of the classes that occur below.

    Args:
        image: (H, W, 3).
        labels: (H, W).
        classes: names and colours.
        alpha: weight of the colours against the image.
        outlines: dark lines where the class changes.
        with_legend: add the legend (names with their share of the pixels, most frequent first).

    Returns:
        A picture of the image's size times a whole factor that makes tiny images readable, plus the legend, which is at
        least 240 pixels wide.

    Raises:
        ValueError: image and labels differ in size.
    """
    _check_same_size(image, labels)
    factor = readable(image.shape)
    height, width = image.shape[0] * factor, image.shape[1] * factor
    shown = resize_labels(labels, height, width)
    picture = resize_rgb(image, height, width).copy()
    for rows in _row_bands(height):
        blended = (1 - alpha) * picture[rows].astype(np.float32) + alpha * colorize(shown[rows], classes)
        picture[rows] = blended.round().astype(np.uint8)
    if outlines:
        picture[outlines_of(shown)] //= 3
    if not with_legend:
        return picture
    present, shares = _present(labels, classes)
    notes = [f"{100 * share:.0f} %" if share >= 0.005 else "<1 %" for share in shares]
    return stack([picture, legend(classes, present, width, size=legend_text_size(width), notes=notes)])


def difference(
    prediction: np.ndarray, truth: np.ndarray, classes: ClassTable, image: np.ndarray | None = None
) -> np.ndarray:
    """Where a prediction is wrong: red; right: the image in pale grey; not labelled: dark blue.

    Args:
        prediction: (H, W).
        truth: (H, W); the ignored label and values outside the classes count as not labelled.
        classes: for their number and ignored label.
        image: (H, W, 3) drawn where the prediction is right.
    """
    _check_same_size(prediction, truth)
    base = np.full((*truth.shape, 3), 235, np.float32)
    if image is not None:
        _check_same_size(image, truth)
        base = 120 + 0.53 * greyed(image)
    labelled = _labelled(truth, classes)
    wrong = labelled & (prediction != truth)
    base[wrong] = 0.85 * _WRONG + 0.15 * base[wrong]
    base[~labelled] = _UNLABELLED
    return base.round().astype(np.uint8)


def confidence_map(confidence: np.ndarray) -> np.ndarray:
    """(H, W) probabilities of the winning class -> picture, dark at 0 and bright at 1."""
    return heat_colors(np.clip(confidence, 0, 1))


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 of any shape -> colours (…, 3) uint8 on a scale of even brightness; NaN has that of 0."""
    place = np.clip(np.nan_to_num(values), 0, 1).astype(np.float32) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(np.int64), len(_HEAT) - 2)
    share = (place - low)[..., None]
    return (_HEAT[low] * (1 - share) + _HEAT[low + 1] * share).round().astype(np.uint8)


def side_by_side(
    image: np.ndarray, prediction: np.ndarray, classes: ClassTable, truth: np.ndarray | None = None
) -> np.ndarray:
    """Image | prediction, and with a ground truth | ground truth | difference, over a legend."""
    return _prediction_grid(
        [image], {"prediction": [prediction]}, classes, None if truth is None else [truth], None
    )


def save_prediction_grid(
    path: str | os.PathLike[str],
    images: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray] | Mapping[str, Sequence[np.ndarray]],
    classes: ClassTable,
    truths: Sequence[np.ndarray] | None = None,
    *,
    row_titles: Sequence[str] | None = None,
) -> None:
    """Write one picture, a row for each image: image | prediction | ground truth | difference, and a legend.

    Args:
        path: file to write, .png or .jpg.
        images: n images (H, W, 3).
        predictions: n label maps; or several models' by name, which then stand beside each other, each with
            its pixel
            accuracy in the title and without a difference panel: image | ground truth | model | model | ...
        classes: names and colours.
        truths: n label maps.
        row_titles: n lines, for instance file names.

    Raises:
        ValueError: no image, lists of different lengths, or an image and its labels of different sizes.
        ImageFileError: the file cannot be written.
    """
    named = predictions if isinstance(predictions, Mapping) else {"prediction": predictions}
    write_image(path, _prediction_grid(images, named, classes, truths, row_titles))


def save_labels(path: str | os.PathLike[str], labels: np.ndarray) -> None:
    """Write a label map as a PNG of one channel that holds class indices (16 bits above 255 classes).

    Raises:
        ValueError: the file is not a .png, which alone keeps the values.
        ImageFileError: the file cannot be written.
    """
    if os.path.splitext(path)[1].lower() != ".png":
        raise ValueError(f"label maps are written as .png, got '{path}'.")
    write_image(path, labels)


def _prediction_grid(
    images: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    classes: ClassTable,
    truths: Sequence[np.ndarray] | None,
    row_titles: Sequence[str] | None,
) -> np.ndarray:
    lists: dict[str, Sequence[Any]] = dict(predictions)
    if truths is not None:
        lists["ground truth"] = truths
    if row_titles is not None:
        lists["row titles"] = row_titles
    if not images or not predictions:
        raise ValueError("a grid needs at least one image and one prediction.")
    for name, entries in lists.items():
        if len(entries) != len(images):
            raise ValueError(f"{len(entries)} entries in '{name}' for {len(images)} images.")

    titles = ["image"]
    rows: list[list[np.ndarray | None]] = [[image] for image in images]
    maps = [*predictions.items()]
    if truths is not None:
        # One model: its errors are the point and stand last. Several: they are compared with the truth before
        # them.
        place = len(maps) if len(maps) == 1 else 0
        maps.insert(place, ("ground truth", truths))
    for name, labels in maps:
        titles.append(_with_accuracy(name, labels, truths, classes) if name in predictions else name)
        for row, image, map_ in zip(rows, images, labels, strict=True):
            _check_same_size(image, map_)
            row.append(colorize(map_, classes))
    if truths is not None and len(predictions) == 1:
        titles.append("difference")
        (only,) = predictions.values()
        for row, image, prediction, truth in zip(rows, images, only, truths, strict=True):
            row.append(difference(prediction, truth, classes, image))

    grid = panel_grid(rows, titles, row_titles=row_titles)
    everything = np.concatenate([np.asarray(map_).ravel() for _, labels in maps for map_ in labels])
    present, _ = _present(everything[None], classes)
    size = text_size(grid.shape[1] // len(titles))
    parts = [grid, legend(classes, present, grid.shape[1], size=size)]
    if truths is not None and len(predictions) == 1:
        parts.append(text_line("difference: red = wrong, dark blue = not labelled", grid.shape[1], 13))
    return stack(parts)


def _with_accuracy(
    name: str, labels: Sequence[np.ndarray], truths: Sequence[np.ndarray] | None, classes: ClassTable
) -> str:
    if truths is None:
        return name
    right = total = 0
    for map_, truth in zip(labels, truths, strict=True):
        labelled = _labelled(truth, classes)
        right += int(((map_ == truth) & labelled).sum())
        total += int(labelled.sum())
    return f"{name} ({100 * right / total:.1f} % right)" if total else name


def _labelled(truth: np.ndarray, classes: ClassTable) -> np.ndarray:
    return (truth != classes.ignore_label) & (truth >= 0) & (truth < len(classes))


def _present(labels: np.ndarray, classes: ClassTable) -> tuple[list[int], list[float]]:
    """Class indices that occur, most frequent first, and their shares; everything that is no class counts as
    one."""
    counts = np.zeros(len(classes) + 1, np.int64)
    for rows in _row_bands(len(labels)):
        index = labels[rows].astype(np.int64).ravel()
        index = np.where((index >= 0) & (index < len(classes)), index, len(classes))
        counts += np.bincount(index, minlength=len(counts))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return order, [counts[i] / labels.size for i in order]


def _row_bands(height: int, size: int = 256) -> Iterator[slice]:
    """Slices of rows: pictures may be large, and their working copies in wider types several times so."""
    for top in range(0, height, size):
        yield slice(top, min(top + size, height))


def _check_same_size(image: np.ndarray, labels: np.ndarray) -> None:
    if image.shape[:2] != labels.shape[:2]:
        raise ValueError(
            f"image {image.shape[:2]} and labels {labels.shape[:2]} differ in size (height, width)."
        )
