"""Every data set's loader, mapper and evaluator on files in exactly the layout in which it is published."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.datasets import load_sem_seg
from detectron2.data.datasets.builtin import register_all_ade20k, register_all_cityscapes
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_OBJECTS
from detectron2.evaluation import SemSegEvaluator
from PIL import Image
from scipy.io import savemat

from ccnet_d2.data import DatasetError, SemSegMapper, get_sem_seg_dataset_dicts, register_all
from ccnet_d2.data.datasets.camvid import CAMVID_CLASSES
from ccnet_d2.data.datasets.voc12 import VOC12_CLASSES
from ccnet_d2.data.transforms import RandomScaleCrop

HEIGHT, WIDTH = 32, 64


def _image(path: Path, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)


def _label(path: Path, label: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if palette:
        image.putpalette([(37 * i + 11) % 256 for i in range(768)])
    image.save(path)


def _labels(values: list[int], seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Random blocks of the given values, each value at least once."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice(values, (size[0] // 4, size[1] // 4)).astype(np.uint8)
    blocks.ravel()[: len(values)] = values
    return np.kron(blocks, np.ones((4, 4), np.uint8))


def _camvid(root: Path) -> None:
    for split in ("train", "val", "test"):
        for index, name in enumerate(("0001TP_006690", "Seq05VD_f00000")):
            extension = "png" if split == "train" else "jpg"  # both are found in the wild
            _image(root / "camvid" / split / f"{name}.{extension}", index)
            _label(root / "camvid" / f"{split}annot" / f"{name}.png", _labels(list(range(12)), index))
    register_all(root)


def _voc12(root: Path) -> None:
    voc = root / "VOC2012"
    lists = {"train_aug": ["2007_000032", "2008_000002"], "val": ["2007_000033"], "train": ["2007_000032"]}
    for split, names in lists.items():
        listed = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{name}\n" for name in names))
    for index, name in enumerate(("2007_000032", "2007_000033", "2008_000002", "2008_000003")):
        _image(voc / "JPEGImages" / f"{name}.jpg", index)
        if name.startswith("2007"):
            _label(voc / "SegmentationClass" / f"{name}.png", _labels([*range(21), 255], index), palette=True)
        _label(voc / "SegmentationClassAug" / f"{name}.png", _labels([*range(21), 255], index))
    register_all(root)


def _cityscapes(root: Path) -> None:
    """As unpacked, with the labelTrainIds that cityscapesScripts makes."""
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        for index in range(2):
            stem = f"{city}_{index:06d}_000019"
            _image(root / "cityscapes" / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", index)
            fine = root / "cityscapes" / "gtFine" / split / city
            train_ids = _labels([*range(19), 255], index)
            _label(fine / f"{stem}_gtFine_labelTrainIds.png", train_ids)
            _label(fine / f"{stem}_gtFine_labelIds.png", train_ids)
            _label(fine / f"{stem}_gtFine_instanceIds.png", train_ids)
            _image(fine / f"{stem}_gtFine_color.png", index)
            polygons = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": []}
            (fine / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
    for name in [name for name in DatasetCatalog if name.startswith("cityscapes_fine_")]:
        if "panoptic" not in name:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)
    register_all_cityscapes(str(root))


def _ade20k(root: Path) -> None:
    ade = root / "ADEChallengeData2016"
    for folder, prefix in (("training", "ADE_train"), ("validation", "ADE_val")):
        for index in range(2):
            name = f"{prefix}_{index + 1:08d}"
            _image(ade / "images" / folder / f"{name}.jpg", index, (64, 96))
            label = _labels(list(range(151)), index, (64, 96))
            _label(ade / "annotations" / folder / f"{name}.png", label)
            # What Detectron2's preparation writes: unlabelled becomes 255, classes start at 0.
            _label(ade / "annotations_detectron2" / folder / f"{name}.png", label - np.uint8(1))
    for name in ("ade20k_sem_seg_train", "ade20k_sem_seg_val"):
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    register_all_ade20k(str(root))


SETS = [
    pytest.param(_camvid, "camvid_sem_seg_train", "camvid_sem_seg_val", 11, 2, id="camvid"),
    pytest.param(_camvid, "camvid_sem_seg_val", "camvid_sem_seg_test", 11, 2, id="camvid-test"),
    pytest.param(_voc12, "voc12_sem_seg_train_aug", "voc12_sem_seg_val", 21, 2, id="voc12-aug"),
    pytest.param(_voc12, "voc12_sem_seg_train", "voc12_sem_seg_val", 21, 1, id="voc12"),
    pytest.param(
        _cityscapes, "cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val", 19, 2, id="cityscapes"
    ),
    pytest.param(_ade20k, "ade20k_sem_seg_train", "ade20k_sem_seg_val", 150, 2, id="ade20k"),
]


@pytest.mark.parametrize(("layout", "train", "val", "classes", "count"), SETS)
def test_load_map_and_evaluate(
    tmp_path: Path, layout: Callable[[Path], None], train: str, val: str, classes: int, count: int
) -> None:
    layout(tmp_path)
    dataset = get_sem_seg_dataset_dicts(train)
    assert len(dataset) == count
    assert len(MetadataCatalog.get(train).stuff_classes) == classes

    # Labels: all classes and void arrive, nothing else, as the files hold them.
    plain = SemSegMapper(True, augmentations=[], dataset_names=train)
    sample = plain(dataset[0])
    assert sorted(sample["sem_seg"].unique().tolist()) == [*range(classes), 255]
    with Image.open(dataset[0]["sem_seg_file_name"]) as image:
        stored = np.asarray(image).astype(int)
    stored[stored == MetadataCatalog.get(train).ignore_label] = 255
    np.testing.assert_array_equal(sample["sem_seg"].numpy(), stored)

    loader = build_detection_train_loader(
        dataset,
        mapper=SemSegMapper(
            True,
            augmentations=[RandomScaleCrop(24, scale_range=(0.5, 2.0), category_max_ratio=0.75)],
            dataset_names=train,
        ),
        total_batch_size=2,
        aspect_ratio_grouping=False,
    )
    for sample in next(iter(loader)):
        assert sample["image"].shape == (3, 24, 24) and sample["image"].dtype == torch.uint8
        assert sample["sem_seg"].shape == (24, 24) and sample["sem_seg"].dtype == torch.int64

    # A model that knows the answer gets 100 %: image, file name, size and labels belong together.
    evaluator = SemSegEvaluator(val, distributed=False)
    evaluator.reset()
    answers = {s["file_name"]: s for s in get_sem_seg_dataset_dicts(val)}
    knows = SemSegMapper(True, augmentations=[], dataset_names=val)
    test_loader = build_detection_test_loader(
        get_sem_seg_dataset_dicts(val), mapper=SemSegMapper(False, augmentations=[])
    )
    for (sample,) in test_loader:
        assert "sem_seg" not in sample
        label = knows(answers[sample["file_name"]])["sem_seg"]
        assert label.shape == (sample["height"], sample["width"])
        known = torch.nn.functional.one_hot(label.clamp(max=classes), classes + 1)[..., :classes]
        evaluator.process([sample], [{"sem_seg": known.permute(2, 0, 1).float()}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)


def test_names_and_colours_of_camvid() -> None:
    metadata = MetadataCatalog.get("camvid_sem_seg_train")
    assert metadata.stuff_classes == list(CAMVID_CLASSES) and len(CAMVID_CLASSES) == 11
    colors = dict(zip(metadata.stuff_classes, metadata.stuff_colors, strict=True))
    assert colors["Road"] == (128, 64, 128) and colors["Pavement"] == (60, 40, 222)
    assert colors["Bicyclist"] == (0, 128, 192) and len(set(metadata.stuff_colors)) == 11
    assert metadata.ignore_label == 11
    original = MetadataCatalog.get("camvid_original_sem_seg_train")
    assert original.stuff_colors == metadata.stuff_colors


def test_names_and_label_maps_of_voc12() -> None:
    assert list(VOC12_CLASSES) == ["background", *VOC_OBJECTS]
    for split, labels in (("train_aug", "ClassAug"), ("train", "Class"), ("val", "Class")):
        metadata = MetadataCatalog.get(f"voc12_sem_seg_{split}")
        assert metadata.stuff_classes == list(VOC12_CLASSES)
        assert os.path.basename(metadata.sem_seg_root) == f"Segmentation{labels}"


@pytest.mark.parametrize(
    ("layout", "name", "broken", "message"),
    [
        (_camvid, "camvid_sem_seg_val", "camvid/val", "camvid/val' does not exist.*DETECTRON2_DATASETS"),
        (
            _camvid,
            "camvid_sem_seg_val",
            "camvid/valannot/0001TP_006690.png",
            "no label map for '0001TP_006690'",
        ),
        (
            _voc12,
            "voc12_sem_seg_train_aug",
            "VOC2012/SegmentationClassAug",
            "SegmentationClassAug' does not exist",
        ),
        (_voc12, "voc12_sem_seg_val", "VOC2012/ImageSets/Segmentation/val.txt", "val.txt' does not exist"),
        (
            _cityscapes,
            "cityscapes_fine_sem_seg_train",
            "cityscapes/leftImg8bit/train",
            "leftImg8bit/train.*does not exist.*DETECTRON2_DATASETS",
        ),
        (
            _cityscapes,
            "cityscapes_fine_sem_seg_train",
            "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png",
            "labelTrainIds|gtFine_",
        ),
        (
            _ade20k,
            "ade20k_sem_seg_val",
            "ADEChallengeData2016/annotations_detectron2/validation",
            "annotations_detectron2/validation' does not exist.*DETECTRON2_DATASETS",
        ),
    ],
)
def test_incomplete_sets_name_what_is_missing(
    tmp_path: Path, layout: Callable[[Path], None], name: str, broken: str, message: str
) -> None:
    layout(tmp_path)
    os.rename(tmp_path / broken, tmp_path / "moved_away")
    # Detectron2 looks at the first file only, so let it be every one.
    if broken.endswith("labelTrainIds.png"):
        for path in (tmp_path / "cityscapes" / "gtFine" / "train").rglob("*labelTrainIds.png"):
            path.unlink()
    with pytest.raises(DatasetError, match=message) as error:
        get_sem_seg_dataset_dicts(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_files_that_detectron2s_loader_cannot_take_are_one_sentence(tmp_path: Path) -> None:
    _cityscapes(tmp_path)
    stray = tmp_path / "cityscapes/leftImg8bit/train/aachen/Thumbs.db"
    stray.write_bytes(b"")
    with pytest.raises(
        DatasetError, match=r"'cityscapes_fine_sem_seg_train' .*has a file too many: Thumbs\.db\."
    ):
        get_sem_seg_dataset_dicts("cityscapes_fine_sem_seg_train")
    stray.unlink()
    polygons = next((tmp_path / "cityscapes/gtFine/train").rglob("*_polygons.json"))
    polygons.write_text(polygons.read_text()[:9])
    with pytest.raises(
        DatasetError, match=r"a JSON file of 9 characters that begins with '\{\"imgHeig' is damaged"
    ):
        get_sem_seg_dataset_dicts("cityscapes_fine_sem_seg_train")


def test_label_maps_of_other_images_are_refused(tmp_path: Path) -> None:
    """Detectron2's loader pairs by order where one image and another's label map are missing."""
    root = tmp_path / "ADEChallengeData2016"
    for i in range(6):
        for folder, suffix in (("images", "jpg"), ("annotations_detectron2", "png")):
            path = root / folder / "training" / f"ADE_train_{i:08d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.full((4, 5), i, np.uint8))
    name = "one_of_detectron2s"
    images, labels = str(root / "images" / "training"), str(root / "annotations_detectron2" / "training")
    DatasetCatalog.register(name, lambda: load_sem_seg(labels, images, gt_ext="png", image_ext="jpg"))
    try:
        assert len(get_sem_seg_dataset_dicts(name)) == 6
        os.remove(f"{images}/ADE_train_00000001.jpg")
        os.remove(f"{labels}/ADE_train_00000004.png")
        with pytest.raises(
            DatasetError,
            match=r"pairs the image 'ADE_train_00000003' with the label map 'ADE_train_00000002', .* same names, but "
            r"there is not a label map for 'ADE_train_00000004' nor an image for 'ADE_train_00000001'\.",
        ):
            get_sem_seg_dataset_dicts(name)
        os.remove(f"{images}/ADE_train_00000004.jpg")  # one image fewer: it takes those that have both
        found = get_sem_seg_dataset_dicts(name)
        assert [os.path.basename(r["file_name"])[:-4] for r in found] == [
            f"ADE_train_{i:08d}" for i in (0, 2, 3, 5)
        ]
    finally:
        DatasetCatalog.pop(name)


def test_importing_registers_under_the_environments_folder_without_touching_it(tmp_path: Path) -> None:
    """A folder given as ~/…, which Detectron2 0.5 does not expand."""
    code = (
        "import ccnet_d2.data, ccnet_d2.data as again\n"
        "from detectron2.data import MetadataCatalog as M\n"
        "ccnet_d2.data.register_all()\n"
        "for name in ('camvid_sem_seg_test', 'voc12_sem_seg_train_aug', 'ccnet_synthetic_train', "
        "'ade20k_sem_seg_val'):\n"
        "    print(M.get(name).image_root)\n"
        "print(M.get('cityscapes_fine_sem_seg_val').image_dir)\n"
        "for name in ('coco_2017_train', 'keypoints_coco_2017_val', 'lvis_v1_val', 'cityscapes_fine_panoptic_val'):\n"
        "    print(M.get(name).image_root)\n"
        "print(M.get('voc_2007_trainval').dirname)\n"
    )
    env = {**os.environ, "HOME": str(tmp_path), "DETECTRON2_DATASETS": "~/sets"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    roots = done.stdout.split()
    assert [os.path.relpath(root, tmp_path / "sets") for root in roots] == [
        "camvid/test",
        "VOC2012/JPEGImages",
        "ccnet_synthetic/images/train",
        "ADEChallengeData2016/images/validation",
        "cityscapes/leftImg8bit/val",
        "coco/train2017",
        "coco/val2017",
        "coco",
        "cityscapes/leftImg8bit/val",
        "VOC2007",
    ]
    assert not (tmp_path / "sets").exists()


def _readme_code(section: str) -> str:
    readme = Path(__file__).parents[3] / "projects" / "CCNet" / "datasets" / "README.md"
    text = readme.read_text(encoding="utf-8").partition(f"## {section}")[2]
    return text.partition("```python\n")[2].partition("```")[0]


def _run(code: str, root: Path, folder: Path) -> str:
    env = {**os.environ, "DETECTRON2_DATASETS": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_preparation_of_ade20k(tmp_path: Path) -> None:
    _ade20k(tmp_path)
    written = (tmp_path / "ADEChallengeData2016" / "annotations_detectron2").rglob("*.png")
    pixels = {path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in written}
    assert len(pixels) == 4
    shutil.rmtree(tmp_path / "ADEChallengeData2016" / "annotations_detectron2")
    _run(_readme_code("ADE20K"), tmp_path, tmp_path)
    for path, label in pixels.items():
        np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), label)


def test_the_readmes_preparation_of_voc12(tmp_path: Path) -> None:
    _voc12(tmp_path)
    voc = tmp_path / "VOC2012"
    shutil.rmtree(voc / "SegmentationClassAug")
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    mats = tmp_path / "benchmark_RELEASE" / "dataset" / "cls"
    mats.mkdir(parents=True)
    sbd = _labels(list(range(21)), 5)
    for name in ("2007_000032", "2007_000033", "2008_000002", "2008_000003"):
        savemat(mats / f"{name}.mat", {"GTcls": {"Segmentation": sbd}})
    out = _run(_readme_code("PASCAL VOC 2012"), tmp_path, tmp_path)
    assert out.startswith("3 training images")

    samples = get_sem_seg_dataset_dicts("voc12_sem_seg_train_aug")
    assert [sample["image_id"] for sample in samples] == ["2007_000032", "2008_000002", "2008_000003"]
    mapper = SemSegMapper(True, augmentations=[], dataset_names="voc12_sem_seg_train_aug")
    np.testing.assert_array_equal(mapper(samples[1])["sem_seg"].numpy(), sbd)
    # Where VOC has an annotation of its own, that one counts.
    with Image.open(voc / "SegmentationClass" / "2007_000032.png") as image:
        np.testing.assert_array_equal(mapper(samples[0])["sem_seg"].numpy(), np.asarray(image))
