"""What is said of a data set, on label maps of a few pixels."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ccnet_d2.data import register_sem_seg_folder
from ccnet_d2.data.check import DatasetReport, check_coverage, check_dataset, format_report

CLASSES = ["sky", "road", "car"]

pytestmark = pytest.mark.usefixtures("catalogs_as_before")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[int]], dict[str, str]]:
    def write_one(name: str, values: list[int]) -> dict[str, str]:
        label = np.array([values], np.uint16 if max(values) > 255 else np.uint8)
        files = {"file_name": tmp_path / "images" / name, "sem_seg_file_name": tmp_path / "labels" / name}
        for key, image in (
            ("file_name", np.zeros((1, len(values), 3), np.uint8)),
            ("sem_seg_file_name", label),
        ):
            files[key].parent.mkdir(exist_ok=True)
            cv2.imwrite(str(files[key]), image)
        return {key: str(path) for key, path in files.items()}

    return write_one


@pytest.mark.parametrize(
    ("maps", "ignore", "problems", "notes"),
    [
        ([[0, 1, 1], [2, 255, 2]], 255, [], []),
        ([[0, 255]], 255, ["since 255 is void here."], []),
        ([[0, 255]], 254, ["since 255 is no class here."], []),
        ([[1, 2, 3]], 255, ["The value 3 occurs in 1 label map, such as"], ["the labels may start at 1"]),
        ([[1, 2, 77], [77]], 255, ["The value 77 occurs in 2 label maps, such as"], []),
        ([[1, 2, 3]], 3, [], []),  # the first class occurs nowhere, and void is the number after the last
        (
            [[0, *range(900, 909)]],
            255,
            [
                *(f"The value {value} occurs in 1 label map," for value in range(900, 908)),
                "So do the values 908.",
            ],
            [],
        ),
        ([[255], [255], [0, 1]], 255, [], ["2 label maps are void throughout, such as"]),
    ],
)
def test_values(tmp_path, write, maps, ignore, problems, notes):
    for number, values in enumerate(maps):
        write(f"{number}.png", values)
    register_sem_seg_folder("few", tmp_path / "images", tmp_path / "labels", CLASSES, ignore_label=ignore)
    report = check_dataset("few")
    for found, expected in ((report.problems, problems), (report.notes, notes)):
        assert len(found) == len(expected), found
        assert all(words in sentence for words, sentence in zip(expected, found, strict=True)), found
        assert all(
            "such as" not in words or f"such as '{tmp_path / 'labels'}/" in words for words in found
        ), found
    flat = [value for values in maps for value in values]
    assert report.pixels.tolist() == [flat.count(value) for value in range(3)]
    assert report.images.tolist() == [sum(value in values for values in maps) for value in range(3)]
    assert report.void == flat.count(ignore) and report.samples == len(maps)


def test_a_list_may_leave_out_what_has_no_partner(tmp_path, write):
    write("a.png", [0, 1])
    Path(write("b.png", [0, 1])["sem_seg_file_name"]).unlink()
    (tmp_path / "list.txt").write_text("a\n")
    folders = tmp_path / "images", tmp_path / "labels"
    register_sem_seg_folder("few", *folders, CLASSES, split_file=tmp_path / "list.txt")
    assert check_dataset("few").problems == []


def test_pairs_whose_names_follow_another_rule_are_no_problem(tmp_path, write):
    """As those of Cityscapes, which Detectron2 registers with its folders."""
    samples = []
    for name in "ab":
        sample = write(f"{name}.png", [0, 1])
        label = Path(sample["sem_seg_file_name"])
        samples.append({**sample, "sem_seg_file_name": str(label.rename(label.with_name(f"{name}_ids.png")))})
    DatasetCatalog.register("theirs", lambda: samples)
    MetadataCatalog.get("theirs").set(
        stuff_classes=CLASSES,
        ignore_label=255,
        image_root=str(tmp_path / "images"),
        sem_seg_root=str(tmp_path / "labels"),
    )
    assert check_dataset("theirs").problems == []


def test_frames_without_label_maps_are_not_void(write):
    samples = [write("a.png", [255, 255]), {"file_name": write("b.png", [0, 0])["file_name"]}]
    DatasetCatalog.register("video", lambda: samples)
    MetadataCatalog.get("video").set(stuff_classes=CLASSES, ignore_label=255)
    seen = []
    report = check_dataset("video", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert report.problems == ["Every label map is void throughout: no pixel is of a class, all are 255."]
    assert len(report.notes) == 1 and "1 of 2 samples have no label map" in report.notes[0]


def test_images_are_left_out_where_they_are_not_wanted(tmp_path, write):
    Path(write("a.png", [0, 1])["file_name"]).write_bytes(b"damaged")
    register_sem_seg_folder("few", tmp_path / "images", tmp_path / "labels", CLASSES)
    assert check_dataset("few", with_images=False).problems == []
    assert len(check_dataset("few").problems) == 1


def test_sizes_that_the_records_name_are_compared_as_in_training(write):
    samples = [
        {**write(f"{name}.png", [0, 1]), "height": 1, "width": width} for name, width in (("a", 2), ("b", 3))
    ]
    DatasetCatalog.register("sized", lambda: samples)
    MetadataCatalog.get("sized").set(stuff_classes=CLASSES, ignore_label=255)
    (problem,) = check_dataset("sized").problems
    assert problem == f"The image '{samples[1]['file_name']}' is 2x1, but the data set says 3x1."
    assert check_dataset("sized", with_images=False).problems == []


def report_of(name: str, *pixels: int, classes: list[str] | None = None) -> DatasetReport:
    classes = classes or ["sky", "road", "car", "sign"]
    return DatasetReport(name, classes, 255, pixels=np.array(pixels), images=np.array(pixels) // 10)


def test_coverage():
    train = [report_of("day", 10, 0, 10, 0), report_of("night", 10, 10, 0, 0)]
    assert check_coverage(train, report_of("val", 10, 10, 0, 0)) == (
        [],
        [
            "Class 2 'car' never occurs in 'val', so its IoU is not known.",
            "Class 3 'sign' occurs in none of the sets.",
        ],
    )
    assert check_coverage(train, report_of("val", 10, 10, 10, 10)) == (
        ["Class 3 'sign' occurs in 'val' but never in 'day' or 'night'."],
        [],
    )
    other = report_of("val", 10, 10, 10, 10, classes=["road", "sky", "car", "sign"])
    problems = [f"'{name}' and 'val' do not have the same classes." for name in ("day", "night")]
    assert check_coverage(train, other) == (problems, [])


def test_shares_of_the_table():
    """Of a class among what is labelled, of void among all."""
    report = report_of("few", 30, 10, 0, 0)
    report.void = 60
    rows = [line.split() for line in format_report(report).splitlines()[2:]]
    assert rows == [
        ["0", "sky", "30", "75.000%", "3"],
        ["1", "road", "10", "25.000%", "1"],
        ["2", "car", "0", "0.000%", "0"],
        ["3", "sign", "0", "0.000%", "0"],
        ["void", "60", "60.000%", "(of", "all", "pixels)"],
    ]
    empty = format_report(report_of("none", 0, 0, 0, 0))
    assert empty.count("0.000%") == 5
