"""The synthetic set: noise images whose objects take their class from a cue elsewhere in the image."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from .sem_seg import sem_seg_dataloader

dataloader = sem_seg_dataloader(
    "ccnet_synthetic_train",
    "ccnet_synthetic_val",
    augmentations=[L(T.RandomFlip)(horizontal=True), L(T.RandomFlip)(horizontal=False, vertical=True)],
    batch_size=16,
    num_workers=0,
)
