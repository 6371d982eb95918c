"""RANet with ResNet-101 on Cityscapes as in its paper (Tab. 1 and 2: 81.9; coarse output, Tab. 4: 77.3).

The other rows are overrides of `model.sem_seg_head`: of Tab. 1 `.context=psp` (79.6), `.context=nl` (80.5),
`.context=none` (77.5), `.use_semantic=False` (80.8), `.use_boundary=False` (81.3); of Sec. 5.1 `.intra=False` (79.2),
`.inter=False` (81.1); of Tab. 2 `.representatives=` 2, 4, 6, 8, 10, 12 (81.2, 81.6, 81.7, 81.9, 81.8, 81.6); of Tab. 4
`--eval-only` with `.output=coarse`. `.variant=code` is the network as its authors released it.
"""

from ..common.augmentations import scale_crop_flip_brightness
from ..common.data.cityscapes import dataloader
from ..common.inference import six_scales as test
from ..common.models.ranet import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
dataloader.train.mapper.augmentations = scale_crop_flip_brightness
dataloader.train.mapper.augmentations[0].crop_size = [769, 769]
optimizer.lr = 1e-3
lr_multiplier.power = 1.0
# ImageNet weights of the same network (RGB, deep stem).
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 40000
