"""CCNet3D with ResNet-18 from random weights on clips of five frames of CamVid at 240x180, for small machines.

Processors with bf16 units (AVX512-BF16, AMX) and GPUs train it two to three times as fast with
`train.amp.enabled=True`.
"""

from .ccnet3d_T5_R_18_D8_360x480 import dataloader, lr_multiplier, model, optimizer, test, train

dataloader.train.mapper.augmentations[0].base_size = [240, 180]
dataloader.train.mapper.augmentations[0].crop_size = [160, 208]
dataloader.test.mapper.augmentations[0].long_side = 240
dataloader.test.mapper.augmentations[0].short_side = 180
dataloader.train.num_workers = 1

train.max_iter = 3000
train.eval_period = 0
train.checkpointer.period = 1000
