"""The script that reads a data set and says what is wrong with it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

from ccnet_d2.data import register_sem_seg_folder
from ccnet_d2.data.check import check_dataset
from tests.scripts import PROJECT, load_script

SCRIPT = PROJECT / "tools/check_dataset.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("tools/check_dataset.py")


def _write(root: Path, labels: dict[str, np.ndarray]) -> None:
    for name, label in labels.items():
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "labels" / f"{name}.png"), label)
        cv2.imwrite(str(root / "images" / f"{name}.png"), np.zeros((*label.shape, 3), np.uint8))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Two sound data sets, `checked_train` and `checked_val`, of three classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        labels = {str(i): rng.choice([0, 1, 2, 255], (8, 10)).astype(np.uint8) for i in range(3)}
        _write(tmp_path / split, labels)
        register_sem_seg_folder(
            f"checked_{split}",
            tmp_path / split / "images",
            tmp_path / split / "labels",
            ["sky", "road", "car"],
        )
    return tmp_path


NAMES = ["checked_train", "checked_val"]


def _label(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_sound_sets_pass_with_the_right_histogram(
    script: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(NAMES) == 0
    out = capsys.readouterr().out
    assert "No problems found." in out and "problem:" not in out
    labels = np.stack([_label(path) for path in (sets / "train" / "labels").iterdir()])
    report = check_dataset("checked_train", threads=2)
    for value in range(3):
        assert report.pixels[value] == (labels == value).sum()
        assert report.images[value] == (labels == value).any(axis=(1, 2)).sum()
    assert report.void == (labels == 255).sum() and report.samples == 3
    assert f"road {report.pixels[1]:>18}".split() == ["road", str(report.pixels[1])]
    assert any(line.split()[:3] == ["1", "road", str(report.pixels[1])] for line in out.splitlines())


def _break(root: Path, how: str) -> None:
    labels, images = root / "labels", root / "images"
    if how == "value":
        label = _label(labels / "1.png")
        label[0, 0] = 77
        cv2.imwrite(str(labels / "1.png"), label)
    elif how == "mask":
        for path in labels.iterdir():
            cv2.imwrite(str(path), np.where(_label(path) == 1, 255, 0).astype(np.uint8))
    elif how == "from one":
        for path in labels.iterdir():
            cv2.imwrite(str(path), np.minimum(_label(path), 2) + 1)
    elif how == "colours":
        cv2.imwrite(str(labels / "1.png"), np.zeros((8, 10, 3), np.uint8))
    elif how == "size":
        cv2.imwrite(str(images / "1.png"), np.zeros((8, 11, 3), np.uint8))
    elif how == "truncated":
        (images / "1.png").write_bytes((images / "1.png").read_bytes()[:-5])
    elif how == "pair":
        (labels / "1.png").unlink()
    elif how == "coverage":
        for path in labels.iterdir():
            cv2.imwrite(str(path), np.where(_label(path) == 2, 0, _label(path)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("value", "The value 77 occurs in 1 label map, such as"),
        ("mask", "hold only 0 and 255, like black and white masks"),
        ("from one", "The value 3 occurs in 3 label maps"),
        ("colours", "has 3 channels"),
        ("size", "is 10x8, but its image"),
        ("truncated", "is truncated"),
        ("coverage", "Class 2 'car' occurs in 'checked_val' but never in 'checked_train'."),
    ],
)
def test_problems_are_named_and_counted(
    script: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str], how: str, message: str
) -> None:
    _break(sets / "train", how)
    assert script.main(NAMES) == 1
    out = capsys.readouterr().out
    assert sum(line.startswith("  problem: ") and message in line for line in out.splitlines()) == 1, out
    assert "found." in out.splitlines()[-1] and "No problems" not in out


def test_labels_from_one_are_recognised(sets: Path) -> None:
    _break(sets / "train", "from one")
    assert any("may start at 1" in note for note in check_dataset("checked_train").notes)
    # A single wrong pixel of that value says nothing of the kind where 0 occurs.
    label = _label(sets / "val" / "labels" / "1.png")
    label[0, 0] = 3
    cv2.imwrite(str(sets / "val" / "labels" / "1.png"), label)
    report = check_dataset("checked_val")
    assert len(report.problems) == 1 and report.notes == []


def test_missing_pairs_and_folders(
    script: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _break(sets / "train", "pair")
    assert script.main(NAMES) == 1
    captured = capsys.readouterr()
    assert "error: Data set 'checked_train': " in captured.err and "no label map for '1'" in captured.err
    assert "checked_val: 3 samples" in captured.out  # the other one is still checked
    os.rename(sets / "val" / "images", sets / "val" / "gone")
    assert script.main(["checked_val"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert script.main(["checked_vla"]) == 1
    assert "did you mean 'checked_val'" in capsys.readouterr().err


def test_pairs_that_detectron2_mixes_up(sets: Path) -> None:
    """As many images as label maps, but of other names: its loader pairs them by their order."""
    images, labels = str(sets / "val" / "images"), str(sets / "val" / "labels")
    name = "checked_by_detectron2"
    DatasetCatalog.register(name, lambda: load_sem_seg(labels, images, image_ext="png"))
    MetadataCatalog.get(name).set(
        stuff_classes=["sky", "road", "car"], ignore_label=255, image_root=images, sem_seg_root=labels
    )
    try:
        assert check_dataset(name).problems == []
        os.rename(sets / "val" / "labels" / "2.png", sets / "val" / "labels" / "9.png")
        (problem,) = check_dataset(name).problems
        assert "no image for '9'" in problem
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_void_maps_and_absent_classes_are_notes(
    script: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(sets / "train" / "labels" / "0.png"), np.full((8, 10), 255, np.uint8))
    _break(sets / "val", "coverage")
    assert script.main(NAMES) == 0
    out = capsys.readouterr().out
    assert "note: 1 label map is void throughout" in out
    assert "note: Class 2 'car' never occurs in 'checked_val'" in out


def test_maps_of_nothing_but_void_are_a_problem(sets: Path) -> None:
    for path in (sets / "train" / "labels").iterdir():
        cv2.imwrite(str(path), np.full((8, 10), 255, np.uint8))
    report = check_dataset("checked_train")
    assert report.problems == ["Every label map is void throughout: no pixel is of a class, all are 255."]
    assert not report.notes


def test_a_video_of_which_some_frames_have_label_maps(
    script: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What runs on clips train on."""
    name = "checked_video"
    frames = DatasetCatalog.get("checked_train")
    bare = {"file_name": str(sets / "bare.png")}
    cv2.imwrite(bare["file_name"], np.zeros((8, 10, 3), np.uint8))
    DatasetCatalog.register(name, lambda: [frames[0], bare, *frames[1:]])
    MetadataCatalog.get(name).set(stuff_classes=["sky", "road", "car"], ignore_label=255)
    try:
        assert script.main([name]) == 0
        out = capsys.readouterr().out
        assert (
            f"note: 1 of 4 samples have no label map, such as '{bare['file_name']}': for runs on clips" in out
        )
        assert check_dataset(name).pixels.tolist() == check_dataset("checked_train").pixels.tolist()
        (sets / "bare.png").write_bytes(b"")
        (problem,) = check_dataset(name).problems
        assert "bare.png' is an empty file" in problem
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_labels_only_does_not_read_images(script: ModuleType, sets: Path) -> None:
    _break(sets / "train", "truncated")
    assert script.main([*NAMES, "--labels-only"]) == 0
    assert script.main(NAMES) == 1


def test_many_problems_are_cut_short(
    script: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    for path in (sets / "train" / "labels").iterdir():
        cv2.imwrite(str(path), rng.integers(0, 200, (8, 10), dtype=np.uint8))
    assert script.main(["checked_train", "--max-problems", "2"]) == 1
    out = capsys.readouterr().out
    assert out.count("  problem: ") == 3 and "more; see them with --max-problems" in out
    assert script.main(["checked_train", "--max-problems", "0"]) == 1
    found = re.search(r"^(\d+) problems found\.$", capsys.readouterr().out, re.MULTILINE)
    assert found is not None and f"… and {int(found[1]) - 2} more;" in out
    with pytest.raises(SystemExit):  # of which a slice makes all but the last
        script.main(["checked_train", "--max-problems", "-1"])
    assert "--max-problems must be at least 0" in capsys.readouterr().err


CONFIG = """
from omegaconf import OmegaConf
from ccnet_d2.data import register_sem_seg_folder

for split in ("train", "val"):
    folders = f"{root}/{{split}}/images", f"{root}/{{split}}/labels"
    register_sem_seg_folder(f"mine_{{split}}", *folders, {classes})
dataloader = OmegaConf.create(
    {{"train": {{"dataset": {{"names": "mine_train"}}}}, "test": {{"dataset": {{"names": "mine_val"}}}}}}
)
"""


def test_config_file_on_the_command_line(sets: Path) -> None:
    """The script as a user runs it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    results = []
    for classes in (["sky", "road", "car"], ["sky", "road"]):
        config = sets / "my_run.py"
        config.write_text(CONFIG.format(root=sets, classes=classes))
        command = [sys.executable, str(SCRIPT), "--config-file", str(config)]
        results.append(subprocess.run(command, env=env, capture_output=True, text=True))
    sound, wrong = results
    assert sound.returncode == 0 and "mine_val: 3 samples, 3 classes" in sound.stdout
    assert wrong.returncode == 1 and "The value 2 occurs in 3 label maps" in wrong.stdout
    assert "Traceback" not in sound.stderr + wrong.stderr


def test_sets_trained_on_together_are_compared_together(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, values in (("day", [0, 1]), ("night", [2]), ("val", [0, 1, 2])):
        _write(tmp_path / name, {"0": np.resize(np.array(values, np.uint8), (8, 10))})
        register_sem_seg_folder(
            f"parts_{name}", tmp_path / name / "images", tmp_path / name / "labels", ["sky", "road", "car"]
        )
    config = tmp_path / "my_run.py"
    names = 'dict(train=dict(dataset=dict(names={})), test=dict(dataset=dict(names="parts_val")))'
    config.write_text("dataloader = " + names.format(["parts_day", "parts_night"]))
    assert script.main(["--config-file", str(config)]) == 0
    assert "against" not in capsys.readouterr().out
    config.write_text("dataloader = " + names.format(["parts_day"]))
    assert script.main(["--config-file", str(config)]) == 1
    assert "problem: Class 2 'car' occurs in 'parts_val' but never in 'parts_day'." in capsys.readouterr().out


def test_yacs_config(script: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = sets / "my_run.yaml"
    config.write_text("VERSION: 2\nDATASETS:\n  TRAIN: [checked_train]\n  TEST: [checked_val]\n")
    assert script.main(["--config-file", str(config)]) == 0
    out = capsys.readouterr().out
    assert "checked_train: 3 samples" in out and "checked_val: 3 samples, 3 classes" in out
    config.write_text("VERSION: 2\n")
    assert script.main(["--config-file", str(config)]) == 1
    assert capsys.readouterr().err == f"error: The config file '{config}' has no DATASETS.TRAIN.\n"


def test_config_file_that_is_not_there(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--config-file", "nowhere.py"]) == 1
    assert capsys.readouterr().err.startswith("error: There is no config 'nowhere.py'")
    with pytest.raises(SystemExit):
        script.main([])


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("net.pth", "", r"Config file \S+/net\.pth has to be a python or yaml file\."),
        (
            "run.py",
            "dataloader = {'train': {'dataset': {'names': '${data.names}'}}}",
            r"Interpolation key 'data\.names' not found \(config key dataloader\.train\.dataset\.names\)\.",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_one_sentence(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    sentence: str,
) -> None:
    (tmp_path / name).write_text(text)
    assert script.main(["--config-file", str(tmp_path / name)]) == 1
    assert re.fullmatch(rf"error: {sentence}\n", capsys.readouterr().err)
