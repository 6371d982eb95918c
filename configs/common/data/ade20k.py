"""ADE20K (150 classes) with mmsegmentation's augmentation; tested with the short side at 512."""

from detectron2.config import LazyCall as L

from ccnet_d2.data.transforms import ResizeToFit

from ..augmentations import scale_crop_flip_distort
from .sem_seg import sem_seg_dataloader

dataloader = sem_seg_dataloader(
    "ade20k_sem_seg_train",
    "ade20k_sem_seg_val",
    augmentations=scale_crop_flip_distort,
    test_augmentations=[L(ResizeToFit)(long_side=2048, short_side=512)],
    batch_size=16,
)
