"""The whole image fitted into a frame, scaled and rotated about its centre, in one resampling."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation, Transform

from ccnet_d2.data.transforms.resize import height_and_width

__all__ = ["RandomRotateFit", "RotateFitTransform"]

_IGNORE = 255


class RotateFitTransform(Transform):
    """The image's centre goes to the centre of the output; around it the image is scaled and rotated.

    Images are interpolated linearly, label maps are taken from the nearest pixel; what the image does not cover is
    padded.

    Args:
        height, width: size of the input.
        out_height, out_width: size of the output.
        scale: pixels of the output for each pixel of the input.
        angle: counter-clockwise rotation in degrees.
        pad_value: value of each channel beyond the image.
        label_pad_value: label beyond the image.
    """

    def __init__(
        self,
        height: int,
        width: int,
        out_height: int,
        out_width: int,
        scale: float,
        angle: float = 0.0,
        pad_value: Sequence[float] = (0.0,),
        label_pad_value: int = _IGNORE,
    ) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.out_height, self.out_width = out_height, out_width
        self.scale, self.angle = scale, angle
        self.pad_value = tuple(pad_value)
        self.label_pad_value = label_pad_value
        cos, sin = scale * np.cos(np.deg2rad(angle)), scale * np.sin(np.deg2rad(angle))
        self._linear = np.array([[cos, sin], [-sin, cos]])  # the y axis points down
        center, out_center = np.array([width / 2, height / 2]), np.array([out_width / 2, out_height / 2])
        self._shift = out_center - self._linear @ center

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Transform (H, W) or (H, W, C), uint8 or float32."""
        assert img.shape[:2] == (self.height, self.width), (img.shape, self.height, self.width)
        channels = img.shape[2] if img.ndim == 3 else 1
        if len(self.pad_value) not in (1, channels):
            raise ValueError(
                f"pad_value has {len(self.pad_value)} values, but the image has {channels} channels."
            )
        pad_value = self.pad_value * channels if len(self.pad_value) == 1 else self.pad_value
        # OpenCV's coordinates are 0 at the centre of the first pixel, where those of points are 0.5.
        shift = self._shift + self._linear @ [0.5, 0.5] - 0.5
        warped = cv2.warpAffine(
            np.ascontiguousarray(img),
            np.column_stack([self._linear, shift]),
            (self.out_width, self.out_height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=pad_value,
        )
        # OpenCV drops a channel axis of length 1.
        return warped if warped.ndim == img.ndim else warped[..., None]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Transform (H, W) of any integer dtype."""
        assert segmentation.shape == (self.height, self.width), (segmentation.shape, self.height, self.width)
        # Not by OpenCV: version 5 takes a neighbour of the nearest pixel here and there.
        inverse = np.linalg.inv(self._linear)
        offset = -inverse @ self._shift
        across, down = np.arange(self.out_width) + 0.5, np.arange(self.out_height)[:, None] + 0.5
        columns = np.floor(inverse[0, 0] * across + inverse[0, 1] * down + offset[0]).astype(np.int64)
        rows = np.floor(inverse[1, 0] * across + inverse[1, 1] * down + offset[1]).astype(np.int64)
        inside = (rows >= 0) & (rows < self.height) & (columns >= 0) & (columns < self.width)
        out = np.full((self.out_height, self.out_width), self.label_pad_value, segmentation.dtype)
        out[inside] = segmentation[rows[inside], columns[inside]]
        return out

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Transform (N, 2) points (x, y), the image covering [0, W] x [0, H]; some may leave the output."""
        return coords @ self._linear.T + self._shift


class RandomRotateFit(Augmentation):
    """CE2P's newer augmentation: the whole image fitted into the output, ratio kept, then scaled and rotated.

    The part of the plane that is shown is the smallest frame around the image, times a factor drawn from a normal
    distribution with mean 1 and clipped to one standard deviation on either side (more is shown, or less); angles are
    drawn from a normal distribution with mean 0, clipped to two standard deviations.

    Args:
        crop_size: side, or height and width, of the output in pixels.
        scale_std: standard deviation of the factor; 0 for none.
        angle_std: standard deviation of the angle in degrees.
        angle_probability: of rotating an image at all; 0 for never.
        pad_value: image values beyond the image, in the order of its channels; default: the ImageNet mean in RGB.
        label_pad_value: label beyond the image.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int],
        *,
        scale_std: float = 0.25,
        angle_std: float = 30.0,
        angle_probability: float = 0.6,
        pad_value: Sequence[float] = (123.675, 116.28, 103.53),
        label_pad_value: int = _IGNORE,
    ) -> None:
        super().__init__()
        self.crop_size = height_and_width(crop_size, "RandomRotateFit: crop_size")
        for key, value, most in (
            ("scale_std", scale_std, 0.99),
            ("angle_std", angle_std, 180.0),
            ("angle_probability", angle_probability, 1.0),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"RandomRotateFit: {key} is {value}, outside 0 to {most:g}.")
        self.scale_std = scale_std
        self.angle_std = angle_std
        self.angle_probability = angle_probability
        self.pad_value = tuple(float(v) for v in pad_value)
        self.label_pad_value = label_pad_value

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw scale and rotation for an image, (H, W, C)."""
        height, width = image.shape[:2]
        out_height, out_width = self.crop_size
        shown = np.clip(np.random.normal(1, self.scale_std), 1 - self.scale_std, 1 + self.scale_std)
        angle = 0.0
        if np.random.uniform() < self.angle_probability:
            angle = np.clip(np.random.normal(0, self.angle_std), -2 * self.angle_std, 2 * self.angle_std)
        return RotateFitTransform(
            height,
            width,
            out_height,
            out_width,
            min(out_height / height, out_width / width) / shown,
            angle,
            self.pad_value,
            self.label_pad_value,
        )
