"""The drawn data set in LIP's layout."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from ccnet_d2.data import DatasetError
from ccnet_d2.data.check import check_dataset
from ccnet_d2.data.datasets import lip_fixture
from ccnet_d2.data.datasets.lip import LIP_CLASSES, LIP_FLIP_PAIRS, register_lip
from ccnet_d2.data.datasets.lip_fixture import LipFixtureConfig, draw_person, generate_lip_fixture
from tests.scripts import load_script

SMALL = LipFixtureConfig(train_images=13, val_images=12, size=64)


@pytest.mark.parametrize("layout", ["ce2p", "official"])
def test_both_layouts_hold_every_class_and_are_sound(tmp_path, layout):
    root = tmp_path / "LIP"
    assert generate_lip_fixture(root, replace(SMALL, layout=layout))
    folders = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_dir()}
    labels = "" if layout == "ce2p" else "TrainVal_parsing_annotations/"
    assert folders - {labels.rstrip("/")} == {
        f"{prefix}{split}_{kind}"
        for split in ("train", "val")
        for prefix, kind in (("", "images"), (labels, "segmentations"))
    }
    register_lip(root, "drawn_lip")
    for split, count in (("train", 13), ("val", 12)):
        report = check_dataset(f"drawn_lip_{split}")
        assert report.samples == count and not report.problems and not report.notes
        assert (report.pixels > 0).all() and report.void == 0
        assert report.pixels[0] / report.pixels.sum() < 0.75


def test_left_is_on_the_right_and_looks_like_right(tmp_path):
    generate_lip_fixture(tmp_path / "set", SMALL)
    register_lip(tmp_path / "set", "drawn_lip")
    for record in DatasetCatalog.get("drawn_lip_train"):
        label = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        image = cv2.imread(record["file_name"])
        assert image.shape[:2] == label.shape and label.shape[0] > label.shape[1]
        blue, _, red = np.median(image[label == LIP_CLASSES.index("Face")].astype(float), axis=0)
        assert red > blue + 30
        for left, right in LIP_FLIP_PAIRS:
            columns = [np.nonzero(label == part)[1] for part in (left, right)]
            if min(map(len, columns)) == 0:
                continue  # a leg may be hidden altogether
            assert columns[0].mean() > columns[1].mean() + 2
            colors = [np.median(image[label == part].astype(float), axis=0) for part in (left, right)]
            assert np.abs(colors[0] - colors[1]).max() < 25


def test_made_once_and_always_the_same(tmp_path, monkeypatch):
    def files(root: Path) -> dict:
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert generate_lip_fixture(tmp_path / "a", SMALL) and not generate_lip_fixture(tmp_path / "a", SMALL)
    generate_lip_fixture(tmp_path / "b", SMALL)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    # No person is in both splits.
    pictures = {split: set((tmp_path / "a").glob(f"{split}_images/*")) for split in ("train", "val")}
    assert len({path.read_bytes() for paths in pictures.values() for path in paths}) == 13 + 12
    assert generate_lip_fixture(tmp_path / "a", replace(SMALL, seed=1, train_images=2))
    assert len(list((tmp_path / "a/train_images").iterdir())) == 2
    assert files(tmp_path / "a").keys() < files(tmp_path / "b").keys()
    # Drawn by an earlier version: drawn again.
    monkeypatch.setattr(lip_fixture, "_FORMAT", 99)
    assert generate_lip_fixture(tmp_path / "b", SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("layout", "lost"),
    [
        ("ce2p", "train_images/100003_400003.jpg"),
        ("ce2p", "val_segmentations/200000_400000.png"),
        ("ce2p", "val_id.txt"),
        ("official", "TrainVal_parsing_annotations/train_segmentations/100000_400000.png"),
    ],
)
def test_a_set_that_lacks_a_file_is_drawn_again(tmp_path, layout, lost):
    """It counted as there by its manifest."""
    config = replace(SMALL, layout=layout)
    generate_lip_fixture(tmp_path, config)
    content = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    assert generate_lip_fixture(tmp_path, config) and (tmp_path / lost).read_bytes() == content
    assert not generate_lip_fixture(tmp_path, config)


def test_never_overwrites_anything_else(tmp_path):
    root = tmp_path / "LIP"
    (root / "train_images").mkdir(parents=True)
    (root / "train_images/1.jpg").write_bytes(b"precious")
    with pytest.raises(DatasetError, match="holds something other than the LIP fixture"):
        generate_lip_fixture(root, SMALL)
    assert (root / "train_images/1.jpg").read_bytes() == b"precious"


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    generate_lip_fixture(tmp_path / "set", SMALL)
    before = json.loads((tmp_path / "set/lip_fixture.json").read_text())
    written = []

    def fail_on_the_fifth(path, image):
        written.append(path)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(lip_fixture, "write_bgr", fail_on_the_fifth)
    with pytest.raises(DatasetError, match=r"Cannot write the LIP fixture to .*: No space left on device"):
        generate_lip_fixture(tmp_path / "set", replace(SMALL, seed=2))
    assert json.loads((tmp_path / "set/lip_fixture.json").read_text()) == before
    written.clear()
    with pytest.raises(DatasetError, match="Cannot write the LIP fixture"):
        generate_lip_fixture(tmp_path / "other", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_two_at_once(tmp_path, monkeypatch):
    """Another process draws the same set, and is done when this one is about to put its own in place."""
    generate_lip_fixture(tmp_path / "set", replace(SMALL, seed=1))
    rename = os.rename

    def meanwhile(path, target):
        if Path(path).name == "new":
            monkeypatch.undo()
            assert generate_lip_fixture(tmp_path / "set", SMALL)
        rename(path, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    assert not generate_lip_fixture(tmp_path / "set", SMALL)
    assert len(list((tmp_path / "set/train_images").iterdir())) == 13
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("key", "value"), [("train_images", 0), ("val_images", 0), ("size", 10), ("seed", -1), ("layout", "coco")]
)
def test_bad_parameters_are_named(key, value):
    with pytest.raises(DatasetError, match=f"LIP fixture: {key} is '?{value}'?, but"):
        LipFixtureConfig(**{key: value})


def test_twelve_persons_in_a_row_show_every_class():
    rng = np.random.default_rng(0)
    seen = [np.unique(draw_person(index, 120, 80, rng)) for index in range(30, 42)]
    assert set(np.concatenate(seen)) == {*range(20)}


def test_a_missing_fixture_says_how_to_draw_it(tmp_path):
    lip_fixture.register_lip_fixture(tmp_path / "nowhere")
    try:
        with pytest.raises(
            DatasetError, match=r"nowhere' does not exist; draw the fixture.*make_lip_fixture\.py"
        ):
            DatasetCatalog.get("ccnet_lip_fixture_train")
    finally:
        lip_fixture.register_lip_fixture()


def test_script(tmp_path, capsys):
    script = load_script("tools/make_lip_fixture.py")
    arguments = [
        "--root",
        str(tmp_path / "x"),
        "--train-images",
        "2",
        "--val-images",
        "1",
        "--layout",
        "official",
        "--size",
        "64",
        "--seed",
        "3",
    ]
    assert (
        script.main(arguments) == 0
        and "Drawn: 2 training and 1 validation images." in capsys.readouterr().out
    )
    same = LipFixtureConfig(train_images=2, val_images=1, size=64, layout="official", seed=3)
    assert not generate_lip_fixture(tmp_path / "x", same)
    assert script.main(arguments) == 0 and "Already there" in capsys.readouterr().out
    assert (tmp_path / "x/TrainVal_parsing_annotations/train_segmentations").is_dir()
    assert script.main(["--root", str(tmp_path / "y"), "--size", "3"]) == 1
    assert capsys.readouterr().err == "error: LIP fixture: size is 3, but at least 48 is needed.\n"
