"""PASCAL Context, 59 classes (60 with background: `pascal_context_60_...`), with RANet's augmentation; tested at its
own size."""

from ..augmentations import scale_crop_flip_brightness
from .sem_seg import sem_seg_dataloader

dataloader = sem_seg_dataloader(
    "pascal_context_59_sem_seg_train",
    "pascal_context_59_sem_seg_val",
    augmentations=scale_crop_flip_brightness,
    batch_size=8,
)
