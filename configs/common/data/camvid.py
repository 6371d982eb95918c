"""CamVid in two dimensions, at the 960x720 of its original release, to which smaller copies are enlarged."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import RandomScaleCrop, ResizeToFit

from .sem_seg import sem_seg_dataloader

dataloader = sem_seg_dataloader(
    "camvid_sem_seg_train",
    "camvid_sem_seg_val",
    augmentations=[
        L(RandomScaleCrop)(crop_size=[504, 504], scale_range=[0.75, 2.0], base_size=[960, 720]),
        L(T.RandomFlip)(horizontal=True),
    ],
    test_augmentations=[L(ResizeToFit)(long_side=960, short_side=720)],
    batch_size=8,
    test_workers=2,
)
