"""RANet with ResNet-101 on PASCAL Context, 59 classes, as in its paper (Tab. 6: 54.9; coarse output, Tab. 4: 51.2).

With the background as a 60th class: `model.sem_seg_head.num_classes=60
dataloader.train.dataset.names=pascal_context_60_sem_seg_train
dataloader.test.dataset.names=pascal_context_60_sem_seg_val`. The paper does not say which of the two it counts.
"""

from ..common.data.pascal_context import dataloader
from ..common.inference import six_scales as test
from ..common.models.ranet import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
model.sem_seg_head.num_classes = 59
optimizer.lr = 1e-3
lr_multiplier.power = 1.0
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 60000
