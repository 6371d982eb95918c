"""PASCAL Context and COCO-Stuff 10k from files as published, through their preparation, to samples and mIoU."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.evaluation import SemSegEvaluator
from scipy.io import savemat

from ccnet_d2.data import DatasetError, SampleError, SemSegMapper, get_sem_seg_dataset_dicts, register_all
from ccnet_d2.data.datasets.coco_stuff import COCO_STUFF_CLASSES, convert_coco_stuff
from ccnet_d2.data.datasets.pascal_context import PASCAL_CONTEXT_CLASSES, convert_pascal_context
from ccnet_d2.data.mat_labels import read_mat_label
from ccnet_d2.data.transforms import RandomScaleCrop
from tests.scripts import load_script

SIZE = (60, 72)

# As mmsegmentation's converter lists the labels used, 0 for background; written down independently of the package.
CONTEXT_NUMBERS = sorted(
    int(number)
    for number in (
        "0 2 259 260 415 324 9 258 144 18 19 22 23 397 25 284 158 159 416 33 162 420 454 295 296 427 44 45 46 308 "
        "59 440 445 31 232 65 354 424 68 326 72 458 34 207 80 355 85 347 220 349 360 98 187 104 105 366 189 368 113 115"
    ).split()
)
COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)


def labels(values: list[int], seed: int, dtype: type) -> np.ndarray:
    """Blocks of 3x3 pixels, each value at least once."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice(values, (SIZE[0] // 3, SIZE[1] // 3)).astype(dtype)
    blocks.ravel()[: len(values)] = values
    return np.kron(blocks, np.ones((3, 3), dtype))


def pascal_context(root: Path) -> tuple[Path, Path]:
    """VOC 2010 as unpacked, and trainval.tar.gz as unpacked elsewhere."""
    voc, annotations = root / "VOC2010", root / "downloads" / "trainval"
    annotations.mkdir(parents=True)
    splits = {"train": ["2008_000002", "2009_001110"], "val": ["2008_000003", "2010_000002"]}
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    for i, (split, names) in enumerate(splits.items()):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
        (voc / "ImageSets" / "Main" / f"dog_{split}.txt").write_text("2008_000002 -1\n")
        for j, name in enumerate(names):
            image(voc / "JPEGImages" / f"{name}.jpg", 2 * i + j)
            # 1 (accordion) and 459 (wool) are among the labels that are not used.
            label = labels([*CONTEXT_NUMBERS[1:], 1, 431, 459], 2 * i + j, np.uint16)
            savemat(annotations / f"{name}.mat", {"LabelMap": label}, do_compression=True)
    image(voc / "JPEGImages" / "2007_000027.jpg", 9)  # VOC 2010 has images without such annotations
    return voc, annotations


def coco_stuff(root: Path) -> Path:
    folder = root / "cocostuff-10k-v1.1"
    names = [f"COCO_train2014_0000000000{number}" for number in (77, 79, 81)]
    splits = {"train": names[:2], "test": names[2:]}
    for i, (split, names) in enumerate(splits.items()):
        listed = folder / "imageLists" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{n}\n" for n in names))
        for name in names:
            image(folder / "images" / f"{name}.jpg", i)
            label = labels([n for n in range(183) if n not in COCO_UNUSED], i, np.uint16)
            (folder / "annotations").mkdir(exist_ok=True)
            contents = {"S": label, "captions": np.array(["a street"], object), "regionMapStuff": label}
            savemat(folder / "annotations" / f"{name}.mat", contents)
    return folder


def check_loading(train: str, val: str, classes: int, expected: dict[str, np.ndarray]) -> None:
    """Labels arrive as expected, loaders deliver, and a model that knows the answers gets 100 %."""
    dataset = get_sem_seg_dataset_dicts(train)
    assert len(MetadataCatalog.get(train).stuff_classes) == classes
    assert len(set(MetadataCatalog.get(train).stuff_colors)) == classes
    mapper = SemSegMapper(True, augmentations=[], dataset_names=train)
    for record in dataset:
        found = mapper(record)["sem_seg"].numpy()
        np.testing.assert_array_equal(found, expected[record["image_id"]])
        assert set(range(classes)) <= set(np.unique(found).tolist())
    crop = RandomScaleCrop(24, scale_range=(0.5, 2.0))
    loader = build_detection_train_loader(
        dataset,
        mapper=SemSegMapper(True, augmentations=[crop], dataset_names=train),
        total_batch_size=2,
        aspect_ratio_grouping=False,
    )
    for sample in next(iter(loader)):
        assert sample["image"].shape == (3, 24, 24) and sample["sem_seg"].shape == (24, 24)
    evaluator = SemSegEvaluator(val, distributed=False)
    evaluator.reset()
    for (sample,) in build_detection_test_loader(
        get_sem_seg_dataset_dicts(val), mapper=SemSegMapper(False, augmentations=[])
    ):
        label = torch.from_numpy(expected[sample["image_id"]].astype(np.int64))
        known = torch.nn.functional.one_hot(label.clamp(max=classes), classes + 1)[..., :classes]
        evaluator.process([sample], [{"sem_seg": known.permute(2, 0, 1).float()}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)


@pytest.mark.parametrize("classes", [59, 60])
def test_pascal_context(tmp_path, classes):
    voc, annotations = pascal_context(tmp_path)
    if classes == 59:  # as published, beside the folder
        names = dict(zip(CONTEXT_NUMBERS[1:], PASCAL_CONTEXT_CLASSES, strict=True))
        lines = [f"{number}: {names.get(number, 'something else')}\n" for number in range(1, 460)]
        (annotations.parent / "labels.txt").write_text("".join(lines))
    seen = []
    counts = convert_pascal_context(voc, annotations, progress=lambda done, total: seen.append((done, total)))
    assert counts == {"train": 2, "val": 2}
    assert seen == [(i, 8) for i in range(1, 9)]
    register_all(tmp_path)
    expected = {}
    for mat in annotations.glob("*.mat"):
        label = read_mat_label(mat, "LabelMap")
        with_background = np.zeros(SIZE, int)
        for value in np.unique(label):
            if value in CONTEXT_NUMBERS:
                with_background[label == value] = CONTEXT_NUMBERS.index(value)
        without = np.where(with_background == 0, 255, with_background - 1)
        expected[mat.stem] = with_background if classes == 60 else without
    name = f"pascal_context_{classes}_sem_seg"
    check_loading(f"{name}_train", f"{name}_val", classes, expected)


def test_coco_stuff(tmp_path):
    folder = coco_stuff(tmp_path)
    seen = []
    counts = convert_coco_stuff(folder, progress=lambda done, total: seen.append((done, total)))
    assert counts == {"train": 2, "val": 1} and seen == [(i, 3) for i in range(1, 4)]
    register_all(tmp_path)
    val = get_sem_seg_dataset_dicts("coco_stuff_10k_sem_seg_val")
    assert [sample["image_id"] for sample in val] == ["COCO_train2014_000000000081"]
    used = [n for n in range(1, 183) if n not in COCO_UNUSED]
    expected = {}
    for mat in (folder / "annotations").glob("*.mat"):
        label = read_mat_label(mat, "S")
        out = np.full(SIZE, 255)
        for index, value in enumerate(used):
            out[label == value] = index
        expected[mat.stem] = out
    check_loading("coco_stuff_10k_sem_seg_train", "coco_stuff_10k_sem_seg_val", 171, expected)


def test_class_names():
    assert len(PASCAL_CONTEXT_CLASSES) == 59 and list(PASCAL_CONTEXT_CLASSES) == sorted(
        PASCAL_CONTEXT_CLASSES
    )
    assert MetadataCatalog.get("pascal_context_60_sem_seg_val").stuff_classes[0] == "background"
    assert len(COCO_STUFF_CLASSES) == len(set(COCO_STUFF_CLASSES)) == 171
    assert COCO_STUFF_CLASSES[0] == "person" and COCO_STUFF_CLASSES[79] == "toothbrush"
    # Black is the colour of background, and of nothing else.
    for name, black in (("pascal_context_59", 0), ("pascal_context_60", 1), ("coco_stuff_10k", 0)):
        colors = MetadataCatalog.get(f"{name}_sem_seg_val").stuff_colors
        assert [color == (0, 0, 0) for color in colors].index(True) == 0 if black else (0, 0, 0) not in colors
    assert COCO_STUFF_CLASSES[80] == "banner" and COCO_STUFF_CLASSES[170] == "wood"


def test_preparation_keeps_what_is_there_and_leaves_nothing_half_written(tmp_path):
    folder = coco_stuff(tmp_path)
    convert_coco_stuff(folder)
    png = folder / "labels" / "COCO_train2014_000000000077.png"
    before = png.stat().st_mtime_ns
    broken = folder / "annotations" / "COCO_train2014_000000000081.mat"
    (folder / "labels" / "COCO_train2014_000000000081.png").unlink()
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(SampleError, match=r"000000000081\.mat"):
        convert_coco_stuff(folder)
    assert {path.name for path in (folder / "labels").iterdir()} == {png.name, png.name.replace("77", "79")}
    assert png.stat().st_mtime_ns == before


def test_two_preparations_at_once(tmp_path, monkeypatch):
    """Another process makes the same label map between its writing and its renaming here."""
    folder, replace = coco_stuff(tmp_path), os.replace

    def in_between(part, target):
        monkeypatch.undo()
        convert_coco_stuff(folder)
        replace(part, target)

    monkeypatch.setattr(os, "replace", in_between)
    assert convert_coco_stuff(folder) == {"train": 2, "val": 1}
    assert sorted(path.suffix for path in (folder / "labels").iterdir()) == [".png"] * 3


def run_tool(name: str, *arguments: str) -> int:
    return load_script(f"tools/{name}.py").main(list(arguments))


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    _, annotations = pascal_context(tmp_path)
    coco_stuff(tmp_path)
    assert run_tool("prepare_pascal_context", str(annotations)) == 0
    assert run_tool("prepare_coco_stuff") == 0
    assert capsys.readouterr().out == "train: 2 images, val: 2 images\ntrain: 2 images, val: 1 images\n"
    listed = tmp_path / "VOC2010/ImageSets/SegmentationContext/val.txt"
    assert listed.read_text() == "2008_000003\n2010_000002\n"
    (tmp_path / "VOC2010").rename(tmp_path / "voc elsewhere")
    (tmp_path / "cocostuff-10k-v1.1").rename(tmp_path / "coco elsewhere")
    assert run_tool("prepare_pascal_context", str(annotations), "--voc", str(tmp_path / "voc elsewhere")) == 0
    assert run_tool("prepare_coco_stuff", str(tmp_path / "coco elsewhere")) == 0
    assert run_tool("prepare_coco_stuff", str(tmp_path / "elsewhere")) == 1
    error = capsys.readouterr().err
    assert "error: The list '" in error and "cocostuff-10k-v1.1.zip" in error


def _rename_a_label(voc: Path, annotations: Path) -> None:
    (annotations.parent / "labels.txt").write_text("1: accordion\n2: airplane\n")


def _rename_a_label_beside_the_annotations(voc: Path, annotations: Path) -> None:
    (annotations / "labels.txt").write_text("1: accordion\n2: airplane\n")


def _remove_all_annotations(voc: Path, annotations: Path) -> None:
    annotations.rename(annotations.with_name("elsewhere"))


def _remove_an_annotation(voc: Path, annotations: Path) -> None:
    (annotations / "2009_001110.mat").unlink()


def _remove_the_list(voc: Path, annotations: Path) -> None:
    (voc / "ImageSets/Main/val.txt").unlink()


def _empty_the_list(voc: Path, annotations: Path) -> None:
    (voc / "ImageSets/Main/val.txt").write_text("\n")


def _spoil_the_list(voc: Path, annotations: Path) -> None:
    (voc / "ImageSets/Main/val.txt").write_bytes(b"\xff\xfe2\0")


def _other_variable(voc: Path, annotations: Path) -> None:
    savemat(annotations / "2009_001110.mat", {"S": np.zeros(SIZE, np.uint8)})


def _empty_map(voc: Path, annotations: Path) -> None:
    savemat(annotations / "2009_001110.mat", {"LabelMap": np.zeros((0, 0), np.uint16)})


def _doubles(voc: Path, annotations: Path) -> None:
    savemat(annotations / "2009_001110.mat", {"LabelMap": np.full(SIZE, 2.0)})


def _several_maps(voc: Path, annotations: Path) -> None:
    savemat(annotations / "2009_001110.mat", {"LabelMap": np.zeros((*SIZE, 2), np.uint16)})


def _negative_label(voc: Path, annotations: Path) -> None:
    savemat(annotations / "2009_001110.mat", {"LabelMap": np.array([[7, -3]], np.int16)})


def _file_in_the_way(voc: Path, annotations: Path) -> None:
    (voc / "SegmentationClassContext59").write_text("")


def _unknown_label(voc: Path, annotations: Path) -> None:
    savemat(annotations / "2009_001110.mat", {"LabelMap": np.full(SIZE, 460, np.uint16)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rename_a_label, "calls label 2 'airplane', but it should be 'aeroplane'"),
        (_rename_a_label_beside_the_annotations, "calls label 2 'airplane', but it should be 'aeroplane'"),
        (_remove_all_annotations, r"The folder '.*trainval' does not exist; unpack PASCAL Context's"),
        (_doubles, "2009_001110.mat' has no label map 'LabelMap' of integers"),
        (_several_maps, "2009_001110.mat' has no label map 'LabelMap'"),
        (_remove_an_annotation, r"no annotation of '2009_001110' \(1 of 4 are missing\)"),
        (
            _empty_the_list,
            r"^VOC's list '.*Main/val\.txt' is empty\. Unpack VOC 2010 into '.*VOC2010' again\.$",
        ),
        (_spoil_the_list, r"^VOC's list '.*Main/val\.txt' cannot be read: it is not UTF-8 text\.$"),
        (_remove_the_list, "Main/val.txt' does not exist; unpack VOC 2010"),
        (_other_variable, "2009_001110.mat' has no label map 'LabelMap'"),
        (_empty_map, "2009_001110.mat' has no label map 'LabelMap'"),
        (_unknown_label, "2009_001110.mat' holds the label 460, but labels are 0 to 459"),
        (_negative_label, "2009_001110.mat' holds the label -3, but labels are 0 to 459"),
        (
            _file_in_the_way,
            r"SegmentationClassContext59/.*\.png' cannot be written: (File exists|Not a directory)",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, damage, message):
    voc, annotations = pascal_context(tmp_path)
    damage(voc, annotations)
    with pytest.raises(DatasetError, match=message):
        convert_pascal_context(voc, annotations)


def test_an_annotation_that_is_missing_is_named_before_anything_is_written(tmp_path):
    folder = coco_stuff(tmp_path)
    (folder / "annotations" / "COCO_train2014_000000000081.mat").unlink()
    with pytest.raises(
        DatasetError, match=r"no annotation of 'COCO_train2014_000000000081' \(1 of 3 are missing\)"
    ):
        convert_coco_stuff(folder)
    assert not (folder / "labels").exists()


def test_lists_of_coco_stuff(tmp_path):
    """As a full disk leaves one, and as an editor writes one."""
    folder = coco_stuff(tmp_path)
    listed = folder / "imageLists" / "test.txt"
    listed.write_text("\ufeffCOCO_train2014_000000000081\r\n", encoding="utf-8")
    assert convert_coco_stuff(folder) == {"train": 2, "val": 1}
    for content, message in (
        (b"", r"is empty\. Unpack cocostuff-10k-v1\.1\.zip there again"),
        (b"\xff", "cannot be read: it is not UTF-8 text"),
    ):
        listed.write_bytes(content)
        with pytest.raises(DatasetError, match=rf"^The list '.*test\.txt' {message}\.$"):
            convert_coco_stuff(folder)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pascal_context(tmp_path)
    coco_stuff(tmp_path)
    convert_pascal_context("~/VOC2010", "~/downloads/trainval")
    convert_coco_stuff("~/cocostuff-10k-v1.1")
    register_all("~")
    for name, count in (("pascal_context_60", 2), ("coco_stuff_10k", 1)):
        assert len(get_sem_seg_dataset_dicts(f"{name}_sem_seg_val")) == count


def test_a_label_beyond_coco_s_is_named(tmp_path):
    folder = coco_stuff(tmp_path)
    savemat(
        folder / "annotations" / "COCO_train2014_000000000081.mat",
        {"S": np.array([[0, 182, 183]], np.uint16)},
    )
    with pytest.raises(SampleError, match=r"81\.mat' holds the label 183, but labels are 0 to 182\.$"):
        convert_coco_stuff(folder)


def test_sets_that_are_not_there_say_how_to_make_them(tmp_path):
    register_all(tmp_path)
    for name, tool in (
        ("pascal_context_59_sem_seg_train", "prepare_pascal_context.py"),
        ("coco_stuff_10k_sem_seg_val", "prepare_coco_stuff.py"),
    ):
        with pytest.raises(DatasetError, match=tool):
            get_sem_seg_dataset_dicts(name)
