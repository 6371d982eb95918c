"""LIP in every layout it is found in, and what is said about one that is none."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from ccnet_d2.data import DatasetError, SemSegMapper, get_sem_seg_dataset_dicts, register_all
from ccnet_d2.data.check import check_dataset
from ccnet_d2.data.datasets.lip import LIP_CLASSES, LIP_COLORS, register_lip
from ccnet_d2.inference import ClassTable

NAMES = {"train": ["100034_483681", "10013_190899", "77_471474"], "val": ["100034_00001", "98_1"]}
IMAGES = "TrainVal_images/TrainVal_images"
LABELS = "TrainVal_parsing_annotations/TrainVal_parsing_annotations"


def write(root: Path, images: str = "", labels: str = "", lists: str | None = "") -> None:
    """Gray and colour photographs with label maps of every class, in folders of the names LIP has."""
    for number, (split, names) in enumerate(NAMES.items()):
        for folder in (root / images / f"{split}_images", root / labels / f"{split}_segmentations"):
            folder.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            rng = np.random.default_rng([number, index])
            label = np.kron(rng.permutation(20).reshape(5, 4), np.ones((6, 7), int)).astype(np.uint8)
            image = rng.integers(0, 256, (30, 28, 3)[: 3 - index % 2], np.uint8)
            assert cv2.imwrite(str(root / images / f"{split}_images/{name}.jpg"), image)
            assert cv2.imwrite(str(root / labels / f"{split}_segmentations/{name}.png"), label)
        if lists is not None:
            (root / lists / f"{split}_id.txt").write_text("".join(f"{name}\n" for name in names))


LAYOUTS = {
    "CE2P": {},
    "CE2P without lists": {"lists": None},
    "official": {"labels": "TrainVal_parsing_annotations", "lists": None},
    "official, unpacked into folders": {
        "images": "TrainVal_images",
        "labels": "TrainVal_parsing_annotations",
        "lists": "TrainVal_images",
    },
    "official, folders in folders": {"images": IMAGES, "labels": LABELS, "lists": IMAGES},
    "official labels, CE2P's lists": {"labels": LABELS},
    "lists beside the labels": {"labels": LABELS, "lists": LABELS},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(tmp_path, layout):
    register_all(tmp_path)
    write(tmp_path / "LIP", **LAYOUTS[layout])
    for split, names in NAMES.items():
        records = get_sem_seg_dataset_dicts(f"lip_sem_seg_{split}")
        listed = LAYOUTS[layout].get("lists", "") is not None
        assert [record["image_id"] for record in records] == (names if listed else sorted(names))
        for record in records:
            assert Path(record["file_name"]).stem == Path(record["sem_seg_file_name"]).stem
        sample = SemSegMapper(True, augmentations=[], dataset_names=f"lip_sem_seg_{split}")(records[0])
        assert sample["image"].shape == (3, 30, 28) and set(sample["sem_seg"].unique().tolist()) == {
            *range(20)
        }
        report = check_dataset(f"lip_sem_seg_{split}")
        assert not report.problems and report.samples == len(names)


def test_a_list_chooses_among_the_files(tmp_path):
    register_all(tmp_path)
    write(tmp_path / "LIP")
    (tmp_path / "LIP/train_id.txt").write_text("77_471474\n")
    assert [r["image_id"] for r in get_sem_seg_dataset_dicts("lip_sem_seg_train")] == ["77_471474"]


def test_classes_and_palette():
    assert len(LIP_CLASSES) == len(LIP_COLORS) == len(set(LIP_COLORS)) == 20
    metadata = MetadataCatalog.get("lip_sem_seg_val")
    assert metadata.flip_pairs == ((14, 15), (16, 17), (18, 19))
    assert [LIP_CLASSES[i] for i in (0, 4, 13, 14, 19)] == [
        "Background", "Sunglasses", "Face", "Left-arm", "Right-shoe",
    ]  # fmt: skip
    table = ClassTable.from_metadata(metadata)
    assert table.ignore_label == 255 and table.colors[1].tolist() == [128, 0, 0]


def message(name: str) -> str:
    with pytest.raises(DatasetError) as error:
        get_sem_seg_dataset_dicts(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folders_are_named(tmp_path):
    register_all(tmp_path)
    root = tmp_path / "LIP"
    assert message("lip_sem_seg_train").startswith(
        f"Data set 'lip_sem_seg_train': the folder '{root}' does not exist; put LIP there, or set DETECTRON2_DATASETS"
    )
    root.mkdir()
    (root / ".DS_Store").touch()
    assert "it is empty; unpack" in message("lip_sem_seg_train")
    for folder in "abcde":
        (root / folder).mkdir()
    assert message("lip_sem_seg_val").partition("it holds ")[2].startswith("'a', 'b', 'c', 'd', 'e'; unpack")
    (root / "f").mkdir()
    assert "'d', 'e', …; unpack" in message("lip_sem_seg_val")
    for folder in "abcdef":
        (root / folder).rmdir()
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir()
    assert message("lip_sem_seg_val") == (
        f"Data set 'lip_sem_seg_val': '{root}' has neither 'val_images' nor 'TrainVal_images/val_images', it holds "
        "'JPEGImages', 'SegmentationClass'; unpack the zips of LIP there as projects/CCNet/datasets/README.md shows."
    )
    write(root)
    shutil.rmtree(root / "train_segmentations")
    assert (
        "has neither 'train_segmentations' nor 'TrainVal_parsing_annotations/train_segmentations', it holds"
        in message("lip_sem_seg_train")
    )
    assert get_sem_seg_dataset_dicts("lip_sem_seg_val")


@pytest.mark.parametrize("lists", ["", None])
def test_missing_files_are_named(tmp_path, lists):
    register_all(tmp_path)
    root = tmp_path / "LIP"
    write(root, lists=lists)
    (root / "train_segmentations/77_471474.png").unlink()
    source = root / ("train_images" if lists is None else "train_id.txt")
    assert message("lip_sem_seg_train") == (
        f"Data set 'lip_sem_seg_train': '{root}/train_segmentations' has no label map for '77_471474', "
        f"which '{source}' names."
    )
    (root / "val_images/98_1.jpg").unlink()
    assert f"'{root}/val_images' has no image for '98_1'" in message("lip_sem_seg_val")


def test_registered_under_another_name_and_root(tmp_path, monkeypatch):
    write(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    register_lip("~/elsewhere", "my_lip")
    assert len(get_sem_seg_dataset_dicts("my_lip_train")) == 3
    register_lip(tmp_path / "nowhere", "my_lip", hint="fetch it.")
    assert message("my_lip_train").endswith("does not exist; fetch it.")
