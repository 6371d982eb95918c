"""Cityscapes, fine annotations, with the paper's augmentation; tested at its own 1024x2048.

On the labelTrainIds files: Cityscapes' own evaluators need a package of their own and give the same mIoU.
"""

from ..augmentations import scale_crop_flip
from .sem_seg import sem_seg_dataloader

dataloader = sem_seg_dataloader(
    "cityscapes_fine_sem_seg_train",
    "cityscapes_fine_sem_seg_val",
    augmentations=scale_crop_flip,
    batch_size=8,
)
