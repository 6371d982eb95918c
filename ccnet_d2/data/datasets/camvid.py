"""CamVid: 11 classes, 367 training, 101 validation and 233 test images, in two layouts.

That of the SegNet tutorial has images of 480x360, .png or .jpg. The original release has 960x720; its labels, colours
of 32 classes, are converted first (`ccnet_d2.data.datasets.camvid_original`). Label values 0 to 10 are classes, 11 is
void.
"""

from __future__ import annotations

import os

from ccnet_d2.data.datasets.folder import register_sem_seg_folder
from ccnet_d2.data.datasets.paths import ENV_VAR

__all__ = [
    "CAMVID_CLASSES",
    "CAMVID_COLORS",
    "CAMVID_IGNORE_LABEL",
    "ORIGINAL_IMAGES",
    "ORIGINAL_LABELS",
    "register_camvid",
]

CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)

# RGB, those of the data set's authors.
CAMVID_COLORS = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)

CAMVID_IGNORE_LABEL = 11

ORIGINAL_IMAGES = "701_StillsRaw_full"
ORIGINAL_LABELS = "labels_11"
"""Folder that `convert_camvid` writes beside that of the images."""


def register_camvid(root: str | os.PathLike[str]) -> None:
    """Register ``camvid_sem_seg_{train,val,test}`` and ``camvid_original_sem_seg_{train,val,test}``.

    Args:
        root: folder that holds ``camvid/{train,val,test}`` and ``camvid/{train,val,test}annot``, or
            ``camvid_original/701_StillsRaw_full`` with what tools/prepare_camvid.py writes beside it.
    """
    folder = os.path.join(os.path.expanduser(root), "camvid")
    original = os.path.join(os.path.expanduser(root), "camvid_original")
    for split in ("train", "val", "test"):
        register_sem_seg_folder(
            f"camvid_sem_seg_{split}",
            os.path.join(folder, split),
            os.path.join(folder, f"{split}annot"),
            CAMVID_CLASSES,
            CAMVID_COLORS,
            ignore_label=CAMVID_IGNORE_LABEL,
            hint="Put CamVid in the SegNet layout there, or set "
            f"{ENV_VAR} to the folder that holds 'camvid'; projects/CCNet/datasets/README.md shows the tree.",
        )
        register_sem_seg_folder(
            f"camvid_original_sem_seg_{split}",
            os.path.join(original, ORIGINAL_IMAGES),
            os.path.join(original, ORIGINAL_LABELS),
            CAMVID_CLASSES,
            CAMVID_COLORS,
            ignore_label=CAMVID_IGNORE_LABEL,
            split_file=os.path.join(original, f"{split}.txt"),
            hint=f"Unpack CamVid's original release in '{original}' and run projects/CCNet/tools/prepare_camvid.py.",
        )
