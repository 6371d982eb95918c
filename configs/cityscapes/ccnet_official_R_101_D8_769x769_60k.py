"""CCNet (R=2) with ResNet-101 on Cityscapes as in the official code (its README: 79.74)."""

from ..common.data.cityscapes import dataloader
from ..common.inference import slide as test
from ..common.models.ccnet_official import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
dataloader.train.mapper.image_format = "BGR"
dataloader.train.mapper.augmentations[0].pad_value = model.pixel_mean
# The code draws the scale out of 0.7, 0.8, ... 2.1, where the paper says 0.75 to 2.0.
dataloader.train.mapper.augmentations[0].scale_range = None
dataloader.train.mapper.augmentations[0].scale_choices = [round(0.7 + 0.1 * step, 1) for step in range(15)]
# MIT's ImageNet weights of the same network.
train.init_checkpoint = "ccnet://imagenet/resnet${model.backbone.depth}_mit"
train.max_iter = 60000
