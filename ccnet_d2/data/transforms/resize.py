"""Resizing with OpenCV: images linearly, label maps by the nearest pixel."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation, NoOpTransform, Transform

__all__ = [
    "ResizeByScale",
    "ResizeLinearTransform",
    "ResizeTo",
    "ResizeToFit",
    "height_and_width",
    "nearest_index",
    "scaled_size",
]


def height_and_width(size: int | Sequence[int], name: str) -> tuple[int, int]:
    """A size given as one side, or as height and width, in pixels.

    Raises:
        ValueError: something else, or a fraction of a pixel; the message says `name`.
    """
    sides = (size, size) if isinstance(size, Real) else tuple(size)
    if len(sides) != 2 or not all(isinstance(n, Real) and n > 0 and float(n).is_integer() for n in sides):
        raise ValueError(
            f"{name} is {size}, but a side, or height and width, in whole pixels above 0 is needed."
        )
    return int(sides[0]), int(sides[1])


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width in pixels after scaling by `scale`, rounded half up and at least 1."""
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def nearest_index(start: int, stop: int, size: int, new_size: int) -> np.ndarray:
    """Source pixel under the centre of each pixel `start` … `stop - 1` of an axis resized from `size` to
    `new_size`.

    OpenCV's ``INTER_NEAREST`` looks at the pixels' corners instead, which moves label maps by up to half a
    pixel against the images.

    Returns:
        (stop - start,) int64, values in 0 … size - 1.
    """
    return np.minimum((2 * np.arange(start, stop) + 1) * size // (2 * new_size), size - 1)


class ResizeLinearTransform(Transform):
    """Resize an image linearly (no low-pass filter, as in the CCNet and mmseg recipes), a label map by
    nearest.

    Args:
        height, width: size of the input.
        new_height, new_width: size of the output.
    """

    def __init__(self, height: int, width: int, new_height: int, new_width: int) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.new_height, self.new_width = new_height, new_width

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Resize (H, W) or (H, W, C), uint8 or float."""
        assert img.shape[:2] == (self.height, self.width), (img.shape, self.height, self.width)
        resized = cv2.resize(img, (self.new_width, self.new_height), interpolation=cv2.INTER_LINEAR)
        # OpenCV drops a channel axis of length 1.
        return resized if resized.ndim == img.ndim else resized[..., None]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resize (H, W) of any dtype."""
        rows = nearest_index(0, self.new_height, self.height, self.new_height)
        columns = nearest_index(0, self.new_width, self.width, self.new_width)
        return segmentation[rows].take(columns, axis=1)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scale (N, 2) points (x, y), the image covering [0, W] x [0, H]."""
        return coords * np.array([self.new_width / self.width, self.new_height / self.height])

    def inverse(self) -> Transform:
        """The resize back to the size of the input."""
        return ResizeLinearTransform(self.new_height, self.new_width, self.height, self.width)


def _resize(image: np.ndarray, scale: float) -> Transform:
    height, width = image.shape[:2]
    new_size = scaled_size(height, width, scale)
    return NoOpTransform() if new_size == (height, width) else ResizeLinearTransform(height, width, *new_size)


class ResizeByScale(Augmentation):
    """Resize every image by the same factor.

    Args:
        scale: factor, such as 0.5 for half the height and half the width.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"ResizeByScale: scale is {scale}, but has to be above 0.")
        self.scale = scale

    def get_transform(self, image: np.ndarray) -> Transform:
        """Transform of an image, (H, W, C)."""
        return _resize(image, self.scale)


class ResizeTo(Augmentation):
    """Resize every image to the same size, whatever its ratio.

    Args:
        height, width: of the output in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        if min(height, width) < 1:
            raise ValueError(f"ResizeTo: {height}x{width} has to be at least 1x1.")
        self.height, self.width = height, width

    def get_transform(self, image: np.ndarray) -> Transform:
        """Transform of an image, (H, W, C)."""
        return ResizeLinearTransform(*image.shape[:2], self.height, self.width)


class ResizeToFit(Augmentation):
    """Resize to the largest size, ratio kept, whose longer and shorter side do not exceed two limits.

    Args:
        long_side: limit of the longer side in pixels.
        short_side: limit of the shorter side in pixels.
    """

    def __init__(self, long_side: int, short_side: int) -> None:
        super().__init__()
        if not 0 < short_side <= long_side:
            raise ValueError(f"ResizeToFit: {short_side=} has to be above 0 and at most {long_side=}.")
        self.long_side, self.short_side = long_side, short_side

    def get_transform(self, image: np.ndarray) -> Transform:
        """Transform of an image, (H, W, C)."""
        height, width = image.shape[:2]
        return _resize(image, min(self.long_side / max(height, width), self.short_side / min(height, width)))
