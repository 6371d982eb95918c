"""Photometric distortion as in SSD and mmseg's recipes."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation, Transform

__all__ = ["PhotometricTransform", "RandomPhotometricDistortion"]

_HUES = 180  # OpenCV's 8-bit hue counts in steps of two degrees


def _table(gain: float, offset: float) -> np.ndarray:
    """What each 8-bit value becomes, clipped to 8 bits, (256,) uint8."""
    return np.clip(np.rint(np.arange(256) * gain + offset), 0, 255).astype(np.uint8)


class PhotometricTransform(Transform):
    """Brightness, contrast, saturation and hue, in this order, each result clipped to 8 bits.

    Args:
        brightness: added to every value.
        contrast: factor of every value.
        saturation: factor of the saturation.
        hue: added to the hue, in steps of two degrees.
        contrast_last: whether contrast comes after hue instead of after brightness.
        image_format: ``"RGB"`` or ``"BGR"``.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 1.0,
        saturation: float = 1.0,
        hue: int = 0,
        contrast_last: bool = False,
        image_format: str = "RGB",
    ) -> None:
        super().__init__()
        self.brightness, self.contrast = brightness, contrast
        self.saturation, self.hue = saturation, hue
        self.contrast_last = contrast_last
        self.image_format = image_format

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Distort (H, W, 3) uint8."""
        if img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] != 3:
            raise ValueError(f"Photometric distortion needs (H, W, 3) uint8, not {img.shape} {img.dtype}.")
        before = _table(1.0, self.brightness)
        if not self.contrast_last:
            before = _table(self.contrast, 0.0)[before]
        if self.brightness != 0 or (self.contrast != 1 and not self.contrast_last):
            img = cv2.LUT(img, before)
        if self.saturation != 1 or self.hue != 0:
            rgb = self.image_format == "RGB"
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV if rgb else cv2.COLOR_BGR2HSV)
            tables = np.empty((1, 256, 3), np.uint8)
            tables[0, :, 0] = (np.arange(256) + self.hue) % _HUES
            tables[0, :, 1] = _table(self.saturation, 0.0)
            tables[0, :, 2] = np.arange(256)
            img = cv2.cvtColor(cv2.LUT(hsv, tables), cv2.COLOR_HSV2RGB if rgb else cv2.COLOR_HSV2BGR)
        if self.contrast != 1 and self.contrast_last:
            img = cv2.LUT(img, _table(self.contrast, 0.0))
        return img

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Labels stay as they are."""
        return segmentation

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Points stay where they are."""
        return coords


class RandomPhotometricDistortion(Augmentation):
    """Each of brightness, contrast, saturation and hue changed with probability 1/2.

    Contrast comes before saturation and hue or after them, with probability 1/2 each. The defaults are those
    of mmseg's recipes.

    Args:
        brightness_delta: largest change of brightness, in 0..255.
        contrast_range: lowest and highest factor of the contrast.
        saturation_range: lowest and highest factor of the saturation.
        hue_delta: largest change of the hue, in steps of two degrees.
        image_format: order of the image's channels, ``"RGB"`` or ``"BGR"``; the mapper's.
    """

    def __init__(
        self,
        brightness_delta: float = 32,
        contrast_range: Sequence[float] = (0.5, 1.5),
        saturation_range: Sequence[float] = (0.5, 1.5),
        hue_delta: int = 18,
        image_format: str = "RGB",
    ) -> None:
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ValueError(
                f"RandomPhotometricDistortion: image_format is '{image_format}', not 'RGB' or 'BGR'."
            )
        self.brightness_delta = brightness_delta
        self.contrast_range = tuple(contrast_range)
        self.saturation_range = tuple(saturation_range)
        self.hue_delta = hue_delta
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the changes; `image` is not looked at."""

        def sometimes(low: float, high: float, otherwise: float) -> float:
            return np.random.uniform(low, high) if np.random.randint(2) else otherwise

        return PhotometricTransform(
            brightness=sometimes(-self.brightness_delta, self.brightness_delta, 0.0),
            contrast=sometimes(*self.contrast_range, 1.0),
            saturation=sometimes(*self.saturation_range, 1.0),
            hue=int(np.random.randint(-self.hue_delta, self.hue_delta + 1)) if np.random.randint(2) else 0,
            contrast_last=bool(np.random.randint(2)),
            image_format=self.image_format,
        )
