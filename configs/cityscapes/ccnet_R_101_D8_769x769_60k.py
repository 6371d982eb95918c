"""CCNet (R=2) with ResNet-101 on Cityscapes as in the paper (TPAMI, Tab. 2: 79.8).

Another row of Tab. 2 and 4 is one override, such as `model.sem_seg_head.context=nl` (or none, gcn, psp, aspp, hv).
"""

from ..common.data.cityscapes import dataloader
from ..common.inference import slide as test
from ..common.models.ccnet import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
# ImageNet weights of the same network (RGB, deep stem).
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 60000
