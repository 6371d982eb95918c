"""CE2P with RCCA (R=2) and ResNet-101 on LIP, with CE2P's recipe: 151 epochs, scales 0.5 to 1.6, mirror.

CE2P itself (53.10 mIoU): `model.sem_seg_head.context=psp`.
"""

from ..common.data.lip import dataloader
from ..common.inference import mirror as test
from ..common.models.ce2p import model
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

optimizer.lr = 7e-3
optimizer.weight_decay = 5e-4
# ImageNet weights of the same network (RGB, deep stem).
train.init_checkpoint = "detectron2://DeepLab/R-103.pkl"
train.max_iter = 115000
