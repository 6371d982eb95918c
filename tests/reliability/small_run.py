"""A run of seconds that draws from every source of random numbers: order, augmentation, dropout, initial weights."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import RandomPhotometricDistortion, RandomScaleCrop
from ccnet_d2.model_zoo import get_config

_run = get_config("toy/ccnet_synthetic.py")
model, dataloader, test = _run.model, _run.dataloader, _run.test
optimizer, lr_multiplier, train = _run.optimizer, _run.lr_multiplier, _run.train

model.backbone.channels = [16, 16]
model.sem_seg_head.input_shape.conv.channels = 16
model.sem_seg_head.channels = 16
model.sem_seg_head.dropout = 0.1

dataloader.train.mapper.augmentations = [
    L(RandomScaleCrop)(crop_size=[32, 32], scale_range=[0.75, 1.5]),
    L(T.RandomFlip)(horizontal=True),
    L(RandomPhotometricDistortion)(image_format="RGB"),
]
dataloader.train.total_batch_size = 4

train.device = "cpu"
train.seed = 3
train.deterministic = True
train.max_iter = 24
train.checkpointer.period = 4
train.num_pictures = 0
train.log_period = 5
