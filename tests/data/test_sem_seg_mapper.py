"""From files to tensors, and what is said about bad ones."""

import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng

from ccnet_d2.data import DatasetError, SampleError, SemSegMapper, register_sem_seg_folder
from ccnet_d2.data.sem_seg_mapper import LabelMap
from ccnet_d2.data.transforms import RandomPhotometricDistortion, RandomScaleCrop, ResizeByScale

RNG = np.random.default_rng(0)


def _sample(pair: tuple[str, str], **more) -> dict:
    return {"file_name": pair[0], "sem_seg_file_name": pair[1], "image_id": "x", **more}


def test_training_sample(write_pair: Callable) -> None:
    label = RNG.integers(0, 6, (20, 30), dtype=np.uint8)
    image = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    sample = _sample(write_pair("a", label, image))
    kept = dict(sample)
    mapped = SemSegMapper(True, augmentations=[], num_classes=5, ignore_label=5)(sample)
    assert sample == kept, "the data set's own dict was changed"
    assert mapped["image"].dtype == torch.uint8 and mapped["sem_seg"].dtype == torch.int64
    np.testing.assert_array_equal(mapped["image"].numpy(), image.transpose(2, 0, 1))
    np.testing.assert_array_equal(mapped["sem_seg"].numpy(), np.where(label == 5, 255, label))
    assert (mapped["height"], mapped["width"]) == (20, 30)
    assert mapped["file_name"] == sample["file_name"] and mapped["image_id"] == "x"
    bgr = SemSegMapper(True, augmentations=[], num_classes=6, image_format="BGR")(sample)
    np.testing.assert_array_equal(bgr["image"].numpy(), image.transpose(2, 0, 1)[::-1])


def test_test_sample_keeps_the_original_size_and_reads_no_label(write_pair: Callable, tmp_path: Path) -> None:
    pair = write_pair("a", np.zeros((20, 30), np.uint8))
    Path(pair[1]).unlink()
    mapped = SemSegMapper(False, augmentations=[ResizeByScale(0.5)])(_sample(pair))
    assert mapped["image"].shape == (3, 10, 15) and (mapped["height"], mapped["width"]) == (20, 30)
    assert "sem_seg" not in mapped and "sem_seg_file_name" not in mapped


def test_augmentations_in_order_with_detectron2s_own(write_pair: Callable) -> None:
    label = np.arange(6, dtype=np.uint8).reshape(1, 6).repeat(4, 0)
    mapper = SemSegMapper(True, augmentations=[T.RandomFlip(1.0), T.CropTransform(0, 0, 2, 3)], num_classes=6)
    mapped = mapper(_sample(write_pair("a", label)))
    assert mapped["sem_seg"].tolist() == [[5, 4]] * 3
    assert mapped["image"].shape == (3, 3, 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_images_of_one_pixel_a_side(write_pair: Callable, size: tuple[int, int]) -> None:
    """That of a single pixel, mirrored, was a ValueError of torch's."""
    label = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    pair = write_pair("a", label, np.repeat(30 * label[..., None], 3, axis=2))
    for augmentation, expected in (
        (T.RandomFlip(1.0), label[:, ::-1]),
        (ResizeByScale(2.0), label.repeat(2, axis=0).repeat(2, axis=1)),
        (RandomScaleCrop((7, 7)), np.pad(label, ((0, 7 - size[0]), (0, 7 - size[1])), constant_values=255)),
    ):
        mapper = SemSegMapper(True, augmentations=[augmentation], num_classes=7, flip_pairs=[])
        mapped = mapper(_sample(pair))
        assert mapped["sem_seg"].tolist() == expected.tolist()
        assert mapped["image"].shape == (3, *expected.shape)
        if not isinstance(augmentation, ResizeByScale):  # which mixes neighbours
            shown = mapped["sem_seg"] != 255
            assert (mapped["image"][:, shown] == 30 * mapped["sem_seg"][shown]).all()


@pytest.mark.parametrize(
    "augmentation",
    [
        T.FixedSizeCrop((32, 36), pad_value=0.0),
        T.RandomRotation([30, 30]),
        T.RandomExtent((1.5, 1.5), (0, 0)),
        T.PadTransform(2, 3, 4, 5),
        RandomScaleCrop((32, 36), pad_value=(0, 0, 0)),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_what_augmentations_show_beside_the_image_is_void(write_pair: Callable, augmentation) -> None:
    """Detectron2's fill label maps with 0 there, the first class; the image is black where there is none."""
    pair = write_pair("a", np.full((20, 30), 3, np.uint8), np.full((20, 30, 3), 200, np.uint8))
    mapped = SemSegMapper(True, augmentations=[augmentation, T.RandomFlip(1.0)], num_classes=5)(_sample(pair))
    shown, beside = (mapped["image"] == 200).all(0), (mapped["image"] == 0).all(0)
    assert shown.any() and beside.any()
    assert (mapped["sem_seg"][shown] == 3).all() and (mapped["sem_seg"][beside] == 255).all()
    assert set(mapped["sem_seg"].unique().tolist()) == {3, 255}


def test_a_label_to_pad_with_that_is_asked_for_stays(write_pair: Callable) -> None:
    pair = write_pair("a", np.full((20, 30), 3, np.uint8))
    crop = RandomScaleCrop((32, 36), label_pad_value=0)
    labels = SemSegMapper(True, augmentations=[crop, T.PadTransform(0, 0, 4, 0)], num_classes=5)(
        _sample(pair)
    )
    assert labels["sem_seg"].unique(return_counts=True)[1].tolist() == [32 * 36 - 600, 600, 32 * 4]


def test_float_images_of_other_augmentations_pass(write_pair: Callable) -> None:
    mapper = SemSegMapper(True, augmentations=[T.BlendTransform(0, 0.5, 0.5)], num_classes=6)
    image = mapper(_sample(write_pair("a", np.zeros((4, 6), np.uint8))))["image"]
    assert image.dtype in (torch.uint8, torch.float32)


def test_classes_come_from_the_registered_sets(write_pair: Callable, tmp_path: Path) -> None:
    write_pair("a", np.zeros((4, 6), np.uint8))
    for name in ("one", "two"):
        register_sem_seg_folder(name, tmp_path / "images", tmp_path / "labels", ["a", "b"], ignore_label=9)
    mapper = SemSegMapper(True, augmentations=[], dataset_names=["one", "two"])
    assert (mapper.label_map.num_classes, mapper.label_map.ignore_label) == (2, 9)
    told = SemSegMapper(
        True, augmentations=[], dataset_names="one", num_classes=2, ignore_label=7, flip_pairs=[(0, 1)]
    )
    assert (told.label_map.num_classes, told.label_map.ignore_label) == (2, 7)
    assert mapper.flip_pairs == () and told.flip_pairs == ((0, 1),)
    with pytest.raises(DatasetError, match="num_classes is 3, but the data set has 2"):
        SemSegMapper(True, augmentations=[], dataset_names="one", num_classes=3)
    with pytest.raises(DatasetError, match="no data set 'three'"):
        SemSegMapper(True, augmentations=[], dataset_names="three")
    with pytest.raises(DatasetError, match="needs dataset_names or num_classes"):
        SemSegMapper(True, augmentations=[])
    with pytest.raises(DatasetError, match="image_format is 'L'"):
        SemSegMapper(False, augmentations=[], image_format="L")
    with pytest.raises(DatasetError, match="num_classes is 256"):
        SemSegMapper(True, augmentations=[], num_classes=256)


@pytest.mark.parametrize(("num_classes", "ignore_label"), [(1, 1), (3, 3), (3, -1), (3, 254), (255, 255)])
def test_every_value_that_is_not_a_class_can_be_void(num_classes: int, ignore_label: int) -> None:
    label_map = LabelMap(num_classes, ignore_label)
    label = np.array([[0, num_classes - 1, ignore_label]], np.int16)
    np.testing.assert_array_equal(label_map(label, "x.png"), [[0, num_classes - 1, 255]])
    if ignore_label >= 0:
        np.testing.assert_array_equal(label_map(label.astype(np.uint8), "x.png"), [[0, num_classes - 1, 255]])
    for number, word in ((0, "num_classes is 0"), (256, "num_classes is 256")):
        with pytest.raises(DatasetError, match=word):
            LabelMap(number)
    for class_index in (0, num_classes - 1):
        with pytest.raises(
            DatasetError, match=f"ignore_label {class_index} is one of the {num_classes} classes"
        ):
            LabelMap(num_classes, class_index)


def test_values_below_0_are_no_classes() -> None:
    label = np.array([[-2, 0], [2, 3]], np.int16)
    assert LabelMap(3).bad_values(label) == [-2, 3] and LabelMap(3, ignore_label=-2).bad_values(label) == [3]


def _error(sample: dict, **kwargs) -> SampleError:
    with pytest.raises(SampleError) as error:
        SemSegMapper(True, augmentations=[], **{"num_classes": 3, **kwargs})(sample)
    assert "\n" not in str(error.value)
    assert type(pickle.loads(pickle.dumps(error.value))) is SampleError
    assert pickle.loads(pickle.dumps(error.value)).path == error.value.path
    return error.value


def test_label_values_outside_the_classes(write_pair: Callable) -> None:
    label = np.zeros((4, 6), np.uint8)
    label[2, 3] = 17
    image_path, label_path = pair = write_pair("a", label)
    error = _error(_sample(pair))
    assert error.path == label_path
    assert str(error) == (
        f"The label map '{label_path}' holds the value 17, but classes are 0 to 2 and void is 255."
    )
    label[0, 0] = 3
    assert "holds the value 3 (and 1 other such values)" in str(_error(_sample(write_pair("a", label))))
    # 255 is an ordinary bad value where void is something else.
    label[:] = 255
    assert "holds the value 255" in str(_error(_sample(write_pair("a", label)), ignore_label=11))
    assert image_path != label_path


@pytest.mark.parametrize("ignore_label", [255, 65535, 256, 300])
def test_deep_labels(write_pair: Callable, ignore_label: int) -> None:
    label = np.array([[0, 1, 2, ignore_label]], np.uint16)
    sample = _sample(write_pair("a", label))
    mapped = SemSegMapper(True, augmentations=[], num_classes=3, ignore_label=ignore_label)(sample)
    assert mapped["sem_seg"].tolist() == [[0, 1, 2, 255]]
    label[0, 0] = 400
    assert "holds the value 400" in str(_error(_sample(write_pair("a", label)), ignore_label=ignore_label))


def test_sizes_that_do_not_fit(write_pair: Callable) -> None:
    pair = write_pair("a", np.zeros((4, 6), np.uint8), np.zeros((5, 6, 3), np.uint8))
    error = _error(_sample(pair))
    assert str(error) == f"The label map '{pair[1]}' is 6x4, but its image '{pair[0]}' is 6x5."
    assert error.path == pair[1]
    pair = write_pair("a", np.zeros((4, 6), np.uint8))
    error = _error(_sample(pair, height=8, width=6))
    assert str(error) == f"The image '{pair[0]}' is 6x4, but the data set says 6x8." and error.path == pair[0]


def test_damaged_and_missing_files(write_pair: Callable) -> None:
    for kind, index in (("image", 0), ("label map", 1)):
        pair = write_pair("a", RNG.integers(0, 3, (40, 60), dtype=np.uint8))
        path = Path(pair[index])
        path.write_bytes(path.read_bytes()[:-20])
        error = _error(_sample(pair))
        assert str(error).startswith(f"The {kind} '{path}' is truncated") and error.path == str(path)
        path.unlink()
        assert f"The {kind} '{path}' cannot be read" in str(_error(_sample(pair)))
    error = _error({"file_name": write_pair("a", np.zeros((4, 6), np.uint8))[0]})
    assert "without a label map" in str(error)


@pytest.mark.parametrize("name", ["a", "l'été à la plage, d'abord"])
def test_errors_keep_sentence_and_path_through_loader_workers(write_pair: Callable, name: str) -> None:
    pair = write_pair(name, np.full((40, 60), 200, np.uint8))
    loader = build_detection_train_loader(
        [_sample(pair)],
        mapper=SemSegMapper(True, augmentations=[], num_classes=3),
        total_batch_size=1,
        aspect_ratio_grouping=False,
        num_workers=1,
    )
    with pytest.raises(SampleError) as error:
        next(iter(loader))
    assert str(error.value) == str(_error(_sample(pair)))
    assert error.value.path == pair[1]


class ForLargeImages(T.Augmentation):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def get_transform(self, image: np.ndarray) -> T.Transform:
        raise self.error


def test_images_that_an_augmentation_does_not_suit_are_named_and_may_be_skipped(write_pair: Callable) -> None:
    sample = _sample(write_pair("a", np.zeros((20, 30), np.uint8)))
    for error in (ValueError("too small.\nvery"), cv2.error("too small")):
        message = f"^The image '{sample['file_name']}', 30x20, cannot be augmented by .*ForLargeImages.*: too small\\.$"
        with pytest.raises(SampleError, match=message) as told:
            SemSegMapper(True, augmentations=[T.NoOpTransform(), ForLargeImages(error)], num_classes=1)(
                sample
            )
        assert told.value.path == sample["file_name"] and told.value.__cause__ is error
    own = SampleError("'b.png' is said otherwise.", "b.png")
    with pytest.raises(SampleError, match=r"^'b\.png' is said otherwise"):
        SemSegMapper(True, augmentations=[ForLargeImages(own)], num_classes=1)(sample)


def test_wrong_values_of_an_augmentation_are_no_fault_of_the_image(write_pair: Callable) -> None:
    """Detectron2's take anything and fail with the first image; skipping would go through the whole set."""
    sample = _sample(write_pair("a", np.zeros((20, 30), np.uint8)))
    for prob, reason in (("abc", "ufunc 'less'.*"), (None, "'<' not supported between .*")):
        message = rf"^The image '.*', 30x20, cannot be augmented by RandomFlip\(prob={prob!r}\): {reason}\.$"
        for is_train in (True, False):
            with pytest.raises(DatasetError, match=message) as told:
                SemSegMapper(is_train, augmentations=[T.RandomFlip(prob)], num_classes=1)(sample)
            assert not isinstance(told.value, SampleError)
    with pytest.raises(DatasetError, match=r"ForLargeImages.*: AssertionError\.$"):
        SemSegMapper(True, augmentations=[ForLargeImages(AssertionError())], num_classes=1)(sample)
    with pytest.raises(MemoryError):
        SemSegMapper(True, augmentations=[ForLargeImages(MemoryError())], num_classes=1)(sample)


def _batches(samples: list[dict], workers: int, seed: int, count: int = 4) -> list[dict]:
    seed_all_rng(seed)
    loader = build_detection_train_loader(
        samples,
        mapper=SemSegMapper(
            True,
            augmentations=[
                RandomScaleCrop((16, 24), scale_range=(0.5, 2.0), category_max_ratio=0.75),
                T.RandomFlip(),
                RandomPhotometricDistortion(),
            ],
            num_classes=3,
        ),
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=workers,
    )
    batches = iter(loader)
    return [sample for _ in range(count) for sample in next(batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_decides_everything(write_pair: Callable, workers: int) -> None:
    samples = [
        _sample(write_pair(name * 3, RNG.integers(0, 3, (20, 30), dtype=np.uint8))) for name in "abcdef"
    ]
    first, again, other = (_batches(samples, workers, seed) for seed in (7, 7, 8))
    for one, two in zip(first, again, strict=True):
        assert one["file_name"] == two["file_name"]
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["sem_seg"], two["sem_seg"])
    assert any(not torch.equal(one["image"], two["image"]) for one, two in zip(first, other, strict=True))


def test_workers_do_not_repeat_each_other(write_pair: Callable) -> None:
    """One image only: if two workers drew the same numbers, their crops would be the same."""
    image = RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    sample = _sample(write_pair("a", np.zeros((60, 90), np.uint8), image))
    crops = _batches([sample] * 4, workers=2, seed=0, count=6)
    assert len({crop["image"].numpy().tobytes() for crop in crops}) == len(crops)


def test_test_loader_sees_every_image_once_in_order(write_pair: Callable) -> None:
    samples = [_sample(write_pair(name, np.zeros((8, 9), np.uint8))) for name in "abcde"]
    loader = build_detection_test_loader(samples, mapper=SemSegMapper(False, augmentations=[]), num_workers=2)
    assert [batch[0]["file_name"] for batch in loader] == [sample["file_name"] for sample in samples]
