"""Data sets: where they lie, how they are described to Detectron2, and a synthetic one."""

from ccnet_d2.data.datasets.builtin import register_all
from ccnet_d2.data.datasets.folder import list_pairs, register_sem_seg_folder
from ccnet_d2.data.datasets.paths import dataset_root
from ccnet_d2.data.datasets.synthetic import generate_synthetic_dataset, register_synthetic
from ccnet_d2.data.datasets.synthetic_scenes import SyntheticConfig

__all__ = [
    "SyntheticConfig",
    "dataset_root",
    "generate_synthetic_dataset",
    "list_pairs",
    "register_all",
    "register_sem_seg_folder",
    "register_synthetic",
]
