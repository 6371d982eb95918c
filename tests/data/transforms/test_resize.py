"""Resizing of whole images and label maps."""

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import ResizeByScale, ResizeLinearTransform, ResizeTo, ResizeToFit
from ccnet_d2.data.transforms.resize import height_and_width, nearest_index

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("size", "new_size"), [(10, 15), (10, 5), (7, 3), (1, 9), (97, 201), (64, 64)])
def test_nearest_index_is_the_pixel_under_the_centre(size: int, new_size: int) -> None:
    edges = np.arange(size + 1)
    for x, found in enumerate(nearest_index(0, new_size, size, new_size)):
        centre = (2 * x + 1) * size  # in halves of 1 / new_size pixels, to stay exact
        assert 2 * new_size * edges[found] <= centre <= 2 * new_size * edges[found + 1]


def test_image_is_opencvs_and_labels_are_nearest() -> None:
    image = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    label = RNG.integers(0, 9, (20, 30), dtype=np.uint8)
    transform = ResizeLinearTransform(20, 30, 40, 90)
    np.testing.assert_array_equal(transform.apply_image(image), cv2.resize(image, (90, 40)))
    np.testing.assert_array_equal(
        transform.apply_segmentation(label), np.repeat(np.repeat(label, 2, 0), 3, 1)
    )
    np.testing.assert_array_equal(
        transform.inverse().apply_segmentation(np.repeat(np.repeat(label, 2, 0), 3, 1)), label
    )
    np.testing.assert_allclose(transform.apply_coords(np.array([[30.0, 10.0]])), [[90, 20]])


@pytest.mark.parametrize(
    ("augmentation", "size", "expected"),
    [
        (ResizeByScale(0.5), (360, 480), (180, 240)),
        (ResizeByScale(0.5), (361, 1), (181, 1)),
        (ResizeByScale(1.0), (36, 48), (36, 48)),
        (ResizeByScale(0.3), (48, 15), (14, 5)),  # 14.4 and 4.5
        (ResizeByScale(0.3), (15, 48), (5, 14)),
        (ResizeByScale(0.1), (3, 17), (1, 2)),  # 0.3 and 1.7
        (ResizeByScale(0.1), (11, 4), (1, 1)),
        (ResizeToFit(2048, 512), (333, 500), (512, 769)),
        (ResizeToFit(2048, 512), (500, 333), (769, 512)),
        (ResizeToFit(2048, 512), (100, 1000), (205, 2048)),
        (ResizeToFit(60, 60), (100, 120), (50, 60)),
        (ResizeToFit(1, 1), (3, 3), (1, 1)),
        (ResizeTo(1, 1), (3, 3), (1, 1)),
    ],
)
def test_sizes(augmentation: T.Augmentation, size: tuple[int, int], expected: tuple[int, int]) -> None:
    augmented = T.AugInput(np.zeros((*size, 3), np.uint8), sem_seg=np.zeros(size, np.uint8))
    augmentation(augmented)
    assert augmented.image.shape[:2] == augmented.sem_seg.shape == expected


@pytest.mark.parametrize(
    ("size", "sides"), [(1, (1, 1)), (9.0, (9, 9)), ([1, 2], (1, 2)), ((3, 1.0), (3, 1))]
)
def test_a_size_is_a_side_or_two(size, sides: tuple[int, int]) -> None:
    found = height_and_width(size, "crop_size")
    assert found == sides and all(type(side) is int for side in found)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="scale is 0"):
        ResizeByScale(0)
    with pytest.raises(ValueError, match="short_side=600 has to be"):
        ResizeToFit(512, 600)
    with pytest.raises(ValueError, match="short_side=0 has to be"):
        ResizeToFit(512, 0)
    for size in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"ResizeTo: {size[0]}x{size[1]} has to be at least 1x1"):
            ResizeTo(*size)
