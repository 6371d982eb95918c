"""CCNet with ResNet-50 on Cityscapes, crops of 512x1024, as in mmsegmentation's model zoo."""

from .ccnet_R_50_D8_512x1024_40k import dataloader, lr_multiplier, model, optimizer, test, train

train.max_iter = 80000
