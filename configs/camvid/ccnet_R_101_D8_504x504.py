"""CCNet (R=2) with ResNet-101 on CamVid, single frames.

"CCNet3D (T=1)" of the paper's Tab. 9 has three loops: ccnet3d_T1_R_101_D8_504x504.py.
"""

from ..common.data.camvid import dataloader
from ..common.inference import whole as test
from ..common.models.ccnet import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model.backbone.depth = 101
model.sem_seg_head.num_classes = 11
# ImageNet weights of the same network (RGB, deep stem). The paper's clips start from a Cityscapes model instead.
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 20000
