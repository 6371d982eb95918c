"""CCNet (R=2) with ResNet-101 on ADE20K as in the paper (TPAMI, Sec. 4.2).

The paper gives the learning rate, its decay, and the sides that images are resized to. Not given, hence chosen here:
crops of 512x512, 16 images a step, 100000 steps, and testing as a whole with the short side at 512.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import RandomScaleCrop

from ..common.data.ade20k import dataloader
from ..common.inference import whole as test
from ..common.models.ccnet import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
model.sem_seg_head.num_classes = 150
dataloader.train.mapper.augmentations = [
    L(RandomScaleCrop)(crop_size=[512, 512], short_side_choices=[300, 375, 450, 525, 600]),
    L(T.RandomFlip)(horizontal=True),
]
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 100000
