"""The synthetic set: labels in closed form, what the cue tells, and how files are written."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ccnet_d2.data import DatasetError, SyntheticConfig, generate_synthetic_dataset, register_synthetic
from ccnet_d2.data.datasets.synthetic import read_synthetic_manifest
from ccnet_d2.data.datasets.synthetic_scenes import (
    Scene,
    Square,
    draw_scene,
    label_scene,
    sample_rng,
    shares_line,
)

SMALL = SyntheticConfig(train_images=12, val_images=6)
XOR = replace(SMALL, object_colors=2)


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _scenes(config: SyntheticConfig, count: int) -> list[Scene]:
    return [draw_scene(config, sample_rng(config, "train", i)) for i in range(count)]


def _lines(square: dict) -> tuple[set[int], set[int]]:
    return (
        set(range(square["top"], square["top"] + square["size"])),
        set(range(square["left"], square["left"] + square["size"])),
    )


@pytest.mark.parametrize(("num_kinds", "object_colors"), [(2, 1), (2, 2), (3, 3), (4, 2)])
def test_label_files_follow_from_the_drawn_parameters(
    tmp_path: Path, num_kinds: int, object_colors: int
) -> None:
    config = replace(SMALL, num_kinds=num_kinds, object_colors=object_colors, height=50, width=64)
    generate_synthetic_dataset(tmp_path / "set", config)
    for split in ("train", "val"):
        scenes = json.loads((tmp_path / "set" / f"{split}_scenes.json").read_text())
        assert list(scenes) == (tmp_path / "set" / f"{split}.txt").read_text().split()
        assert {square["color"] for scene in scenes.values() for square in scene["objects"]} == set(
            range(object_colors)
        )
        for name, scene in scenes.items():
            label = cv2.imread(str(tmp_path / "set" / "labels" / split / f"{name}.png"), cv2.IMREAD_UNCHANGED)
            expected = [[0] * 64 for _ in range(50)]
            for square in [scene["cue"], *scene["objects"]]:
                rows, columns = _lines(square)
                value = (
                    1 if square is scene["cue"] else 2 + (square["color"] + scene["cue"]["color"]) % num_kinds
                )
                for y in rows:
                    for x in columns:
                        assert expected[y][x] == 0, "squares overlap"
                        expected[y][x] = value
            np.testing.assert_array_equal(label, expected)


def test_classes_are_colour_xor_cue_in_the_image_itself(tmp_path: Path) -> None:
    """Colours are read off the image files, knowing only which is which."""
    generate_synthetic_dataset(tmp_path / "set", XOR)
    for path in sorted((tmp_path / "set" / "images" / "train").iterdir()):
        blue, green, red = np.moveaxis(cv2.imread(str(path)).astype(float), 2, 0)
        label = cv2.imread(str(path).replace("images", "labels"), cv2.IMREAD_UNCHANGED)
        cue_is_blue = blue[label == 1].mean() > red[label == 1].mean()
        for value in (2, 3):
            if (label == value).any():
                yellow = red[label == value].mean() > 0.5 * green[label == value].mean()
                assert value == 2 + (yellow ^ cue_is_blue)


def test_by_default_the_cue_is_the_class_and_objects_look_alike(tmp_path: Path) -> None:
    generate_synthetic_dataset(tmp_path / "set", replace(SMALL, train_images=40))
    looks: dict[int, list[np.ndarray]] = {2: [], 3: []}
    for path in sorted((tmp_path / "set" / "images" / "train").iterdir()):
        image = cv2.imread(str(path)).astype(float)
        label = cv2.imread(str(path).replace("images", "labels"), cv2.IMREAD_UNCHANGED)
        blue, _, red = image[label == 1].mean(axis=0)
        (value,) = set(np.unique(label)) - {0, 1}
        assert value == (3 if blue > red else 2)
        looks[value].append(image[label == value].mean(axis=0))
    assert min(len(found) for found in looks.values()) > 8
    # Mean colour of some 250 pixels of noise 20: one grey level.
    np.testing.assert_allclose(np.mean(looks[2], axis=0), np.mean(looks[3], axis=0), atol=2)


def test_xor_in_closed_form() -> None:
    config = replace(
        SMALL, height=8, width=8, num_objects=2, min_object_size=2, max_object_size=2, cue_size=2
    )
    for cue in (0, 1):
        scene = Scene(Square(0, 0, 2, cue), (Square(5, 5, 2, 0), Square(0, 5, 2, 1)))
        label = label_scene(config, scene)
        assert label[0, 0] == 1 and label[3, 3] == 0
        assert label[5, 6] == 2 + (0 ^ cue) and label[1, 5] == 2 + (1 ^ cue)


def test_colour_alone_says_nothing_about_the_class() -> None:
    config = replace(XOR, train_images=600)
    counts = np.zeros((2, 2))
    for scene in _scenes(config, 600):
        for square in scene.objects:
            counts[square.color, square.color ^ scene.cue.color] += 1
    share = counts / counts.sum(axis=1, keepdims=True)
    # 600 fair coins: three standard deviations are 6 points.
    assert np.all(np.abs(share - 0.5) < 0.06), share


def test_most_objects_lie_off_the_cross_of_the_cue(tmp_path: Path) -> None:
    config = SyntheticConfig(train_images=300, val_images=20)
    generate_synthetic_dataset(tmp_path / "set", config)
    manifest = read_synthetic_manifest(tmp_path / "set")
    assert manifest is not None and manifest["objects"] == 320 * 5
    on_cross = 0
    for split in ("train", "val"):
        for scene in json.loads((tmp_path / "set" / f"{split}_scenes.json").read_text()).values():
            cue_rows, cue_columns = _lines(scene["cue"])
            for square in scene["objects"]:
                rows, columns = _lines(square)
                on_cross += bool(rows & cue_rows) or bool(columns & cue_columns)
    assert on_cross == manifest["objects_on_cross_of_cue"]
    assert 0.2 < on_cross / manifest["objects"] < 0.45


@pytest.mark.parametrize("most", [0, 1])
def test_max_on_cross_is_kept(most: int) -> None:
    for scene in _scenes(replace(SMALL, max_on_cross=most), 60):
        assert sum(shares_line(square, scene.cue) for square in scene.objects) <= most


def test_equal_configs_give_equal_files_and_seeds_differ(tmp_path: Path) -> None:
    for name, config in (("a", SMALL), ("b", SMALL), ("c", replace(SMALL, seed=1))):
        assert generate_synthetic_dataset(tmp_path / name, config)
    first, second, other = (_contents(tmp_path / name) for name in "abc")
    assert first == second
    images = [name for name in first if name.startswith("images")]
    assert len({first[name] for name in images} | {other[name] for name in images}) == 2 * len(images)


def test_more_images_leave_the_earlier_ones_as_they_are(tmp_path: Path) -> None:
    generate_synthetic_dataset(tmp_path / "a", SMALL)
    generate_synthetic_dataset(tmp_path / "b", replace(SMALL, train_images=20))
    few, many = _contents(tmp_path / "a"), _contents(tmp_path / "b")
    assert all(many[name] == few[name] for name in few if name.endswith(".png"))


def test_reused_remade_and_completed(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()  # an empty folder is nobody's
    assert generate_synthetic_dataset(root, SMALL)
    assert not generate_synthetic_dataset(root, SMALL)
    (root / "labels" / "val" / "val_00003.png").unlink()
    assert generate_synthetic_dataset(root, SMALL)
    assert (root / "labels" / "val" / "val_00003.png").is_file()
    assert generate_synthetic_dataset(root, replace(SMALL, noise=5.0))
    assert read_synthetic_manifest(root)["config"]["noise"] == 5.0
    assert os.listdir(tmp_path) == ["set"], "scratch folders were left behind"


def test_what_is_not_whole_or_of_another_version_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    generate_synthetic_dataset(root, SMALL)
    register_synthetic(root, prefix="tiny")
    whole = _contents(root)
    manifest = json.loads((root / "manifest.json").read_text())
    fewer = {key: value for key, value in manifest["config"].items() if key != "seed"}
    for name, content in (
        ("val_scenes.json", None),
        ("train.txt", None),
        ("labels", None),
        ("manifest.json", {**manifest, "format": 1}),
        ("manifest.json", {**manifest, "config": None}),
        ("manifest.json", {**manifest, "config": fewer}),
    ):
        if content is not None:
            (root / name).write_text(json.dumps(content))
        elif (root / name).is_dir():
            shutil.rmtree(root / name)
        else:
            (root / name).unlink()
        with pytest.raises(DatasetError, match="There is no complete synthetic data set in"):
            DatasetCatalog.get("tiny_val")
        assert generate_synthetic_dataset(root, SMALL)
        assert _contents(root) == whole


def test_a_manifest_that_cannot_be_read_is_anothers(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DatasetError, match="holds something other than a synthetic data set"):
        generate_synthetic_dataset(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("manifest", ["{", "[]", '{"generator": "another program"}', "\xff"])
def test_manifests_of_others_are_left_alone(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(DatasetError, match="something other than a synthetic data set"):
        generate_synthetic_dataset(tmp_path, SMALL)
    assert _contents(tmp_path) == {"manifest.json": manifest.encode("latin-1")}


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DatasetError, match="something other than a synthetic data set"):
        generate_synthetic_dataset(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(DatasetError, match="something other"):
        generate_synthetic_dataset(tmp_path / "thesis.tex", SMALL)
    with pytest.raises(DatasetError, match="Cannot write"):
        generate_synthetic_dataset(tmp_path / "thesis.tex" / "set", SMALL)


def test_several_processes_may_ask_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    config = replace(SMALL, train_images=60)
    generate_synthetic_dataset(tmp_path / "set", SMALL)  # so that they also have something to replace
    with context.Pool(4) as pool:
        written = pool.starmap(generate_synthetic_dataset, [(tmp_path / "set", config)] * 4)
    assert any(written)
    assert not generate_synthetic_dataset(tmp_path / "set", config)
    assert os.listdir(tmp_path) == ["set"]


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from ccnet_d2.data import *\n"
        # Jobs in the background of a shell inherit SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('go', flush=True)\n"
        "generate_synthetic_dataset(sys.argv[1], SyntheticConfig(train_images=100000))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".set-*/new/images/train/*9.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    process.stdout.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kinds": 5}, "num_kinds is 5, outside 2 to 4"),
        ({"object_colors": 3}, "object_colors is 3, outside 1 to num_kinds"),
        ({"train_images": 0}, "train_images is 0"),
        ({"width": 7}, "width is 7, but a square of 8 pixels has to fit"),
        ({"max_object_size": 3}, "max_object_size is 3"),
        ({"seed": -1}, "seed is -1"),
        ({"noise": -1.0}, "noise is -1.0"),
    ],
)
def test_bad_parameters(changes: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        replace(SMALL, **changes)


def test_objects_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no room for 40 objects"):
        generate_synthetic_dataset(tmp_path / "set", replace(SMALL, num_objects=40))
    assert os.listdir(tmp_path) == []


def test_registered_lazily_and_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    register_synthetic("~/set", prefix="tiny")
    with pytest.raises(DatasetError, match=r"make_synthetic_dataset.py"):
        DatasetCatalog.get("tiny_train")
    generate_synthetic_dataset("~/set", SMALL)
    samples = DatasetCatalog.get("tiny_val")
    assert [os.path.basename(s["file_name"]) for s in samples] == [f"val_{i:05d}.png" for i in range(6)]
    metadata = MetadataCatalog.get("tiny_val")
    assert metadata.stuff_classes == ["background", "cue", "object A", "object B"]
    assert len(metadata.stuff_colors) == 4 and metadata.ignore_label == 255
    assert metadata.evaluator_type == "sem_seg"

    generate_synthetic_dataset(tmp_path / "set", replace(SMALL, num_kinds=3))
    with pytest.raises(DatasetError, match="has 3 object classes, but 2 are registered"):
        DatasetCatalog.get("tiny_val")
