"""CCNet with R=1 and ResNet-50 on Cityscapes with the paper's recipe; it reports no figure for it."""

from .ccnet_R_50_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.context = "rcca_r1"
