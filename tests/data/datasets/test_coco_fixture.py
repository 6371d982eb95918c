"""The drawn COCO-format set: its annotations against its pixels, through pycocotools and Detectron2."""

import errno
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from ccnet_d2.data import DatasetError
from ccnet_d2.data.datasets import coco_fixture
from ccnet_d2.data.datasets.coco_fixture import (
    CLASSES,
    CocoFixtureConfig,
    generate_coco_fixture,
    register_coco_fixture,
)
from tests.scripts import load_script


@pytest.fixture
def root(tmp_path):
    generate_coco_fixture(tmp_path / "set")
    return tmp_path / "set"


def files_of(root: Path) -> dict[Path, bytes]:
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_masks_lie_on_what_is_drawn(root):
    coco = COCO(str(root / "annotations.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    seen = set()
    for image_id in coco.getImgIds():
        record = coco.imgs[image_id]
        image = cv2.imread(str(root / "images" / record["file_name"])).astype(int)
        assert image.shape == (record["height"], record["width"], 3)
        assert coco.getAnnIds(image_id, iscrowd=False) == coco.getAnnIds(image_id)
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image_id]]
        assert 1 <= len(masks) <= 3 and sum(masks).max() == 1
        background = np.median(image[sum(masks) == 0])
        # Three channels far from the grey of the background, inside and nowhere else.
        drawn = (np.abs(image - background) > 35).sum(axis=2) >= 2
        union = sum(masks).astype(bool)
        assert (drawn & union).sum() / (drawn | union).sum() > 0.9
        for annotation, mask in zip(coco.imgToAnns[image_id], masks, strict=True):
            seen.add(CLASSES[annotation["category_id"] - 1])
            assert mask.sum() == pytest.approx(annotation["area"], rel=0.12)
            x, y, width, height = annotation["bbox"]
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min()) == pytest.approx((x, y), abs=1.5)
            assert (np.ptp(columns), np.ptp(rows)) == pytest.approx((width, height), abs=2.5)
    assert seen == set(CLASSES)


def test_detectron2_loads_it(root):
    register_coco_fixture(root, "coco_fixture_test")
    try:
        records = DatasetCatalog.get("coco_fixture_test")
        assert len(records) == 8 and all(Path(r["file_name"]).is_file() for r in records)
        assert MetadataCatalog.get("coco_fixture_test").thing_classes == list(CLASSES)
        register_coco_fixture(root.parent / "nowhere", "coco_fixture_test")
        with pytest.raises(DatasetError, match=r"no COCO fixture in .*nowhere.*make_coco_fixture\.py --root"):
            DatasetCatalog.get("coco_fixture_test")
    finally:
        DatasetCatalog.pop("coco_fixture_test")
        MetadataCatalog.pop("coco_fixture_test")


def test_made_once_and_always_the_same(root, tmp_path, monkeypatch):
    assert not generate_coco_fixture(root)
    monkeypatch.setenv("HOME", str(tmp_path))
    generate_coco_fixture("~/again")
    assert files_of(root) == files_of(tmp_path / "again")
    assert generate_coco_fixture(root, CocoFixtureConfig(images=3))
    assert len(json.loads((root / "annotations.json").read_text())["images"]) == 3


def test_a_set_that_lacks_an_image_is_drawn_again(root):
    """It counted as there by its annotations."""
    whole = files_of(root)
    (root / "images/0003.png").unlink()
    assert generate_coco_fixture(root) and files_of(root) == whole
    shutil.rmtree(root / "images")
    assert generate_coco_fixture(root) and files_of(root) == whole


def test_leaves_what_others_have_there_alone(tmp_path):
    for name, content in (
        ("annotations.json", '{"images": []}'),
        ("annotations.json", '{"info": []}'),
        ("annotations.json", '{"info": {"generator": "another program"}}'),
        ("thesis.tex", "precious"),
    ):
        path = tmp_path / "set" / name
        path.parent.mkdir()
        path.write_text(content)
        for root in (path.parent, path):
            with pytest.raises(DatasetError, match="something other than the COCO fixture"):
                generate_coco_fixture(root)
        assert path.read_text() == content and list(path.parent.iterdir()) == [path]
        shutil.rmtree(path.parent)


def test_unfinished_writing_leaves_what_was_there(tmp_path, monkeypatch):
    root = tmp_path / "set"
    assert generate_coco_fixture(root, CocoFixtureConfig(images=2))
    before = files_of(root)
    write = coco_fixture.write_bgr

    def fail_on_the_second(path, image):
        if path.name == "0001.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, image)

    monkeypatch.setattr(coco_fixture, "write_bgr", fail_on_the_second)
    for folder in (root, tmp_path / "other"):
        with pytest.raises(
            DatasetError, match=r"Cannot write the COCO fixture to '.*': No space left on device"
        ):
            generate_coco_fixture(folder, CocoFixtureConfig(images=2, seed=1))
    assert files_of(root) == before and list(tmp_path.iterdir()) == [root]


def test_two_at_once_do_not_mix_their_images(tmp_path, monkeypatch):
    """Another process draws with another seed between two images of this one."""
    one, another = CocoFixtureConfig(images=2), CocoFixtureConfig(images=2, seed=1)
    generate_coco_fixture(tmp_path / "alone", one)
    write = coco_fixture.write_bgr

    def in_between(path, image):
        if path.name == "0001.png":
            monkeypatch.undo()
            assert generate_coco_fixture(tmp_path / "set", another)
        write(path, image)

    monkeypatch.setattr(coco_fixture, "write_bgr", in_between)
    assert generate_coco_fixture(tmp_path / "set", one)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "alone")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", 0),
        ("size", 20),
        ("seed", -1),
        ("min_object_size", 60),
        ("min_object_size", 0),
        ("max_objects", 0),
    ],
)
def test_bad_parameters_are_named(key, value):
    with pytest.raises(DatasetError, match=f"{key}( is |=){value}"):
        CocoFixtureConfig(**{key: value})


def test_script(tmp_path, capsys):
    script = load_script("tools/make_coco_fixture.py")
    arguments = ["--root", str(tmp_path / "set"), "--images", "2", "--size", "96", "--seed", "3"]
    assert script.main(arguments) == 0 and "Drawn: 2 images of 96x96" in capsys.readouterr().out
    assert not generate_coco_fixture(tmp_path / "set", CocoFixtureConfig(images=2, size=96, seed=3))
    assert script.main(arguments) == 0 and "Already there" in capsys.readouterr().out
    assert script.main(["--root", str(tmp_path / "x"), "--images", "0"]) == 1
    assert capsys.readouterr().err == "error: COCO fixture: images is 0, but at least 1 is needed.\n"
