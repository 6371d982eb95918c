"""CCNet with ResNet-18 from random weights on CamVid at 240x180, for small machines.

Processors with bf16 units (AVX512-BF16, AMX) and GPUs train it two to three times as fast with
`train.amp.enabled=True`. The same network without attention: `model.sem_seg_head.context=none`.
"""

from detectron2.config import LazyCall as L

from ccnet_d2.data.transforms import ResizeToFit

from ..common.data.camvid import dataloader
from ..common.inference import whole as test
from ..common.models.ccnet_small import model
from ..common.optim import AdamW as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.sem_seg_head.num_classes = 11

dataloader.train.mapper.augmentations[0].base_size = [240, 180]
dataloader.train.mapper.augmentations[0].crop_size = [160, 208]
dataloader.train.mapper.augmentations[0].scale_range = [0.8, 1.6]
dataloader.test.mapper.augmentations = [L(ResizeToFit)(long_side=240, short_side=180)]
dataloader.train.num_workers = 1

optimizer.lr = 1e-3
optimizer.weight_decay = 1e-2
train.max_iter = 3000
train.eval_period = 1000
train.checkpointer.period = 1000
