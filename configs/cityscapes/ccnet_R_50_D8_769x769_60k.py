"""CCNet (R=2) with ResNet-50 on Cityscapes as in the paper (TPAMI, Tab. 4: 78.5)."""

from .ccnet_R_101_D8_769x769_60k import dataloader, lr_multiplier, model, optimizer, test, train

model.backbone.depth = 50
train.init_checkpoint = "detectron2://DeepLab/R-52.pkl"
