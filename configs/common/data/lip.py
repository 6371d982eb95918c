"""LIP with CE2P's augmentation; tested at 473x473, answers in the images' own size.

`RandomFlip` swaps left and right parts: the mapper sees to it, by the `flip_pairs` of the data set.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import RandomScaleCrop, ResizeTo
from ccnet_d2.evaluation import LIPEvaluator

from .sem_seg import sem_seg_dataloader

dataloader = sem_seg_dataloader(
    "lip_sem_seg_train",
    "lip_sem_seg_val",
    augmentations=[
        L(RandomScaleCrop)(
            crop_size=[473, 473],
            scale_choices=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
        ),
        L(T.RandomFlip)(horizontal=True),
    ],
    test_augmentations=[L(ResizeTo)(height=473, width=473)],
    batch_size=40,
    evaluator=LIPEvaluator,
)
