"""CCNet with ResNet-101 on CamVid, single frames (T=1): the paper's 2D baseline of Tab. 9."""

from ..common.data.camvid import dataloader
from ..common.inference import whole as test
from ..common.models.ccnet import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
model.sem_seg_head.num_classes = 11
# ImageNet weights of the same network (RGB, deep stem). The paper starts from its Cityscapes model instead.
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 20000
