"""RANet with ResNet-101 on COCO-Stuff 10k as in its paper (Tab. 6: 40.7; coarse output, Tab. 4: 37.9)."""

from ..common.data.coco_stuff import dataloader
from ..common.inference import six_scales as test
from ..common.models.ranet import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
model.sem_seg_head.num_classes = 171
optimizer.lr = 1e-3
lr_multiplier.power = 1.0
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 60000
