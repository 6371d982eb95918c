"""CCNet with ResNet-50 on Cityscapes, crops of 512x1024, as in mmsegmentation's model zoo."""

from ..common.augmentations import scale_crop_flip_distort
from ..common.data.cityscapes import dataloader
from ..common.inference import whole as test
from ..common.models.ccnet_mmseg import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly_to_minimum as lr_multiplier
from ..common.train import train

dataloader.train.mapper.augmentations = scale_crop_flip_distort
dataloader.train.mapper.augmentations[0].crop_size = [512, 1024]
dataloader.train.mapper.augmentations[0].base_size = [2048, 1024]
optimizer.weight_decay = 5e-4
train.init_checkpoint = "ccnet://imagenet/resnet${model.backbone.depth}_v1c"
train.max_iter = 40000
