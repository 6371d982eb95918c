"""COCO-Stuff 10k, 171 classes, with RANet's augmentation; tested at its own size."""

from ..augmentations import scale_crop_flip_brightness
from .sem_seg import sem_seg_dataloader

dataloader = sem_seg_dataloader(
    "coco_stuff_10k_sem_seg_train",
    "coco_stuff_10k_sem_seg_val",
    augmentations=scale_crop_flip_brightness,
    batch_size=8,
)
