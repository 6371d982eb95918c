"""Photometric distortion against a per-pixel version with the standard library's colour conversion."""

import colorsys

import numpy as np
import pytest
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import PhotometricTransform, RandomPhotometricDistortion

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255)


def _by_hand(
    image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: int, contrast_last: bool
) -> np.ndarray:
    image = _clip(image.astype(float) + brightness)
    if not contrast_last:
        image = _clip(image * contrast)
    out = np.empty_like(image)
    for index in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[index] / 255))
        rgb = colorsys.hsv_to_rgb((h + hue / 180) % 1, min(s * saturation, 1), v)
        out[index] = np.rint(np.array(rgb) * 255)
    return _clip(out * contrast) if contrast_last else out


@pytest.mark.parametrize(
    "changes",
    [
        {"brightness": 20.4},
        {"brightness": -31.0},
        {"contrast": 1.4},
        {"contrast": 0.5, "contrast_last": True},
        {"saturation": 1.5},
        {"hue": -18},
        {"brightness": 12.0, "contrast": 0.8, "saturation": 0.6, "hue": 11, "contrast_last": True},
        {"brightness": -12.0, "contrast": 1.3, "saturation": 0.9, "hue": 5},
    ],
)
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_against_per_pixel_version(changes: dict, order: str) -> None:
    image = IMAGE if order == "RGB" else np.ascontiguousarray(IMAGE[..., ::-1])
    options = {} if order == "RGB" else {"image_format": order}
    found = PhotometricTransform(**changes, **options).apply_image(image)
    found = found if order == "RGB" else found[..., ::-1]
    full = {
        "brightness": 0.0,
        "contrast": 1.0,
        "saturation": 1.0,
        "hue": 0,
        "contrast_last": False,
        **changes,
    }
    expected = _by_hand(IMAGE, **full)
    difference = np.abs(found.astype(float) - expected)
    if "saturation" in changes or "hue" in changes:
        # OpenCV's 8-bit hue has steps of two degrees, up to 255 / 60 grey levels, twice.
        assert difference.max() <= 10 and difference.mean() < 2
    else:
        assert difference.max() == 0


def test_identity_returns_the_image() -> None:
    np.testing.assert_array_equal(PhotometricTransform().apply_image(IMAGE), IMAGE)


def test_flipped_view_is_taken() -> None:
    flipped = IMAGE[:, ::-1]
    transform = PhotometricTransform(10.0, 1.2, 0.8, 7)
    np.testing.assert_array_equal(transform.apply_image(flipped), transform.apply_image(flipped.copy()))


def test_labels_points_and_shape_stay() -> None:
    np.random.seed(0)
    label = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
    for _ in range(10):
        augmented = T.AugInput(IMAGE.copy(), sem_seg=label.copy())
        transform = RandomPhotometricDistortion()(augmented)
        assert augmented.image.shape == IMAGE.shape and augmented.image.dtype == np.uint8
        np.testing.assert_array_equal(augmented.sem_seg, label)
        np.testing.assert_array_equal(transform.apply_coords(np.ones((2, 2))), np.ones((2, 2)))


def test_each_change_comes_half_of_the_time_within_its_range() -> None:
    np.random.seed(0)
    drawn = [RandomPhotometricDistortion().get_transform(IMAGE) for _ in range(2000)]
    for name, neutral, low, high in (
        ("brightness", 0, -32, 32),
        ("contrast", 1, 0.5, 1.5),
        ("saturation", 1, 0.5, 1.5),
        ("hue", 0, -18, 18),
    ):
        values = np.array([getattr(transform, name) for transform in drawn])
        changed = values[values != neutral]
        assert 0.43 < len(changed) / len(values) < 0.57, name
        assert low <= values.min() < low + 0.05 * (high - low) and high >= values.max() > high - 0.05 * (
            high - low
        )
    assert 0.45 < np.mean([transform.contrast_last for transform in drawn]) < 0.55


def test_ranges_are_those_given() -> None:
    np.random.seed(0)
    augmentation = RandomPhotometricDistortion(5, (2.0, 3.0), (0.1, 0.2), 2)
    drawn = [augmentation.get_transform(IMAGE) for _ in range(500)]
    for name, neutral, low, high in (
        ("brightness", 0, -5, 5),
        ("contrast", 1, 2, 3),
        ("saturation", 1, 0.1, 0.2),
        ("hue", 0, -2, 2),
    ):
        changed = [getattr(one, name) for one in drawn if getattr(one, name) != neutral]
        margin = 0.05 * (high - low)
        assert low <= min(changed) < low + margin and high - margin < max(changed) <= high, name


@pytest.mark.parametrize("hue", [7, 90])
def test_the_hue_is_a_circle(hue: int) -> None:
    found = [PhotometricTransform(hue=steps).apply_image(IMAGE) for steps in (hue, hue - 180)]
    np.testing.assert_array_equal(*found)


def test_every_hue_is_drawn_and_the_order_of_the_channels_does_not_matter() -> None:
    rgb, bgr = (RandomPhotometricDistortion(image_format=order) for order in ("RGB", "BGR"))
    hues = set()
    for seed in range(1000):
        np.random.seed(seed)
        transform = rgb.get_transform(IMAGE)
        hues.add(transform.hue)
        if seed < 20:
            np.random.seed(seed)
            mirrored = bgr.get_transform(IMAGE).apply_image(np.ascontiguousarray(IMAGE[..., ::-1]))
            np.testing.assert_array_equal(transform.apply_image(IMAGE), mirrored[..., ::-1])
    assert hues == set(range(-18, 19))


def test_other_arrays_are_refused() -> None:
    for image in (IMAGE.astype(np.float32), IMAGE[..., 0], IMAGE[..., :2], np.dstack([IMAGE, IMAGE])):
        with pytest.raises(ValueError, match="needs \\(H, W, 3\\) uint8"):
            PhotometricTransform(1.0).apply_image(image)
    with pytest.raises(ValueError, match="image_format is 'L'"):
        RandomPhotometricDistortion(image_format="L")
