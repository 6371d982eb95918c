"""Registration of every data set that comes with the package."""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin as detectron2_builtin

from ccnet_d2.data.datasets.camvid import register_camvid
from ccnet_d2.data.datasets.coco_stuff import register_coco_stuff
from ccnet_d2.data.datasets.lip import register_lip
from ccnet_d2.data.datasets.pascal_context import register_pascal_context
from ccnet_d2.data.datasets.paths import dataset_root
from ccnet_d2.data.datasets.synthetic import register_synthetic
from ccnet_d2.data.datasets.voc12 import register_voc12

__all__ = ["register_all"]


def _expand_detectron2_root() -> None:
    """Register Cityscapes and ADE20K again if their folder still begins with ``~``.

    Detectron2 0.5 takes ``$DETECTRON2_DATASETS`` as it stands; upstream expands it.
    """
    if not str(MetadataCatalog.get("ade20k_sem_seg_train").get("image_root", "")).startswith("~"):
        return
    for name in list(DatasetCatalog):
        if name.startswith(("cityscapes_fine_sem_seg_", "cityscapes_fine_instance_seg_", "ade20k_sem_seg_")):
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)
    detectron2_builtin.register_all_cityscapes(dataset_root())
    detectron2_builtin.register_all_ade20k(dataset_root())


def register_all(root: str | os.PathLike[str] | None = None) -> None:
    """Register CamVid, COCO-Stuff, LIP, PASCAL Context, VOC12-aug and the synthetic set; nothing is read yet.

    Importing :mod:`ccnet_d2.data` does it once for ``$DETECTRON2_DATASETS``; calling it again with another
    folder moves the registrations there. Cityscapes and ADE20K are registered by Detectron2 itself.

    Args:
        root: folder that holds the data sets; default: :func:`dataset_root`.
    """
    _expand_detectron2_root()
    folder = os.path.expanduser(root) if root is not None else dataset_root()
    register_camvid(folder)
    register_lip(os.path.join(folder, "LIP"))
    register_voc12(folder)
    register_pascal_context(folder)
    register_coco_stuff(folder)
    register_synthetic(os.path.join(folder, "ccnet_synthetic"))
