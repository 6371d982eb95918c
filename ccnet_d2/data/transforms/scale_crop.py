"""Random scale and random crop in one step, which resamples only the pixels that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation, Transform

from ccnet_d2.data.transforms.resize import height_and_width, nearest_index, scaled_size

__all__ = ["RandomScaleCrop", "ScaleCropTransform"]

_IGNORE = 255


def _pad(array: np.ndarray, height: int, width: int, value: Sequence[float]) -> np.ndarray:
    """Extend (H, W, …) at the bottom and on the right to `height` x `width`."""
    if array.shape[:2] == (height, width):
        return array
    if np.issubdtype(array.dtype, np.integer):
        value = [round(v) for v in value]
    channels = array.shape[2] if array.ndim == 3 else 1
    if len(value) not in (1, channels):
        raise ValueError(f"pad_value has {len(value)} values, but the image has {channels} channels.")
    padded = np.empty((height, width, *array.shape[2:]), array.dtype)
    # What the array does not cover: below it, and to its right.
    fill = np.asarray(value, array.dtype) if array.ndim == 3 else array.dtype.type(value[0])
    padded[array.shape[0] :] = fill
    padded[: array.shape[0], array.shape[1] :] = fill
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


class ScaleCropTransform(Transform):
    """Resize, crop and pad as one step: what resizing the whole image and cropping gives, at less cost.

    Images are interpolated linearly (OpenCV before version 5 rounds to 1/32 of a pixel), label maps are
    taken from the nearest pixel. A crop that reaches beyond the resized image is padded at the bottom and on
    the right.

    Args:
        height, width: size of the input.
        new_height, new_width: size that the whole image is resized to.
        top, left: first row and column of the crop in the resized image.
        crop_height, crop_width: size of the output.
        pad_value: value of each channel beyond the image.
        label_pad_value: label beyond the image.
    """

    def __init__(
        self,
        height: int,
        width: int,
        new_height: int,
        new_width: int,
        top: int,
        left: int,
        crop_height: int,
        crop_width: int,
        pad_value: Sequence[float] = (0.0,),
        label_pad_value: int = _IGNORE,
    ) -> None:
        super().__init__()
        if not (0 <= top < new_height and 0 <= left < new_width):
            raise ValueError(
                f"The crop at ({top}, {left}) lies outside the resized image {new_height}x{new_width}."
            )
        self.height, self.width = height, width
        self.new_height, self.new_width = new_height, new_width
        self.top, self.left = top, left
        self.crop_height, self.crop_width = crop_height, crop_width
        self.pad_value = tuple(pad_value)
        self.label_pad_value = label_pad_value
        # First row (column) after the crop, as far as there is image.
        self.bottom = min(top + crop_height, new_height)
        self.right = min(left + crop_width, new_width)

    def source_box(self) -> tuple[int, int, int, int]:
        """Rows and columns of the input under the crop: first row, end row, first column, end column."""
        rows = nearest_index(self.top, self.bottom, self.height, self.new_height)
        columns = nearest_index(self.left, self.right, self.width, self.new_width)
        return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Transform (H, W) or (H, W, C), uint8 or float32."""
        assert img.shape[:2] == (self.height, self.width), (img.shape, self.height, self.width)
        if (self.height, self.width) == (self.new_height, self.new_width):
            crop = img[self.top : self.bottom, self.left : self.right]
        else:
            # The input under the crop and two pixels around it: all that interpolation looks at, and small
            # enough for warpAffine's limit of 32767 pixels per side.
            first_row, end_row, first_column, end_column = self.source_box()
            first_row, first_column = max(first_row - 2, 0), max(first_column - 2, 0)
            region = img[first_row : end_row + 2, first_column : end_column + 2]
            # Pixel centres map onto pixel centres: source = (crop + offset + 0.5) / scale - 0.5.
            step_y, step_x = self.height / self.new_height, self.width / self.new_width
            matrix = np.array(
                [
                    [step_x, 0.0, (self.left + 0.5) * step_x - 0.5 - first_column],
                    [0.0, step_y, (self.top + 0.5) * step_y - 0.5 - first_row],
                ]
            )
            crop = cv2.warpAffine(
                np.ascontiguousarray(region),
                matrix,
                (self.right - self.left, self.bottom - self.top),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )
            if crop.ndim < img.ndim:  # OpenCV drops a channel axis of length 1
                crop = crop[..., None]
        return _pad(crop, self.crop_height, self.crop_width, self.pad_value)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Transform (H, W) of any integer dtype."""
        assert segmentation.shape == (self.height, self.width), (segmentation.shape, self.height, self.width)
        rows = nearest_index(self.top, self.bottom, self.height, self.new_height)
        columns = nearest_index(self.left, self.right, self.width, self.new_width)
        crop = segmentation[rows].take(columns, axis=1)
        return _pad(crop, self.crop_height, self.crop_width, (self.label_pad_value,))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Transform (N, 2) points (x, y), the image covering [0, W] x [0, H]; some may leave the crop."""
        scale = np.array([self.new_width / self.width, self.new_height / self.height])
        return coords * scale - np.array([self.left, self.top])


class RandomScaleCrop(Augmentation):
    """Random scale, then a random crop of fixed size, padded where the scaled image is smaller.

    At most one of `scale_range`, `scale_choices` and `short_side_choices` is given; without them images keep
    their scale. With `category_max_ratio` a crop is drawn again, up to `tries` times in all, while it shows a
    single class or one class takes up that share of its labelled pixels or more (mmseg's ``cat_max_ratio``;
    counted on the pixels of the file under the crop).

    Args:
        crop_size: side, or height and width, of the output in pixels.
        scale_range: lowest and highest factor, drawn uniformly: (0.5, 2.0) in mmseg's recipes, (0.75, 2.0) in
            the CCNet paper.
        scale_choices: factors, one drawn: 0.7, 0.8, … 2.1 in the official CCNet code.
        short_side_choices: lengths in pixels of the shorter side, one drawn: 300, 375, 450, 525, 600 for
            ADE20K in the CCNet paper.
        base_size: longer and shorter side in pixels that an image is fitted into, ratio kept, before the factor
            applies: (2048, 512) in mmseg's recipes for ADE20K and VOC. Without it the factor applies to the image.
        category_max_ratio: see above; 0.75 in mmseg's recipes.
        tries: see above.
        pad_value: image values beyond the image, in the order of its channels; default: the ImageNet mean in
            RGB.
        label_pad_value: label beyond the image, which `category_max_ratio` does not count as labelled.

    Raises:
        ValueError: more than one of the scales is given, or a value is out of its range.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int],
        *,
        scale_range: Sequence[float] | None = None,
        scale_choices: Sequence[float] | None = None,
        short_side_choices: Sequence[int] | None = None,
        base_size: Sequence[int] | None = None,
        category_max_ratio: float | None = None,
        tries: int = 10,
        pad_value: Sequence[float] = (123.675, 116.28, 103.53),
        label_pad_value: int = _IGNORE,
    ) -> None:
        super().__init__()
        _check_scale(scale_range, scale_choices, short_side_choices, base_size)
        self.crop_size = height_and_width(crop_size, "RandomScaleCrop: crop_size")
        self.scale_range = None if scale_range is None else tuple(scale_range)
        self.scale_choices = None if scale_choices is None else tuple(scale_choices)
        self.short_side_choices = None if short_side_choices is None else tuple(short_side_choices)
        self.base_size = None if base_size is None else tuple(base_size)
        if category_max_ratio is not None and not 0 < category_max_ratio <= 1:
            raise ValueError(f"RandomScaleCrop: category_max_ratio is {category_max_ratio}, outside (0, 1].")
        if tries < 1:
            raise ValueError(f"RandomScaleCrop: tries is {tries}, but at least 1 is needed.")
        self.category_max_ratio = category_max_ratio
        self.tries = tries
        self.pad_value = tuple(float(v) for v in pad_value)
        self.label_pad_value = label_pad_value

    def _draw_scale(self, height: int, width: int) -> float:
        scale = 1.0
        if self.base_size is not None:
            long_side, short_side = max(self.base_size), min(self.base_size)
            scale = min(long_side / max(height, width), short_side / min(height, width))
        if self.scale_range is not None:
            scale *= np.random.uniform(*self.scale_range)
        elif self.scale_choices is not None:
            scale *= self.scale_choices[np.random.randint(len(self.scale_choices))]
        elif self.short_side_choices is not None:
            scale = self.short_side_choices[np.random.randint(len(self.short_side_choices))] / min(
                height, width
            )
        return scale

    def _is_varied(self, transform: ScaleCropTransform, sem_seg: np.ndarray) -> bool:
        first_row, end_row, first_column, end_column = transform.source_box()
        region = sem_seg[first_row:end_row, first_column:end_column]
        if region.dtype == np.uint8:
            counts = cv2.calcHist([region], [0], None, [256], [0, 256]).ravel()
            counts[self.label_pad_value] = 0
        else:
            values, counts = np.unique(region, return_counts=True)
            counts = counts[values != self.label_pad_value]
        return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.category_max_ratio

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> Transform:
        """Draw scale and crop for an image, (H, W, C), and its label map, (H, W) or `None`."""
        height, width = image.shape[:2]
        crop_height, crop_width = self.crop_size
        new_height, new_width = scaled_size(height, width, self._draw_scale(height, width))
        limited = self.category_max_ratio is not None and sem_seg is not None
        for _ in range(self.tries if limited else 1):
            transform = ScaleCropTransform(
                height,
                width,
                new_height,
                new_width,
                np.random.randint(max(new_height - crop_height, 0) + 1),
                np.random.randint(max(new_width - crop_width, 0) + 1),
                crop_height,
                crop_width,
                self.pad_value,
                self.label_pad_value,
            )
            if not limited or self._is_varied(transform, sem_seg):
                break
        return transform


def _check_scale(
    scale_range: Sequence[float] | None,
    scale_choices: Sequence[float] | None,
    short_side_choices: Sequence[int] | None,
    base_size: Sequence[int] | None,
) -> None:
    """Refuse what cannot be drawn from, and more than one of what sets the scale."""
    given = {
        "scale_range": scale_range,
        "scale_choices": scale_choices,
        "short_side_choices": short_side_choices,
    }
    chosen = [key for key, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ValueError(f"RandomScaleCrop: {' and '.join(chosen)} are given, but only one of them can be.")
    if short_side_choices is not None and base_size is not None:
        raise ValueError("RandomScaleCrop: short_side_choices and base_size both set the scale; give one.")
    if base_size is not None and (isinstance(base_size, int) or len(base_size) != 2 or min(base_size) <= 0):
        raise ValueError(
            f"RandomScaleCrop: base_size is {base_size}, but longer and shorter side above 0 are needed."
        )
    if scale_range is not None and (len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]):
        raise ValueError(
            f"RandomScaleCrop: scale_range is {tuple(scale_range)}, but lowest and highest are needed."
        )
    for key in ("scale_choices", "short_side_choices"):
        choices = given[key]
        if choices is not None and (not choices or min(choices) <= 0):
            raise ValueError(f"RandomScaleCrop: {key} is {tuple(choices)}, but values above 0 are needed.")
