"""CCNet with ResNet-101 on PASCAL VOC 2012 (with SBD), crops of 512x512, as in mmsegmentation's model zoo."""

from .ccnet_R_50_D8_512x512_20k import dataloader, lr_multiplier, model, optimizer, test, train

model.backbone.depth = 101
