"""Classes that change places when a picture is mirrored: left arm and right arm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data.transforms import Transform

__all__ = ["is_mirroring", "swap_labels"]


def is_mirroring(transform: Transform, height: int, width: int) -> bool:
    """Whether a geometric transform shows the image as in a mirror, however it is rotated and scaled.

    Seen on three corners of the image: if they were passed clockwise and are passed counter-clockwise afterwards, it
    was mirrored. So it holds for every transform that has coordinates, and two flips, or a rotation by 180 degrees,
    are no mirror.

    Args:
        transform: any transform or list of transforms whose `apply_coords` is implemented.
        height, width: of the image it is applied to, in pixels.

    Raises:
        NotImplementedError: the transform does not say where points go.
    """
    corners = np.array([[0, 0], [width, 0], [0, height]], dtype=float)
    origin, right, down = np.asarray(transform.apply_coords(corners), dtype=float)
    (a, b), (c, d) = right - origin, down - origin
    return bool(a * d - b * c < 0)


def swap_labels(labels: np.ndarray, pairs: Sequence[Sequence[int]]) -> np.ndarray:
    """A copy of a label map in which the two classes of each pair have changed places.

    Args:
        labels: (H, W) of any integer type.
        pairs: such as [(14, 15), (16, 17)].
    """
    swapped = labels.copy()
    for a, b in pairs:
        swapped[labels == a] = b
        swapped[labels == b] = a
    return swapped
