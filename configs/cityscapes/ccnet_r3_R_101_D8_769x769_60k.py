"""CCNet with R=3 and ResNet-101 on Cityscapes as in the paper (TPAMI, Tab. 2: 80.2)."""

from .ccnet_R_101_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.context = "rcca_r3"
