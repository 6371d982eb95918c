"""CCNet with ResNet-101 on Cityscapes, crops of 512x1024, as in mmsegmentation's model zoo."""

from .ccnet_R_50_D8_512x1024_40k import dataloader, lr_multiplier, model, optimizer, test, train

model.backbone.depth = 101
