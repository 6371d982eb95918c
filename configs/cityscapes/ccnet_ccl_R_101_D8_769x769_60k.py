"""CCNet (R=2) with ResNet-101 and the category consistent loss on Cityscapes as in the paper (TPAMI, Tab. 4: 80.5).

The quadratic form of Tab. 3: `model.sem_seg_head.category_consistent=quadratic`.
"""

from .ccnet_R_101_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.category_consistent = "piecewise"
