"""CCNet3D with ResNet-101 on clips of five frames of CamVid: "CCNet3D (T=5)" of the paper's Tab. 9.

The paper names neither batch nor iterations, nor which frames carry loss. Chosen here: 8 clips, 20000 iterations, loss
on every frame.
"""

from detectron2.config import LazyCall as L

from ccnet_d2.inference import WholeClip

from ..common.data.camvid_clips import dataloader
from ..common.models.ccnet3d import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

test = dict(inference=L(WholeClip)())

model.backbone.depth = 101
model.sem_seg_head.num_classes = 11

# The paper starts from a model of Cityscapes: put that of cityscapes/ccnet_R_101_D8_769x769_60k.py here. All of it is
# taken but the classifiers, which are for other classes.
train.init_checkpoint = "pretrained/ccnet_R_101_cityscapes.pth"
train.init_may_differ = ["sem_seg_head.classifier.*", "sem_seg_head.auxiliary.2.*"]
train.max_iter = 20000
train.num_pictures = 0
