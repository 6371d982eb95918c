"""CCNet with ResNet-50 on Cityscapes, crops of 769x769, as in mmsegmentation's model zoo."""

from detectron2.config import LazyCall as L

from ccnet_d2.data.transforms import ResizeToFit

from ..common.inference import slide as test
from .ccnet_R_50_D8_512x1024_40k import dataloader, lr_multiplier, model, optimizer, train

# Corners meet corners: 769 = 8 * 96 + 1, and images are brought to 2049x1025.
model.sem_seg_head.align_corners = True
dataloader.train.mapper.augmentations[0].crop_size = [769, 769]
dataloader.train.mapper.augmentations[0].base_size = [2049, 1025]
dataloader.test.mapper.augmentations = [L(ResizeToFit)(long_side=2049, short_side=1025)]
