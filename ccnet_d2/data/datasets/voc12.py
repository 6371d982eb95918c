"""PASCAL VOC 2012 with the annotations of SBD: 21 classes, 10582 training and 1449 validation images."""

from __future__ import annotations

import os

from ccnet_d2.data.datasets.folder import default_colors, register_sem_seg_folder
from ccnet_d2.data.datasets.paths import ENV_VAR

__all__ = ["VOC12_CLASSES", "register_voc12"]

VOC12_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

_SPLITS = {
    "train_aug": ("SegmentationClassAug", "train_aug"),
    "train": ("SegmentationClass", "train"),
    "val": ("SegmentationClass", "val"),
}


def register_voc12(root: str | os.PathLike[str]) -> None:
    """Register ``voc12_sem_seg_{train_aug,train,val}``.

    Args:
        root: folder that holds ``VOC2012/{JPEGImages,SegmentationClass,SegmentationClassAug}`` and the lists
            ``VOC2012/ImageSets/Segmentation/{train_aug,train,val}.txt``.
    """
    folder = os.path.join(os.path.expanduser(root), "VOC2012")
    for split, (labels, listed) in _SPLITS.items():
        register_sem_seg_folder(
            f"voc12_sem_seg_{split}",
            os.path.join(folder, "JPEGImages"),
            os.path.join(folder, labels),
            VOC12_CLASSES,
            default_colors(len(VOC12_CLASSES)),
            split_file=os.path.join(folder, "ImageSets", "Segmentation", f"{listed}.txt"),
            hint="Put VOC 2012 and the SBD annotations there, or set "
            f"{ENV_VAR} to the folder that holds 'VOC2012'; projects/CCNet/datasets/README.md says how.",
        )
