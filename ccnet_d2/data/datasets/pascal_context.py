"""PASCAL Context: VOC 2010's 4998 training and 5105 validation images, labelled densely; 59 classes, or 60.

The annotations are published as `.mat` files of 459 labels, of which 59 are used; the rest is the 60th class,
background, or not labelled. `convert_pascal_context` makes both kinds of label maps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ccnet_d2.data.datasets.folder import default_colors, read_names, register_sem_seg_folder
from ccnet_d2.data.datasets.paths import ENV_VAR
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.data.mat_labels import convert_labels, write_list

__all__ = ["PASCAL_CONTEXT_CLASSES", "convert_pascal_context", "register_pascal_context"]

# The 59 classes and their numbers among the 459 labels; both are in alphabetical order.
_NUMBERS = {
    "aeroplane": 2,
    "bag": 9,
    "bed": 18,
    "bedclothes": 19,
    "bench": 22,
    "bicycle": 23,
    "bird": 25,
    "boat": 31,
    "book": 33,
    "bottle": 34,
    "building": 44,
    "bus": 45,
    "cabinet": 46,
    "car": 59,
    "cat": 65,
    "ceiling": 68,
    "chair": 72,
    "cloth": 80,
    "computer": 85,
    "cow": 98,
    "cup": 104,
    "curtain": 105,
    "dog": 113,
    "door": 115,
    "fence": 144,
    "floor": 158,
    "flower": 159,
    "food": 162,
    "grass": 187,
    "ground": 189,
    "horse": 207,
    "keyboard": 220,
    "light": 232,
    "motorbike": 258,
    "mountain": 259,
    "mouse": 260,
    "person": 284,
    "plate": 295,
    "platform": 296,
    "pottedplant": 308,
    "road": 324,
    "rock": 326,
    "sheep": 347,
    "shelves": 349,
    "sidewalk": 354,
    "sign": 355,
    "sky": 360,
    "snow": 366,
    "sofa": 368,
    "table": 397,
    "track": 415,
    "train": 416,
    "tree": 420,
    "truck": 424,
    "tvmonitor": 427,
    "wall": 440,
    "water": 445,
    "window": 454,
    "wood": 458,
}
_LABELS = 459

PASCAL_CONTEXT_CLASSES = tuple(_NUMBERS)
"""The 59 classes; of 60, "background" comes first."""

_FOLDERS = {60: "SegmentationClassContext", 59: "SegmentationClassContext59"}


def register_pascal_context(root: str | os.PathLike[str]) -> None:
    """Register ``pascal_context_{59,60}_sem_seg_{train,val}``.

    Args:
        root: folder that holds ``VOC2010/{JPEGImages,SegmentationClassContext,SegmentationClassContext59}`` and the
            lists ``VOC2010/ImageSets/SegmentationContext/{train,val}.txt``.
    """
    folder = os.path.join(os.path.expanduser(root), "VOC2010")
    for count, labels in _FOLDERS.items():
        classes = PASCAL_CONTEXT_CLASSES if count == 59 else ("background", *PASCAL_CONTEXT_CLASSES)
        colors = default_colors(60)[60 - count :]
        for split in ("train", "val"):
            register_sem_seg_folder(
                f"pascal_context_{count}_sem_seg_{split}",
                os.path.join(folder, "JPEGImages"),
                os.path.join(folder, labels),
                classes,
                colors,
                split_file=os.path.join(folder, "ImageSets", "SegmentationContext", f"{split}.txt"),
                hint="Put VOC 2010 there, or set "
                f"{ENV_VAR} to the folder that holds 'VOC2010', and make the label maps with "
                "projects/CCNet/tools/prepare_pascal_context.py; projects/CCNet/datasets/README.md says how.",
            )


def convert_pascal_context(
    voc: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Make the label maps and the lists that `register_pascal_context` reads.

    Args:
        voc: VOC 2010, with `ImageSets/Main/{train,val}.txt`.
        annotations: folder of the published `.mat` files. If it, or the one above, holds the published `labels.txt`,
            the classes are checked against it.
        progress: called with the number of files done and of all.

    Returns:
        The number of images by split.

    Raises:
        DatasetError: a folder or list is missing, a list is empty, an image has no annotation, `labels.txt` names
            other classes, or a file is damaged.
    """
    voc, annotations = Path(voc).expanduser(), Path(annotations).expanduser()
    if not annotations.is_dir():
        raise DatasetError(
            f"The folder '{annotations}' does not exist; unpack PASCAL Context's trainval.tar.gz there."
        )
    for place in (annotations, annotations.parent):
        if (place / "labels.txt").is_file():
            _check_names(place / "labels.txt")
            break
    splits: dict[str, list[str]] = {}
    for split in ("train", "val"):
        listed = voc / "ImageSets" / "Main" / f"{split}.txt"
        if not listed.is_file():
            raise DatasetError(f"VOC's list '{listed}' does not exist; unpack VOC 2010 into '{voc}'.")
        splits[split] = read_names(listed, f"VOC's list '{listed}'", f" Unpack VOC 2010 into '{voc}' again.")
    names = [name for listed_names in splits.values() for name in listed_names]
    missing = [name for name in names if not (annotations / f"{name}.mat").is_file()]
    if missing:
        raise DatasetError(
            f"'{annotations}' has no annotation of '{missing[0]}' ({len(missing)} of {len(names)} are missing)."
        )

    with_background = np.zeros(_LABELS + 1, np.uint8)
    with_background[list(_NUMBERS.values())] = np.arange(1, 60)
    tables = {60: with_background, 59: with_background - np.uint8(1)}  # 0 becomes 255
    total = len(tables) * len(names)
    for position, (count, folder) in enumerate(_FOLDERS.items()):
        pairs = [(annotations / f"{name}.mat", voc / folder / f"{name}.png") for name in names]
        before = position * len(names)

        def report(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        convert_labels(pairs, "LabelMap", tables[count], progress=report)
    for split, listed_names in splits.items():
        write_list(voc / "ImageSets" / "SegmentationContext" / f"{split}.txt", listed_names)
    return {split: len(listed_names) for split, listed_names in splits.items()}


def _check_names(path: Path) -> None:
    """`labels.txt` has lines such as "2: aeroplane"."""
    names = {int(number): name.strip() for number, name in re.findall(r"(?m)^(\d+):(.*)$", path.read_text())}
    for name, number in _NUMBERS.items():
        if names.get(number) != name:
            raise DatasetError(
                f"'{path}' calls label {number} {names.get(number)!r}, but it should be {name!r}: "
                "these are other annotations than those of 459 labels."
            )
