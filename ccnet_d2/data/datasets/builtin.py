"""Registration of every data set that comes with the package."""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin as detectron2_builtin

from ccnet_d2.data.datasets.camvid import register_camvid
from ccnet_d2.data.datasets.coco_stuff import register_coco_stuff
from ccnet_d2.data.datasets.lip import register_lip
from ccnet_d2.data.datasets.pascal_context import register_pascal_context
from ccnet_d2.data.datasets.paths import ENV_VAR, dataset_root
from ccnet_d2.data.datasets.synthetic import register_synthetic
from ccnet_d2.data.datasets.voc12 import register_voc12

__all__ = ["register_all"]


_DETECTRON2_PREFIXES = ("coco_", "keypoints_coco_", "lvis_", "cityscapes_fine_", "voc_20", "ade20k_")


def _expand_detectron2_root() -> None:
    """Register Detectron2's own data sets again if their folders still begin with ``~``.

    Detectron2 0.5 takes ``$DETECTRON2_DATASETS`` as it stands; upstream expands it.
    """
    if not str(MetadataCatalog.get("ade20k_sem_seg_train").get("image_root", "")).startswith("~"):
        return
    given = os.environ[ENV_VAR]
    for name in list(DatasetCatalog):
        folders = [value for value in MetadataCatalog.get(name).as_dict().values() if isinstance(value, str)]
        if name.startswith(_DETECTRON2_PREFIXES) and any(folder.startswith(given) for folder in folders):
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)
    for register in (
        detectron2_builtin.register_all_coco,
        detectron2_builtin.register_all_lvis,
        detectron2_builtin.register_all_cityscapes,
        detectron2_builtin.register_all_cityscapes_panoptic,
        detectron2_builtin.register_all_pascal_voc,
        detectron2_builtin.register_all_ade20k,
    ):
        register(dataset_root())


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
