"""CCNet with ResNet-101 on Cityscapes, crops of 769x769, as in mmsegmentation's model zoo."""

from .ccnet_R_50_D8_769x769_40k import dataloader, lr_multiplier, model, optimizer, test, train

model.backbone.depth = 101
