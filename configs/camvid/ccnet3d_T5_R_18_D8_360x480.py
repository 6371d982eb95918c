"""CCNet3D with ResNet-18 from random weights on clips of five frames of CamVid's small images, at their 480x360."""

from detectron2.config import LazyCall as L

from ccnet_d2.inference import WholeClip

from ..common.data.camvid_clips import dataloader
from ..common.models.ccnet3d_small import model
from ..common.optim import AdamW as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

test = dict(inference=L(WholeClip)())

model.sem_seg_head.num_classes = 11

dataloader.train.mapper.augmentations[0].base_size = [480, 360]
dataloader.train.mapper.augmentations[0].crop_size = [360, 480]
dataloader.train.mapper.augmentations[0].scale_range = [0.8, 1.6]
dataloader.test.mapper.augmentations[0].long_side = 480
dataloader.test.mapper.augmentations[0].short_side = 360
# 10 frames, as many as the run with T=1 has.
dataloader.train.total_batch_size = 2

optimizer.lr = 1e-3
optimizer.weight_decay = 1e-2
train.max_iter = 6000
train.num_pictures = 0
