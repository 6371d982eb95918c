"""LIP, single persons cut out of photographs: 20 classes of body parts and clothes, 30462 training and 10000
validation images.

Images are .jpg of about 100 to 500 pixels a side, label maps single-channel .png of the same names; label values 0 to
19 are classes, 255 is void. "Left" and "right" are those of the person shown.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from ccnet_d2.data.datasets.folder import list_pairs, register
from ccnet_d2.data.datasets.paths import ENV_VAR
from ccnet_d2.data.errors import DatasetError

__all__ = ["LIP_CLASSES", "LIP_COLORS", "LIP_FLIP_PAIRS", "register_lip"]

LIP_CLASSES = (
    "Background",
    "Hat",
    "Hair",
    "Glove",
    "Sunglasses",
    "Upper-clothes",
    "Dress",
    "Coat",
    "Socks",
    "Pants",
    "Jumpsuits",
    "Scarf",
    "Skirt",
    "Face",
    "Left-arm",
    "Right-arm",
    "Left-leg",
    "Right-leg",
    "Left-shoe",
    "Right-shoe",
)

# RGB, those in which the papers on LIP print their results.
LIP_COLORS = (
    (0, 0, 0),
    (128, 0, 0),
    (255, 0, 0),
    (0, 85, 0),
    (170, 0, 51),
    (255, 85, 0),
    (0, 0, 85),
    (0, 119, 221),
    (85, 85, 0),
    (0, 85, 85),
    (85, 51, 0),
    (52, 86, 128),
    (0, 128, 0),
    (0, 0, 255),
    (51, 170, 221),
    (0, 255, 255),
    (85, 255, 170),
    (170, 255, 85),
    (255, 255, 0),
    (255, 170, 0),
)

LIP_FLIP_PAIRS = ((14, 15), (16, 17), (18, 19))
"""Classes that change places when a picture is mirrored."""

_SPLITS = ("train", "val")
# Where a folder or list may lie under the root: as CE2P has them, or as the official zips unpack, into the root or
# each into a folder of its own name.
_IMAGES = ("", "TrainVal_images", "TrainVal_images/TrainVal_images")
_LABELS = ("", "TrainVal_parsing_annotations", "TrainVal_parsing_annotations/TrainVal_parsing_annotations")


_HINT = (
    f"put LIP there, or set {ENV_VAR} to the folder that holds 'LIP'; projects/CCNet/datasets/README.md shows its "
    "tree."
)


def _load(name: str, root: str, split: str, hint: str) -> list[dict[str, Any]]:
    if not os.path.isdir(root):
        raise DatasetError(f"Data set '{name}': the folder '{root}' does not exist; {hint}")
    images = _folder(name, root, f"{split}_images", _IMAGES)
    labels = _folder(name, root, f"{split}_segmentations", _LABELS)
    lists = [os.path.join(root, parent, f"{split}_id.txt") for parent in (*_IMAGES, *_LABELS[1:])]
    split_file = next((path for path in lists if os.path.isfile(path)), None)
    return list_pairs(name, images, labels, split_file)


def _folder(name: str, root: str, folder: str, parents: tuple[str, ...]) -> str:
    candidates = [os.path.join(root, parent, folder) for parent in parents]
    for path in candidates:
        if os.path.isdir(path):
            return path
    places = " nor ".join(f"'{os.path.join(parent, folder)}'" for parent in parents[:2])
    found = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
    holds = "is empty" if not found else "holds " + ", ".join(f"'{e}'" for e in found[:5])
    more = ", …" if len(found) > 5 else ""
    raise DatasetError(
        f"Data set '{name}': '{root}' has neither {places}, it {holds}{more}; unpack the zips of LIP there as "
        "projects/CCNet/datasets/README.md shows."
    )


def register_lip(root: str | os.PathLike[str], prefix: str = "lip_sem_seg", *, hint: str = _HINT) -> None:
    """Register ``{prefix}_train`` and ``{prefix}_val``; calling it again moves the registration.

    Both layouts are found: CE2P's, ``{train,val}_images``, ``{train,val}_segmentations`` and lists
    ``{train,val}_id.txt``; and that of the official zips, whose label maps lie in ``TrainVal_parsing_annotations``
    and whose images may lie in ``TrainVal_images``. Without a list, every image has to have a label map and the other
    way round. Nothing is read before the first use.

    Args:
        root: folder of the data set.
        prefix: beginning of the two names.
        hint: what to do if there is no such folder.
    """
    root = os.path.expanduser(root)
    for split in _SPLITS:
        name = f"{prefix}_{split}"
        register(
            name,
            partial(_load, name, root, split, hint),
            stuff_classes=list(LIP_CLASSES),
            stuff_colors=list(LIP_COLORS),
            flip_pairs=LIP_FLIP_PAIRS,
            ignore_label=255,
            evaluator_type="sem_seg",
        )
