"""CCNet with ResNet-50 on PASCAL VOC 2012 (with SBD), crops of 512x512, as in mmsegmentation's model zoo."""

from ..common.data.voc12 import dataloader
from ..common.inference import whole as test
from ..common.models.ccnet_mmseg import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly_to_minimum as lr_multiplier
from ..common.train import train

model.sem_seg_head.num_classes = 21
optimizer.weight_decay = 5e-4
train.init_checkpoint = "ccnet://imagenet/resnet${model.backbone.depth}_v1c"
train.max_iter = 20000
