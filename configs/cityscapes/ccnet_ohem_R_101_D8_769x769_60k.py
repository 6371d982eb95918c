"""CCNet (R=2) with ResNet-101 and OHEM on Cityscapes as in the official code (its README: 80.00).

Its runs without OHEM (79.74): `model.sem_seg_head.loss=cross_entropy`, with `model.sem_seg_head.context=rcca_r1` 77.91.
"""

from .ccnet_R_101_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.loss = "ohem"
# The code draws the scale out of 0.7, 0.8, ... 2.1, where the paper says 0.75 to 2.0.
dataloader.train.mapper.augmentations[0].scale_range = None
dataloader.train.mapper.augmentations[0].scale_choices = [round(0.7 + 0.1 * step, 1) for step in range(15)]
