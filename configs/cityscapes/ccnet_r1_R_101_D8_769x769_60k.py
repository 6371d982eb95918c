"""CCNet with R=1 and ResNet-101 on Cityscapes as in the paper (TPAMI, Tab. 2: 78.0)."""

from .ccnet_R_101_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.context = "rcca_r1"
