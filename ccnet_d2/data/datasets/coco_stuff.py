"""COCO-Stuff 10k: 9000 training and 1000 test images of COCO, labelled densely with 80 things and 91 kinds of stuff.

The annotations are published as `.mat` files; `convert_coco_stuff` makes label maps of 171 classes of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from ccnet_d2.data.datasets.folder import default_colors, read_names, register_sem_seg_folder
from ccnet_d2.data.datasets.paths import ENV_VAR
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.data.mat_labels import convert_labels

__all__ = ["COCO_STUFF_CLASSES", "convert_coco_stuff", "register_coco_stuff"]

_THINGS = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}

_STUFF = (
    "banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other ceiling-tile cloth "
    "clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble floor-other floor-stone "
    "floor-tile floor-wood flower fog food-other fruit furniture-other grass gravel ground-other hill house leaves "
    "light mat metal mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform "
    "playingfield railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow "
    "solid-other stairs stone straw structural-other table tent textile-other towel tree vegetable wall-brick "
    "wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops window-blind "
    "window-other wood"
).split()
_FIRST_STUFF = 92

_NUMBERS = (*_THINGS, *range(_FIRST_STUFF, _FIRST_STUFF + len(_STUFF)))
"""The classes' numbers in the files; 11 of 1 to 91 are not used."""

COCO_STUFF_CLASSES = (*_THINGS.values(), *_STUFF)

_FOLDER = "cocostuff-10k-v1.1"
_LABELS = "labels"
_LISTS = {"train": "train", "val": "test"}


def register_coco_stuff(root: str | os.PathLike[str]) -> None:
    """Register ``coco_stuff_10k_sem_seg_{train,val}``; "val" are the 1000 images that the authors list as test.

    Args:
        root: folder that holds ``cocostuff-10k-v1.1/{images,labels}`` and the lists
            ``cocostuff-10k-v1.1/imageLists/{train,test}.txt``.
    """
    folder = os.path.join(os.path.expanduser(root), _FOLDER)
    for split, listed in _LISTS.items():
        register_sem_seg_folder(
            f"coco_stuff_10k_sem_seg_{split}",
            os.path.join(folder, "images"),
            os.path.join(folder, _LABELS),
            COCO_STUFF_CLASSES,
            default_colors(len(COCO_STUFF_CLASSES) + 1)[1:],
            split_file=os.path.join(folder, "imageLists", f"{listed}.txt"),
            hint=f"Put COCO-Stuff 10k there, or set {ENV_VAR} to the folder that holds '{_FOLDER}', and make the "
            "label maps with projects/CCNet/tools/prepare_coco_stuff.py; projects/CCNet/datasets/README.md says how.",
        )


def convert_coco_stuff(
    folder: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Make the label maps that `register_coco_stuff` reads: 0 to 170, 255 not labelled, in `labels`.

    Args:
        folder: the unpacked release, with `annotations/*.mat` and `imageLists/{train,test}.txt`.
        progress: called with the number of files done and of all.

    Returns:
        The number of images by split.

    Raises:
        DatasetError: a folder or list is missing, a list is empty, an image has no annotation, or a file is damaged.
    """
    folder = Path(folder).expanduser()
    splits: dict[str, list[str]] = {}
    for split, name in _LISTS.items():
        listed = folder / "imageLists" / f"{name}.txt"
        if not listed.is_file():
            raise DatasetError(f"The list '{listed}' does not exist; unpack cocostuff-10k-v1.1.zip there.")
        splits[split] = read_names(
            listed, f"The list '{listed}'", " Unpack cocostuff-10k-v1.1.zip there again."
        )
    names = [name for listed_names in splits.values() for name in listed_names]
    missing = [name for name in names if not (folder / "annotations" / f"{name}.mat").is_file()]
    if missing:
        raise DatasetError(
            f"'{folder / 'annotations'}' has no annotation of '{missing[0]}' ({len(missing)} of {len(names)} are "
            "missing)."
        )
    table = np.full(max(_NUMBERS) + 1, 255, np.uint8)
    table[list(_NUMBERS)] = np.arange(len(_NUMBERS))
    pairs = [(folder / "annotations" / f"{name}.mat", folder / _LABELS / f"{name}.png") for name in names]
    convert_labels(pairs, "S", table, progress=progress)
    return {split: len(listed_names) for split, listed_names in splits.items()}
