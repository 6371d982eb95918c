"""Augmentations of the recipes, for `dataloader.train.mapper.augmentations`."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import RandomPhotometricDistortion, RandomScaleCrop

# The paper's.
scale_crop_flip = [
    L(RandomScaleCrop)(crop_size=[769, 769], scale_range=[0.75, 2.0]),
    L(T.RandomFlip)(horizontal=True),
]

# mmsegmentation's. `base_size`, which an image is fitted into before the random scale, is the data set's.
scale_crop_flip_distort = [
    L(RandomScaleCrop)(
        crop_size=[512, 512], scale_range=[0.5, 2.0], base_size=[2048, 512], category_max_ratio=0.75
    ),
    L(T.RandomFlip)(horizontal=True),
    L(RandomPhotometricDistortion)(image_format="RGB"),
]

# RANet's, whose paper names flipping, brightness and scaling, but neither how bright nor how large: chosen here.
scale_crop_flip_brightness = [
    L(RandomScaleCrop)(crop_size=[520, 520], scale_range=[0.5, 2.0]),
    L(T.RandomFlip)(horizontal=True),
    L(T.RandomBrightness)(intensity_min=0.8, intensity_max=1.2),
]
