"""CCNet with ResNet-101 on ADE20K, crops of 512x512, as in mmsegmentation's model zoo."""

from .ccnet_R_50_D8_512x512_80k import dataloader, lr_multiplier, model, optimizer, test, train

model.backbone.depth = 101
