"""A mirrored picture of a person whose left and right parts have changed names goes through everything unchanged.

Tried on a figure made by hand that has every left/right pair of LIP and is its own mirror image, and on random ones.
"""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng

from ccnet_d2.data import DatasetError, SemSegMapper, register_sem_seg_folder
from ccnet_d2.data.catalog import flip_pairs_of
from ccnet_d2.data.datasets.lip import LIP_CLASSES, LIP_FLIP_PAIRS, register_lip
from ccnet_d2.data.transforms import (
    RandomPhotometricDistortion,
    RandomRotateFit,
    RandomScaleCrop,
    ResizeTo,
    RotateFitTransform,
    ScaleCropTransform,
    is_mirroring,
    swap_labels,
)
from ccnet_d2.engine import build_model
from ccnet_d2.inference import MultiScaleFlip, SlidingWindow, WholeImage, build_mode
from ccnet_d2.losses import edge_labels
from ccnet_d2.model_zoo import get_config

# From the front: the person's left (small letters) is on the right.
FIGURE = """
................
......hhhh......
......ffff......
..AA.uuuuuu.aa..
..AA.uuuuuu.aa..
...A.uuuuuu.a...
.....pppppp.....
.....LL..ll.....
.....LL..ll.....
....SSS..sss....
................
""".split()
VALUES = {
    **{".": 0, "h": 2, "f": 13, "u": 5, "p": 9},
    **{"a": 14, "A": 15, "l": 16, "L": 17, "s": 18, "S": 19},
}
PERSON = np.array([[VALUES[letter] for letter in row] for row in FIGURE], np.uint8)
EVERY_PART = {14, 15, 16, 17, 18, 19}


def person_image() -> np.ndarray:
    """Its picture, (H, W, 3): a colour for each class, the same for left and right."""
    colors = np.random.default_rng(0).integers(0, 256, (20, 3), dtype=np.uint8)
    colors[[15, 17, 19]] = colors[[14, 16, 18]]
    return colors[PERSON]


def swapped(labels: np.ndarray) -> np.ndarray:
    """Left and right parts exchanged, by a table written down here."""
    table = np.arange(256)
    table[14:20] = [15, 14, 17, 16, 19, 18]
    return table[labels].astype(labels.dtype)


def mirrored(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[:, ::-1])


@pytest.fixture
def lip(tmp_path):
    """A function that writes one training sample in LIP's layout; gives its record."""
    register_lip(tmp_path / "LIP", "mirror_lip")

    def write(image: np.ndarray, labels: np.ndarray) -> dict:
        paths = []
        for folder, array in (("train_images", image[:, :, ::-1]), ("train_segmentations", labels)):
            paths.append(tmp_path / "LIP" / folder / f"{len(list(tmp_path.rglob('*.png')))}.png")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(paths[-1]), array)
        return {"file_name": str(paths[0]), "sem_seg_file_name": str(paths[1])}

    return write


def mapped(record: dict, *augmentations, **options) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and labels (H, W) as a network gets them."""
    mapper = SemSegMapper(
        True, augmentations=augmentations, **{"dataset_names": "mirror_lip_train", **options}
    )
    sample = mapper(record)
    return sample["image"].numpy().transpose(1, 2, 0), sample["sem_seg"].numpy()


def test_the_figure_is_its_own_mirror_image():
    assert EVERY_PART == set(np.unique(PERSON)) & EVERY_PART
    assert np.array_equal(mirrored(swapped(PERSON)), PERSON)
    assert np.array_equal(mirrored(person_image()), person_image())
    changed = mirrored(PERSON) != PERSON
    assert set(PERSON[changed]) == EVERY_PART


def test_it_is_a_fixed_point_of_the_mapper_and_of_the_edges(lip):
    record = lip(person_image(), PERSON)
    image, labels = mapped(record)
    flipped_image, flipped_labels = mapped(record, T.RandomFlip(1.0))
    np.testing.assert_array_equal(labels, PERSON)
    np.testing.assert_array_equal(flipped_image, image)
    np.testing.assert_array_equal(flipped_labels, labels)
    edges, flipped_edges = (edge_labels(torch.from_numpy(x)[None]) for x in (labels, flipped_labels))
    assert torch.equal(flipped_edges, edges) and torch.equal(edges.flip(-1), edges)
    assert 0 < edges.sum() < edges.numel()
    # Without the pairs every left and right part would be wrong.
    _, wrong = mapped(record, T.RandomFlip(1.0), dataset_names=None, num_classes=20)
    assert set(labels[wrong != labels]) == EVERY_PART


def test_a_mirrored_file_flipped_is_the_file(lip):
    rng = np.random.default_rng(1)
    image, labels = rng.integers(0, 256, (20, 30, 3), np.uint8), rng.choice([*range(20), 255], (20, 30))
    there = mapped(lip(image, labels.astype(np.uint8)))
    back = mapped(lip(mirrored(image), mirrored(swapped(labels)).astype(np.uint8)), T.RandomFlip(1.0))
    for one, other in zip(there, back, strict=True):
        np.testing.assert_array_equal(one, other)
    edges = [edge_labels(torch.from_numpy(x[1])[None]) for x in (there, back)]
    assert torch.equal(*edges)


MIRRORS = [
    (True, [T.HFlipTransform(30)]),
    (True, [T.VFlipTransform(20)]),
    (False, [T.HFlipTransform(30), T.VFlipTransform(20)]),  # half a turn
    (False, [T.RotationTransform(20, 30, 180)]),
    (False, [T.RotationTransform(20, 30, 77)]),
    (False, [T.NoOpTransform()]),
    (True, [T.ResizeTransform(20, 30, 40, 45), T.HFlipTransform(45), T.CropTransform(3, 4, 20, 20)]),
    (True, [ScaleCropTransform(20, 30, 40, 60, 3, 7, 25, 25), T.HFlipTransform(25)]),
    (True, [T.HFlipTransform(30), RotateFitTransform(20, 30, 24, 24, 0.7, 50)]),
    (False, [RotateFitTransform(20, 30, 24, 24, 0.7, -130)]),
    (False, [T.HFlipTransform(30), T.BlendTransform(0.0, 0.5, 0.5), T.HFlipTransform(30)]),
]


@pytest.mark.parametrize(("mirrors", "transforms"), MIRRORS)
def test_mirrors_are_seen_in_any_chain(lip, mirrors, transforms):
    assert is_mirroring(T.TransformList(transforms), 20, 30) == mirrors
    # A left leg everywhere stays one, or becomes a right leg.
    record = lip(np.zeros((20, 30, 3), np.uint8), np.full((20, 30), 16, np.uint8))
    _, labels = mapped(record, *transforms)
    assert labels[labels.shape[0] // 2, labels.shape[1] // 2] == (17 if mirrors else 16)


def test_swapping_leaves_all_other_labels_alone():
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(swap_labels(labels, LIP_FLIP_PAIRS), swapped(labels))
    assert labels[0, 14] == 14  # a copy
    assert all(LIP_CLASSES[a].replace("Left", "Right") == LIP_CLASSES[b] for a, b in LIP_FLIP_PAIRS)
    assert {label for pair in LIP_FLIP_PAIRS for label in pair} == {
        i for i, name in enumerate(LIP_CLASSES) if name.startswith(("Left", "Right"))
    }


def test_the_recipes_augmentations_of_mirrored_files(lip):
    """Scale and crop, and rotation: the mirrored file under the mirrored transform is the mirrored sample."""
    rng = np.random.default_rng(2)
    image = cv2.resize(rng.integers(0, 256, (5, 7, 3), np.uint8), (63, 45), interpolation=cv2.INTER_CUBIC)
    labels = np.kron(rng.integers(0, 20, (5, 7)), np.ones((9, 9), int)).astype(np.uint8)
    record, mirror = lip(image, labels), lip(mirrored(image), mirrored(swapped(labels)))
    for there, back in (
        # The crop of 60 columns from the 11th of 126, seen from the other side.
        (
            ScaleCropTransform(45, 63, 90, 126, 5, 11, 70, 60),
            ScaleCropTransform(45, 63, 90, 126, 5, 55, 70, 60),
        ),
        (RotateFitTransform(45, 63, 70, 60, 1.3, 25), RotateFitTransform(45, 63, 70, 60, 1.3, -25)),
    ):
        (one, one_labels), (other, other_labels) = (
            mapped(record, there),
            mapped(mirror, back, T.RandomFlip(1.0)),
        )
        assert np.abs(one.astype(int) - other).max() <= 3  # OpenCV rounds positions to 1/32 of a pixel
        assert (one_labels != other_labels).mean() < 0.002
        assert len(np.unique(one_labels)) > 10


@pytest.mark.parametrize(
    "config", ["lip/ce2p_R_101_D16_473x473_115k.py", "lip/ce2p_ccl_R_101_D16_384x384_48k.py"]
)
def test_training_pipelines_of_the_runs_keep_every_part_on_its_side(lip, config):
    """A person who fills the picture, with a red left and a blue right side: colour tells the label ever after."""
    labels = np.full((200, 160), 15, np.uint8)
    labels[:, 80:] = 14
    image = np.zeros((200, 160, 3), np.uint8)
    image[:, :80, 2] = 255
    image[:, 80:, 0] = 255
    record = lip(image, labels)
    cfg = get_config(config)
    cfg.dataloader.train.dataset.names = "mirror_lip_train"
    cfg.dataloader.train.mapper.augmentations[0].crop_size = [96, 80]
    mapper = instantiate(cfg.dataloader.train.mapper)
    sides = set()
    for seed in range(16):
        seed_all_rng(seed)
        sample = mapper(dict(record))
        red, _, blue = sample["image"].numpy().astype(int)
        seen = sample["sem_seg"].numpy()
        # In the mirror the colours change sides and the names with them: a red arm is then the right one.
        flipped = (seen[red > 250] == 15).any()
        left, right = (15, 14) if flipped else (14, 15)
        assert set(seen[(red > 250) & (seen != 255)]) <= {left}
        assert set(seen[(blue > 250) & (seen != 255)]) <= {right}
        sides.add(bool(flipped))
    assert sides == {False, True}


class LeftOfThePicture(torch.nn.Module):
    """Takes whatever is on the left of the picture for right parts, as a network that knows persons from the front."""

    def forward(self, inputs):
        outputs = []
        for given in inputs:
            sem_seg = torch.zeros(20, given["height"], given["width"])
            half = given["width"] // 2
            for left, right in ((14, 15), (16, 17), (18, 19)):
                sem_seg[right, :, :half] = sem_seg[left, :, half:] = left / 4
            outputs.append({"sem_seg": sem_seg})
        return outputs


@pytest.mark.parametrize("name", ["ms", "ms-slide"])
def test_the_mirror_test_knows_the_pairs_of_the_data_set(name):
    inputs = [{"image": torch.zeros(3, 8, 12), "height": 8, "width": 12}]
    plain = WholeImage(LeftOfThePicture())(inputs)[0]["sem_seg"].softmax(0)
    mode = build_mode(name, scales=[1.0])
    bound = mode.bind(LeftOfThePicture(), "lip_sem_seg_val")
    assert bound.flip_pairs == LIP_FLIP_PAIRS and mode.flip_pairs is None
    torch.testing.assert_close(bound(inputs)[0]["sem_seg"].softmax(0), plain)
    unaware = mode.bind(LeftOfThePicture(), "camvid_sem_seg_val")
    assert unaware.flip_pairs == ()
    assert (unaware(inputs)[0]["sem_seg"].softmax(0) - plain).abs().max() > 0.1
    # Nested the other way round, and pairs of one's own.
    nested = SlidingWindow(MultiScaleFlip(scales=[1.0]), tile=8).bind(LeftOfThePicture(), ["lip_sem_seg_val"])
    assert nested.model.flip_pairs == LIP_FLIP_PAIRS
    own = MultiScaleFlip(flip_pairs=[(1, 2)]).bind(LeftOfThePicture(), "lip_sem_seg_val")
    assert own.flip_pairs == ((1, 2),)


def test_the_figure_is_a_fixed_point_of_the_mirror_test_with_ce2p():
    """Any weights: the mean over a picture and its mirror image, answers swapped back, cannot favour a side."""
    torch.manual_seed(0)
    cfg = get_config("quick_schedules/ce2p_ccl_R_18_lip_fixture.py")
    cfg.train.device = "cpu"
    model = build_model(cfg).eval()
    torch.nn.init.normal_(model.sem_seg_head.classifier.weight)
    mode = instantiate(cfg.test.inference).bind(model, cfg.dataloader.test.dataset.names)
    assert mode.flip_pairs == LIP_FLIP_PAIRS
    image = np.kron(person_image(), np.ones((5, 5, 1), np.uint8))
    inputs = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "height": 55, "width": 80}
    answer = mode([inputs])[0]["sem_seg"].numpy()
    order = swapped(np.arange(20))
    np.testing.assert_allclose(answer[order][:, :, ::-1], answer, atol=1e-4)
    alone = model([inputs])[0]["sem_seg"].detach().numpy()
    assert np.abs(alone[order][:, :, ::-1] - alone).max() > 0.1


def test_pairs_are_checked(tmp_path):
    for name, pairs in (("pairs_a", [(0, 1)]), ("pairs_b", [(1, 0)]), ("pairs_c", []), ("pairs_d", [(1, 2)])):
        register_sem_seg_folder(name, tmp_path, tmp_path, ["left", "right"])
        MetadataCatalog.get(name).set(flip_pairs=pairs)
    assert flip_pairs_of(["pairs_a", "pairs_b"]) == ((0, 1),)
    assert flip_pairs_of("pairs_c") == () and flip_pairs_of("camvid_sem_seg_train") == ()
    with pytest.raises(
        DatasetError, match="'pairs_a' and 'pairs_c' differ in the classes that a mirror swaps"
    ):
        flip_pairs_of(["pairs_a", "pairs_c"])
    with pytest.raises(DatasetError, match=r"flip_pairs is \[\(1, 2\)\], but pairs of its classes 0 to 1"):
        flip_pairs_of("pairs_d")


@pytest.mark.parametrize(
    "pairs", [5, [0, 1], [[0, 1, 2]], [[0, 3]], [[-1, 0]], [[0, 1], [1, 2]], [[1, 1]], "ab"]
)
def test_pairs_of_a_mapper_are_checked(pairs):
    message = re.escape(
        f"flip_pairs is {pairs}, but pairs of its classes 0 to 2 are needed, each class once at most."
    )
    with pytest.raises(DatasetError, match=f"^{message}$"):
        SemSegMapper(True, augmentations=[], num_classes=3, flip_pairs=pairs)
    if pairs != [[0, 3]]:
        with pytest.raises(DatasetError, match="but pairs of its classes are needed"):
            SemSegMapper(False, augmentations=[], flip_pairs=pairs)


def test_other_augmentations_work_with_pairs(lip, tmp_path: Path):
    record = lip(person_image(), PERSON)
    for augmentations in (
        [RandomScaleCrop(12, scale_range=(0.5, 2.0)), T.RandomFlip(), RandomPhotometricDistortion()],
        [RandomRotateFit(12), T.RandomApply(T.RandomFlip(1.0), 0.5), T.RandomBrightness(0.5, 1.5)],
        [T.RandomRotation(30), T.RandomExtent((0.8, 1.2), (0.1, 0.1)), T.RandomFlip(), ResizeTo(9, 9)],
    ):
        image, labels = mapped(record, *augmentations)
        assert image.shape[:2] == labels.shape
