"""CamVid as its authors release it: 701 frames of 960x720, labels as colours of 32 classes.

The 11 classes of the usual benchmark (SegNet) are groups of the 32. Labels are converted once, into label maps of
class indices beside the release, together with the lists of the usual split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ccnet_d2.atomic_folder import replace_folder
from ccnet_d2.data.datasets.camvid import (
    CAMVID_CLASSES,
    CAMVID_IGNORE_LABEL,
    ORIGINAL_IMAGES,
    ORIGINAL_LABELS,
)
from ccnet_d2.data.datasets.folder import IMAGE_SUFFIXES
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.image_files import read_image, write_bgr
from ccnet_d2.data.mat_labels import write_list

__all__ = [
    "ORIGINAL_CLASSES",
    "SOURCE_LABELS",
    "ConversionReport",
    "colors_to_labels",
    "convert_camvid",
    "split_of",
]

SOURCE_LABELS = "LabeledApproved_full"

ORIGINAL_CLASSES: dict[str, tuple[tuple[int, int, int], str | None]] = {
    "Animal": ((64, 128, 64), "Pedestrian"),
    "Archway": ((192, 0, 128), "Building"),
    "Bicyclist": ((0, 128, 192), "Bicyclist"),
    "Bridge": ((0, 128, 64), "Building"),
    "Building": ((128, 0, 0), "Building"),
    "Car": ((64, 0, 128), "Car"),
    "CartLuggagePram": ((64, 0, 192), "Pedestrian"),
    "Child": ((192, 128, 64), "Pedestrian"),
    "Column_Pole": ((192, 192, 128), "Pole"),
    "Fence": ((64, 64, 128), "Fence"),
    "LaneMkgsDriv": ((128, 0, 192), "Road"),
    "LaneMkgsNonDriv": ((192, 0, 64), "Road"),
    "Misc_Text": ((128, 128, 64), "SignSymbol"),
    "MotorcycleScooter": ((192, 0, 192), "Bicyclist"),
    "OtherMoving": ((128, 64, 64), "Car"),
    "ParkingBlock": ((64, 192, 128), "Pavement"),
    "Pedestrian": ((64, 64, 0), "Pedestrian"),
    "Road": ((128, 64, 128), "Road"),
    "RoadShoulder": ((128, 128, 192), "Pavement"),
    "Sidewalk": ((0, 0, 192), "Pavement"),
    "SignSymbol": ((192, 128, 128), "SignSymbol"),
    "Sky": ((128, 128, 128), "Sky"),
    "SUVPickupTruck": ((64, 128, 192), "Car"),
    "TrafficCone": ((0, 0, 64), "Pole"),
    "TrafficLight": ((0, 64, 64), "SignSymbol"),
    "Train": ((192, 64, 128), "Car"),
    "Tree": ((128, 128, 0), "Tree"),
    "Truck_Bus": ((192, 128, 192), "Car"),
    "Tunnel": ((64, 0, 64), "Building"),
    "VegetationMisc": ((192, 192, 0), "Tree"),
    "Void": ((0, 0, 0), None),
    "Wall": ((64, 192, 0), "Building"),
}
"""The 32 classes: colour (RGB, of the release's label_colors.txt) and the one of the 11 that it belongs to."""

SPLIT_SIZES = {"train": 367, "val": 101, "test": 233}
_NAME = re.compile(r"(?P<sequence>\w+)_f?(?P<frame>\d+)")
_TOLERATED_SHARE_UNKNOWN = 0.01


@dataclass
class ConversionReport:
    """What `convert_camvid` wrote: frames of each split, and sentences on what is not as in the release."""

    frames: dict[str, int]
    notes: list[str] = field(default_factory=list)


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Colours as sorted 24-bit codes, (32,), and the label of each, (32,) uint8."""
    codes, labels = [], []
    for (red, green, blue), group in ORIGINAL_CLASSES.values():
        codes.append(red << 16 | green << 8 | blue)
        labels.append(CAMVID_IGNORE_LABEL if group is None else CAMVID_CLASSES.index(group))
    order = np.argsort(codes)
    return np.array(codes)[order], np.array(labels, np.uint8)[order]


_CODES, _LABELS = _table()


def colors_to_labels(colors: np.ndarray) -> tuple[np.ndarray, int]:
    """Label map of 11 classes from colours of the 32.

    Args:
        colors: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) uint8, void 11; and the number of pixels of a colour that is no class, which become void.
    """
    wide = colors.astype(np.int32)
    code = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    place = np.searchsorted(_CODES, code).clip(max=len(_CODES) - 1)
    known = _CODES[place] == code
    return np.where(known, _LABELS[place], np.uint8(CAMVID_IGNORE_LABEL)), int((~known).sum())


def split_of(name: str) -> str:
    """The split of a frame, such as "0016E5_07959": "train", "val" or "test".

    The split of Sturgess et al. (BMVC 2009) and SegNet: test is the second half of 0001TP and Seq05VD, val the part of
    0016E5 that is labelled 15 times a second, train the rest.

    Raises:
        DatasetError: it is no name of a frame.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DatasetError(f"'{name}' is no name of a CamVid frame, such as 0016E5_07959.")
    sequence, frame = match["sequence"], int(match["frame"])
    if sequence == "Seq05VD" or (sequence == "0001TP" and frame >= 8550):
        return "test"
    if sequence == "0016E5" and 7959 <= frame <= 8159:
        return "val"
    return "train"


def convert_camvid(
    folder: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> ConversionReport:
    """Write the label maps of 11 classes, and train.txt, val.txt and test.txt, beside the release's own folders.

    Nothing is written unless all of it can be; running it again replaces what it wrote.

    Args:
        folder: holds ``701_StillsRaw_full/NAME.png`` and ``LabeledApproved_full/NAME_L.png``.
        progress: called with the number of label files done and their total.

    Raises:
        DatasetError: a folder is missing, or images and labels do not belong together.
        SampleError: a label file cannot be read, or more than 1 % of it has colours that are no class.
    """
    root = Path(folder).expanduser()
    names = _names(root)
    splits: dict[str, list[str]] = {split: [] for split in SPLIT_SIZES}
    for name in names:
        splits[split_of(name)].append(name)
    unknown: list[int] = []

    def write(part: Path) -> None:
        for done, name in enumerate(names, 1):
            labels, count = _labels_of(root / SOURCE_LABELS / f"{name}_L.png")
            unknown.append(count)
            write_bgr(part / f"{name}.png", labels)
            if progress is not None:
                progress(done, len(names))

    try:
        replace_folder(root / ORIGINAL_LABELS, write)
    except OSError as error:
        raise DatasetError(f"'{root}' cannot be written: {error.strerror or error}.") from error
    report = ConversionReport({split: len(listed) for split, listed in splits.items()})
    for split, listed in splits.items():
        write_list(root / f"{split}.txt", listed)
        if len(listed) != SPLIT_SIZES[split]:
            report.notes.append(f"{split} has {len(listed)} frames, the release {SPLIT_SIZES[split]}.")
    if any(unknown):
        report.notes.append(
            f"{sum(unknown)} pixels in {sum(map(bool, unknown))} label files have a colour that is no class: "
            "they are void."
        )
    return report


def _labels_of(path: Path) -> tuple[np.ndarray, int]:
    """`colors_to_labels` of a file."""
    labels, unknown = colors_to_labels(read_image(str(path)))
    if unknown > _TOLERATED_SHARE_UNKNOWN * labels.size:
        raise SampleError(
            f"The label map '{path}' has {100 * unknown / labels.size:.1f} % of its pixels in colours that are "
            "none of CamVid's 32 classes; is it the release's own file?",
            path,
        )
    return labels, unknown


def _names(root: Path) -> list[str]:
    images, labels = root / ORIGINAL_IMAGES, root / SOURCE_LABELS
    for path in (images, labels):
        if not path.is_dir():
            raise DatasetError(
                f"'{path}' does not exist: unpack CamVid's {path.name}.zip there; "
                "projects/CCNet/datasets/README.md shows the tree."
            )
    found = {path.stem for path in _visible(images) if path.suffix.lower() in IMAGE_SUFFIXES}
    labelled = {path.name[: -len("_L.png")] for path in _visible(labels) if path.name.endswith("_L.png")}
    if not found and not labelled:
        raise DatasetError(f"'{images}' holds no images.")
    for missing, where in ((sorted(found - labelled), labels), (sorted(labelled - found), images)):
        if missing:
            raise DatasetError(f"'{where}' has nothing for '{missing[0]}' ({len(missing)} missing in all).")
    return sorted(found)


def _visible(folder: Path) -> list[Path]:
    """What `folder` holds, without hidden files such as the ``._NAME.png`` that macOS leaves on other file systems."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DatasetError(f"The folder '{folder}' cannot be read: {error.strerror or error}.") from error
