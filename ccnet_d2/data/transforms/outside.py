"""What a transformed label map shows of the image, and what lies beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from detectron2.data.transforms import Transform, TransformList

__all__ = ["outside_of", "steps_of"]


def outside_of(transform: Transform, height: int, width: int) -> np.ndarray:
    """Where a transform fills a label map up with zeros, which are a class, because there is no image.

    Detectron2's rotations and extents do, and its `FixedSizeCrop` in 0.5. Transforms that say themselves what labels
    they pad with (a `label_pad_value`) are left to it.

    Args:
        transform: any transform or list of transforms.
        height, width: of the label map it is applied to, in pixels.

    Returns:
        (H', W') bool, of the size after the transform.
    """
    outside = _transformed(transform, np.full((height, width), 255, np.uint8)) == 0
    if outside.any():  # by a transform of labels, perhaps, that makes void a class
        outside &= _transformed(transform, np.ones((height, width), np.uint8)) == 0
    return outside


def _transformed(transform: Transform, label: np.ndarray) -> np.ndarray:
    """A label map of one value, which padding is to have too where a transform says what labels it pads with."""
    value = int(label[0, 0])
    for step in steps_of(transform):
        if hasattr(step, "label_pad_value"):
            step = copy.copy(step)
            step.label_pad_value = value
        label = step.apply_segmentation(label)
    return label


def steps_of(transform: Transform) -> Iterator[Transform]:
    """The transforms that a list of them, or of lists, applies one after the other; of any other, itself."""
    if isinstance(transform, TransformList):
        for step in transform.transforms:
            yield from steps_of(step)
    else:
        yield transform
