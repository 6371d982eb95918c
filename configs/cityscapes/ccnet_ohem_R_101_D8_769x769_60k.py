"""CCNet (R=2) with ResNet-101 and OHEM on Cityscapes as in the official code (its README: 80.00)."""

from .ccnet_official_R_101_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.loss = "ohem"
