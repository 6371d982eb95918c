"""Data sets, mappers and augmentations for semantic segmentation on Detectron2.

Importing this package registers the data sets under ``$DETECTRON2_DATASETS`` (no file is touched).
"""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

try:
    import cv2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ccnet_d2.data reads images with OpenCV; install it with `pip install opencv-python-headless` "
        "(or opencv-python, where windows are wanted)."
    ) from error

from ccnet_d2.data.catalog import classes_of, get_sem_seg_dataset_dicts
from ccnet_d2.data.clip_mapper import ClipMapper
from ccnet_d2.data.clips import get_clip_dataset_dicts, get_covering_clip_dicts
from ccnet_d2.data.datasets import (
    SyntheticConfig,
    dataset_root,
    generate_synthetic_dataset,
    register_all,
    register_sem_seg_folder,
    register_synthetic,
)
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.sem_seg_mapper import SemSegMapper

__all__ = [
    "ClipMapper",
    "DatasetError",
    "SampleError",
    "SemSegMapper",
    "SyntheticConfig",
    "classes_of",
    "dataset_root",
    "generate_synthetic_dataset",
    "get_clip_dataset_dicts",
    "get_covering_clip_dicts",
    "get_sem_seg_dataset_dicts",
    "register_all",
    "register_sem_seg_folder",
    "register_synthetic",
]

register_all()
