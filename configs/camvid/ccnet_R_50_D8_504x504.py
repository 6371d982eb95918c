"""CCNet with ResNet-50 on CamVid, single frames (T=1)."""

from .ccnet_R_101_D8_504x504 import dataloader, lr_multiplier, model, optimizer, test, train

model.backbone.depth = 50
# torchvision's weights have the basic stem.
model.backbone.stem = "basic"
model.backbone.ceil_mode = False
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
