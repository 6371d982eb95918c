"""CCNet with R=1 and ResNet-101 on Cityscapes as in the official code (its README: 77.91)."""

from .ccnet_official_R_101_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.context = "rcca_r1"
