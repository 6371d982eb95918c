"""CamVid in the layout of the SegNet tutorial: 11 classes, 367 training, 101 validation and 233 test images.

Label values 0 to 10 are classes, 11 is void. Images are 480x360 there and may be .png or .jpg.
"""

from __future__ import annotations

import os

from ccnet_d2.data.datasets.folder import register_sem_seg_folder
from ccnet_d2.data.datasets.paths import ENV_VAR

__all__ = ["CAMVID_CLASSES", "CAMVID_COLORS", "CAMVID_IGNORE_LABEL", "register_camvid"]

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


def register_camvid(root: str | os.PathLike[str]) -> None:
    """Register ``camvid_sem_seg_{train,val,test}``.

    Args:
        root: folder that holds ``camvid/{train,val,test}`` and ``camvid/{train,val,test}annot``.
    """
    folder = os.path.join(os.path.expanduser(root), "camvid")
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
