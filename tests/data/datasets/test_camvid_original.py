"""CamVid's original release: 32 colours to 11 classes, and the usual split."""

import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccnet_d2.data import DatasetError, SampleError, SemSegMapper, get_sem_seg_dataset_dicts, register_all
from ccnet_d2.data.datasets.camvid import CAMVID_CLASSES, CAMVID_COLORS
from ccnet_d2.data.datasets.camvid_original import (
    ORIGINAL_CLASSES,
    colors_to_labels,
    convert_camvid,
    split_of,
)
from tests.scripts import load_script

# The release's label_colors.txt and the grouping of the SegNet benchmark, written down a second time.
GROUPS = {
    "Sky": ["128 128 128"],
    "Building": ["128 0 0", "0 128 64", "64 192 0", "64 0 64", "192 0 128"],
    "Pole": ["192 192 128", "0 0 64"],
    "Road": ["128 64 128", "128 0 192", "192 0 64"],
    "Pavement": ["0 0 192", "64 192 128", "128 128 192"],
    "Tree": ["128 128 0", "192 192 0"],
    "SignSymbol": ["192 128 128", "128 128 64", "0 64 64"],
    "Fence": ["64 64 128"],
    "Car": ["64 0 128", "64 128 192", "192 128 192", "192 64 128", "128 64 64"],
    "Pedestrian": ["64 64 0", "192 128 64", "64 0 192", "64 128 64"],
    "Bicyclist": ["0 128 192", "192 0 192"],
    None: ["0 0 0"],
}
COLORS = [(tuple(map(int, text.split())), group) for group, texts in GROUPS.items() for text in texts]


def write(root: Path, name: str, colors: np.ndarray) -> None:
    for folder in ("701_StillsRaw_full", "LabeledApproved_full"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, colors.shape, dtype=np.uint8)
    Image.fromarray(image).save(root / "701_StillsRaw_full" / f"{name}.png")
    Image.fromarray(colors).save(root / "LabeledApproved_full" / f"{name}_L.png")


def all_colors() -> np.ndarray:
    """(8, 16, 3): each of the 32 colours in a block of 2x2."""
    return np.kron(
        np.array([color for color, _ in COLORS], np.uint8).reshape(4, 8, 3), np.ones((2, 2, 1), np.uint8)
    )


def test_every_colour_becomes_its_class():
    assert (
        len(COLORS) == len(ORIGINAL_CLASSES) == len({color for color, _ in ORIGINAL_CLASSES.values()}) == 32
    )
    labels, unknown = colors_to_labels(all_colors())
    expected = [11 if group is None else CAMVID_CLASSES.index(group) for _, group in COLORS]
    assert labels.dtype == np.uint8 and unknown == 0
    assert labels[::2, ::2].ravel().tolist() == expected == labels[1::2, 1::2].ravel().tolist()
    strange = np.array([[[1, 2, 3], [255, 255, 255], [0, 0, 0]]], np.uint8)
    labels, unknown = colors_to_labels(strange)
    assert labels.tolist() == [[11, 11, 11]] and unknown == 2


def test_classes_stand_in_the_benchmark_s_order_with_the_release_s_colours():
    """The label maps of SegNet's layout hold the numbers, so the order is what gives a number its name."""
    first = {group: tuple(map(int, texts[0].split())) for group, texts in GROUPS.items() if group}
    assert tuple(first) == CAMVID_CLASSES
    first["Pavement"] = (60, 40, 222)  # SegNet's own
    assert tuple(first.values()) == CAMVID_COLORS


def test_the_split_has_the_sizes_of_the_benchmark():
    # The frames of the release, sequence by sequence (the gaps of 0016E5 are where it has no labels).
    frames = [f"0001TP_{n:06d}" for n in range(6690, 10381, 30)]
    frames += [f"0006R0_f{n:05d}" for n in range(930, 3931, 30)]
    frames += [f"0016E5_{n:05d}" for n in range(7959, 8160, 2)]
    frames += [f"Seq05VD_f{n:05d}" for n in range(0, 5101, 30)]
    found = Counter(split_of(name) for name in frames)
    assert found == {"train": 62 + 101, "val": 101, "test": 62 + 171}
    assert split_of("0016E5_00390") == split_of("0016E5_08640") == "train"
    for name in ("holiday", "0016E5_07959 copy"):
        with pytest.raises(DatasetError, match=f"'{name}' is no name of a CamVid frame"):
            split_of(name)


def test_the_split_is_that_of_the_segnet_copy():
    from ccnet_d2.data import dataset_root

    folder = Path(dataset_root()) / "camvid"
    if not (folder / "train").is_dir():
        pytest.skip("CamVid is not in $DETECTRON2_DATASETS")
    for split in ("train", "val", "test"):
        names = [path.stem for path in (folder / split).glob("*")]
        assert {split_of(name) for name in names} <= {split}
    assert len(list((folder / "train").glob("*"))) == 367


def test_from_the_release_to_the_loader(tmp_path, monkeypatch):
    root = tmp_path / "camvid_original"
    colors = all_colors()
    for name in ("0001TP_006690", "0006R0_f00930", "0016E5_07959", "0001TP_008550", "Seq05VD_f00030"):
        write(root, name, colors)
    seen = []
    report = convert_camvid(root, progress=lambda done, total: seen.append((done, total)))
    assert report.frames == {"train": 2, "val": 1, "test": 2} and seen == [(i, 5) for i in range(1, 6)]
    assert report.notes[0] == "train has 2 frames, the release 367."
    assert sorted(path.name for path in root.iterdir()) == [
        "701_StillsRaw_full",
        "LabeledApproved_full",
        "labels_11",
        "test.txt",
        "train.txt",
        "val.txt",
    ]
    register_all(tmp_path)
    samples = {
        split: get_sem_seg_dataset_dicts(f"camvid_original_sem_seg_{split}") for split in report.frames
    }
    assert [sample["image_id"] for sample in samples["test"]] == ["0001TP_008550", "Seq05VD_f00030"]
    mapped = SemSegMapper(True, augmentations=[], dataset_names="camvid_original_sem_seg_train")(
        samples["train"][0]
    )
    expected = [255 if group is None else CAMVID_CLASSES.index(group) for _, group in COLORS]
    assert mapped["sem_seg"][::2, ::2].flatten().tolist() == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert_camvid("~/camvid_original").frames == report.frames  # again, over what is there


def test_labels_may_lie_on_another_disk_and_killed_runs_leave_nothing(tmp_path):
    root, disk = tmp_path / "camvid_original", tmp_path / "disk" / "labels"
    write(root, "0016E5_07959", all_colors())
    disk.mkdir(parents=True)
    (root / "labels_11").symlink_to(disk)
    # SIGKILL leaves no chance to clean up.
    code = (
        "import os, sys; from ccnet_d2.data.datasets.camvid_original import convert_camvid; "
        "convert_camvid(sys.argv[1], progress=lambda *_: os.kill(os.getpid(), 9))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(root)], check=False).returncode == -9
    assert len(list(disk.parent.iterdir())) == 2
    convert_camvid(root)
    assert [path.name for path in disk.iterdir()] == ["0016E5_07959.png"]
    assert list(disk.parent.iterdir()) == [disk] and (root / "labels_11").is_symlink()


def test_two_at_once(tmp_path):
    for name in ("0001TP_006690", "0016E5_07959"):
        write(tmp_path, name, all_colors())
    turns = iter([True])

    def meanwhile(done: int, total: int) -> None:
        if next(turns, False):
            convert_camvid(tmp_path)

    assert convert_camvid(tmp_path, progress=meanwhile).frames == {"train": 1, "val": 1, "test": 0}
    assert len(list((tmp_path / "labels_11").iterdir())) == 2 and not list(tmp_path.glob(".*"))


def test_unknown_colours_are_void_up_to_one_percent(tmp_path):
    colors = np.tile(all_colors(), (4, 4, 1))
    colors[:2, :10] = (7, 7, 7)
    write(tmp_path, "0001TP_006690", colors)
    write(tmp_path, "0001TP_006720", all_colors())
    assert "20 pixels in 1 label files" in convert_camvid(tmp_path).notes[-1]
    before = (tmp_path / "labels_11" / "0001TP_006690.png").read_bytes()
    colors[:2, :21] = (7, 7, 7)
    write(tmp_path, "0001TP_006690", colors)
    with pytest.raises(SampleError, match=r"0001TP_006690_L\.png' has 2\.1 % of its pixels in colours"):
        convert_camvid(tmp_path)
    # What was there is still there.
    assert (tmp_path / "labels_11" / "0001TP_006690.png").read_bytes() == before
    assert not list(tmp_path.glob(".*part"))


def test_files_that_macos_leaves_are_no_frames(tmp_path):
    write(tmp_path, "0016E5_07959", all_colors())
    (tmp_path / "701_StillsRaw_full" / "._0016E5_07959.png").write_bytes(b"resource fork")
    (tmp_path / "LabeledApproved_full" / "._0016E5_07959_L.png").write_bytes(b"resource fork")
    assert convert_camvid(tmp_path).frames == {"train": 0, "val": 1, "test": 0}


def test_other_files_are_no_frames(tmp_path):
    write(tmp_path, "0016E5_07959", all_colors())
    images, labels = tmp_path / "701_StillsRaw_full", tmp_path / "LabeledApproved_full"
    (images / "Thumbs.db").touch()
    (labels / "label_colors.txt").touch()
    (images / "0016E5_07959.png").rename(images / "0016E5_07959.PNG")
    report = convert_camvid(tmp_path)
    assert report.frames == {"train": 0, "val": 1, "test": 0}
    assert [note.split()[0] for note in report.notes] == ["train", "val", "test"]  # none of unknown colours
    for path in (images / "0016E5_07959.PNG", labels / "0016E5_07959_L.png"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"^'.*701_StillsRaw_full' holds no images\.$"):
        convert_camvid(tmp_path)


def test_a_list_that_cannot_be_written_is_one_sentence(tmp_path):
    write(tmp_path, "0016E5_07959", all_colors())
    (tmp_path / "val.txt").mkdir()
    with pytest.raises(DatasetError, match=r"'.*val\.txt' cannot be written: Is a directory"):
        convert_camvid(tmp_path)


def test_a_label_map_that_cannot_be_written_whole_is_said(tmp_path):
    """OpenCV's imwrite says that it wrote a small file on a full disk; a limit on files' sizes does the same to it."""
    write(tmp_path, "0016E5_07959", all_colors())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(DatasetError, match="cannot be written: File too large"):
            convert_camvid(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "labels_11").exists() and not (tmp_path / "val.txt").exists()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(
        DatasetError, match=r"701_StillsRaw_full' does not exist: unpack CamVid's 701_StillsRaw_full\.zip"
    ):
        convert_camvid(tmp_path)
    write(tmp_path, "0001TP_006690", all_colors())
    write(tmp_path, "0001TP_006720", all_colors())
    (tmp_path / "LabeledApproved_full" / "0001TP_006720_L.png").unlink()
    with pytest.raises(
        DatasetError, match=r"LabeledApproved_full' has nothing for '0001TP_006720' \(1 missing"
    ):
        convert_camvid(tmp_path)
    (tmp_path / "701_StillsRaw_full" / "0001TP_006720.png").rename(
        tmp_path / "LabeledApproved_full" / "A_1_L.png"
    )
    with pytest.raises(DatasetError, match=r"701_StillsRaw_full' has nothing for 'A_1' \(1 missing"):
        convert_camvid(tmp_path)
    register_all(tmp_path / "elsewhere")
    with pytest.raises(
        DatasetError, match=r"Unpack CamVid's original release .* run projects/CCNet/tools/prepare_camvid"
    ):
        get_sem_seg_dataset_dicts("camvid_original_sem_seg_train")


def test_the_tool(tmp_path, monkeypatch, capsys):
    tool = load_script("tools/prepare_camvid.py")
    root = tmp_path / "camvid_original"
    write(root, "0016E5_07959", all_colors())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for arguments in ([], [str(root)]):
        assert tool.main(arguments) == 0
        counts, *notes = capsys.readouterr().out.splitlines()
        assert counts == "train: 0 frames, val: 1 frames, test: 0 frames"
        assert notes[1] == "note: val has 1 frames, the release 101."
    assert tool.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: '")
