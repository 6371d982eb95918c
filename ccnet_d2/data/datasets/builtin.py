"""Registration of every data set that comes with the package."""

from __future__ import annotations

import os

from ccnet_d2.data.datasets.camvid import register_camvid
from ccnet_d2.data.datasets.paths import dataset_root
from ccnet_d2.data.datasets.synthetic import register_synthetic
from ccnet_d2.data.datasets.voc12 import register_voc12

__all__ = ["register_all"]


def register_all(root: str | os.PathLike[str] | None = None) -> None:
    """Register CamVid, VOC12-aug and the synthetic set under `root`; nothing is read yet.

    Importing :mod:`ccnet_d2.data` does it once for ``$DETECTRON2_DATASETS``; calling it again with another
    folder moves the registrations there. Cityscapes and ADE20K are registered by Detectron2 itself.

    Args:
        root: folder that holds the data sets; default: :func:`dataset_root`.
    """
    folder = os.path.expanduser(root) if root is not None else dataset_root()
    register_camvid(folder)
    register_voc12(folder)
    register_synthetic(os.path.join(folder, "ccnet_synthetic"))
