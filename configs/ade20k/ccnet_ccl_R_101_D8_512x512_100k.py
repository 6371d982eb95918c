"""CCNet (R=2) with ResNet-101 and the category consistent loss on ADE20K as in the paper (TPAMI, Tab. 6: 45.76)."""

from .ccnet_R_101_D8_512x512_100k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.category_consistent = "piecewise"
