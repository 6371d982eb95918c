"""Rotation and fit: where pixels go, against SciPy and against points; what the random one draws."""

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng
from scipy import ndimage

from ccnet_d2.data.transforms import RandomRotateFit, ResizeTo, RotateFitTransform


def smooth_image(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def test_the_frame_itself_is_left_alone():
    image, labels = smooth_image(20, 32), np.arange(640, dtype=np.uint16).reshape(20, 32)
    same = RotateFitTransform(20, 32, 20, 32, 1.0)
    np.testing.assert_array_equal(same.apply_image(image), image)
    np.testing.assert_array_equal(same.apply_segmentation(labels), labels)
    half_turn = RotateFitTransform(20, 32, 20, 32, 1.0, 180)
    np.testing.assert_array_equal(half_turn.apply_image(image), image[::-1, ::-1])
    np.testing.assert_array_equal(half_turn.apply_segmentation(labels), labels[::-1, ::-1])
    # Counter-clockwise, as Detectron2's.
    quarter = RotateFitTransform(20, 32, 32, 20, 1.0, 90)
    np.testing.assert_array_equal(quarter.apply_segmentation(labels), np.rot90(labels))
    theirs = T.RotationTransform(20, 32, 90)
    np.testing.assert_array_equal(theirs.apply_segmentation(labels), quarter.apply_segmentation(labels))


@pytest.mark.parametrize(("scale", "angle"), [(1.7, 0.0), (0.6, 0.0), (1.0, 33.0), (1.3, -100.0)])
def test_against_scipy(scale, angle):
    image = smooth_image(40, 60).astype(np.float32)
    labels = np.kron(np.random.default_rng(1).integers(0, 20, (8, 12)), np.ones((5, 5), int)).astype(np.uint8)
    transform = RotateFitTransform(40, 60, 48, 44, scale, angle, pad_value=(7.0, 8.0, 9.0))
    radians = np.deg2rad(angle)
    # Rows and columns of the input for those of the output: turned clockwise (y points down) and shrunk.
    inverse = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]]) / scale
    offset = np.array([19.5, 29.5]) - inverse @ np.array([23.5, 21.5])
    arguments = {"matrix": inverse, "offset": offset, "output_shape": (48, 44)}
    ours = transform.apply_image(image)
    inside = ndimage.affine_transform(np.ones((40, 60)), order=1, cval=0, **arguments) > 0.999
    framed = {**arguments, "offset": offset + 1}  # with a frame of one pixel, to see what is beyond the image
    outside = ndimage.affine_transform(np.ones((42, 62)), order=1, cval=0, **framed) < 1e-6
    for channel in range(3):
        theirs = ndimage.affine_transform(image[..., channel], order=1, **arguments)
        assert np.abs(ours[..., channel] - theirs)[inside].max() < 4  # positions rounded to 1/32 of a pixel
        assert (ours[..., channel][outside] == 7 + channel).all()
    padded = ndimage.affine_transform(labels, order=0, cval=255, mode="constant", **arguments)
    wrong = (transform.apply_segmentation(labels) != padded) & inside
    assert wrong.mean() < 0.002
    assert (transform.apply_segmentation(labels)[outside] == 255).all()
    assert inside.mean() > 0.3


def test_points_go_where_the_pixels_go():
    labels = np.zeros((50, 70), np.uint8)
    labels[12, 55] = 1
    transform = RotateFitTransform(50, 70, 200, 210, 2.7, 41)
    (x, y) = transform.apply_coords(np.array([[55.5, 12.5]]))[0]
    rows, columns = np.nonzero(transform.apply_segmentation(labels) == 1)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((x, y), abs=0.35)


def test_one_channel_and_wrong_padding():
    gray = smooth_image(20, 20)[..., :1]
    transform = RotateFitTransform(20, 20, 30, 30, 1.0, 10)
    assert transform.apply_image(gray).shape == (30, 30, 1)
    assert transform.apply_image(gray[..., 0]).shape == (30, 30)
    assert (
        RotateFitTransform(20, 20, 30, 30, 1.0, pad_value=(7,)).apply_image(smooth_image(20, 20))[0] == 7
    ).all()
    with pytest.raises(ValueError, match="pad_value has 2 values, but the image has 3 channels"):
        RotateFitTransform(20, 20, 30, 30, 1.0, pad_value=(1, 2)).apply_image(smooth_image(20, 20))


def test_draws_are_those_of_the_recipe():
    seed_all_rng(0)
    augmentation = RandomRotateFit([96, 64])
    image = np.zeros((50, 100, 3), np.uint8)
    drawn = [augmentation.get_transform(image) for _ in range(1000)]
    fit = 64 / 100
    scales = np.array([one.scale for one in drawn]) / fit
    angles = np.array([one.angle for one in drawn])
    assert scales.min() == pytest.approx(1 / 1.25) and scales.max() == pytest.approx(1 / 0.75)
    for end in (scales.min(), scales.max()):  # a normal distribution beyond one deviation: 0.159
        assert 0.1 < (scales == end).mean() < 0.22
    assert 0.35 < (angles == 0).mean() < 0.45
    assert np.abs(angles).max() == pytest.approx(60) and abs(angles.mean()) < 2
    assert np.std(angles[angles != 0]) == pytest.approx(28.4, abs=2)  # of 30, clipped at 60
    never = RandomRotateFit(32, scale_std=0, angle_probability=0).get_transform(image)
    assert (never.scale, never.angle) == (pytest.approx(0.32), 0.0)
    # The whole image is in the frame, centred.
    white = never.apply_image(np.full_like(image, 255))
    rows, columns = np.nonzero(white[..., 0] > 200)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 23, 0, 31)
    assert (white[0] == (124, 116, 104)).all()  # the mean of ImageNet


def test_beyond_the_image_are_the_values_given():
    transform = RandomRotateFit(24, angle_std=0, pad_value=(1, 2, 3), label_pad_value=7).get_transform(
        smooth_image(40, 20)
    )
    assert (transform.apply_image(smooth_image(40, 20))[:, 0] == (1, 2, 3)).all()
    assert (transform.apply_segmentation(np.zeros((40, 20), np.uint8))[:, 0] == 7).all()
    plain = RotateFitTransform(8, 4, 8, 8, 1.0)
    assert not plain.apply_image(np.full((8, 4, 3), 9, np.uint8))[:, 0].any()


def test_as_an_augmentation_of_image_and_labels():
    given = T.AugInput(smooth_image(40, 30), sem_seg=np.full((40, 30), 3, np.uint8))
    T.AugmentationList([RandomRotateFit(24)])(given)
    assert given.image.shape == (24, 24, 3) and set(np.unique(given.sem_seg)) <= {3, 255}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop_size": 0}, "crop_size is 0"),
        ({"crop_size": [1, 2, 3]}, "crop_size is"),
        ({"crop_size": [9, 9.5]}, "crop_size is .* whole pixels"),
        ({"crop_size": 9, "scale_std": 1.0}, "scale_std is 1.0, outside 0 to 0.99"),
        ({"crop_size": 9, "angle_probability": 1.1}, "angle_probability is 1.1, outside 0 to 1"),
        ({"crop_size": 9, "angle_std": -1}, "angle_std is -1"),
        ({"crop_size": 9, "angle_std": 181}, "angle_std is 181, outside 0 to 180"),
    ],
)
def test_wrong_values_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        RandomRotateFit(**options)
    RandomRotateFit(9, scale_std=0.99, angle_std=180, angle_probability=1)  # the most of each


def test_resize_to():
    transform = ResizeTo(33, 21).get_transform(smooth_image(20, 40))
    assert transform.apply_image(smooth_image(20, 40)).shape == (33, 21, 3)
    with pytest.raises(ValueError, match="ResizeTo: 0x5 has to be at least 1x1"):
        ResizeTo(0, 5)


@pytest.mark.parametrize(("size", "scale"), [((80, 30), 20 / 80), ((20, 90), 30 / 90), ((10, 15), 2)])
def test_the_whole_image_fits_whichever_side_is_the_longer(size: tuple[int, int], scale: float) -> None:
    augmentation = RandomRotateFit((20, 30), scale_std=0, angle_probability=0)
    assert augmentation.get_transform(np.zeros((*size, 3), np.uint8)).scale == pytest.approx(scale)
