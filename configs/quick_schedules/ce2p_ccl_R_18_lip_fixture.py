"""A small CE2P with RCCA that learns the drawn fixture in LIP's layout, in minutes on a CPU.

`python projects/CCNet/tools/make_lip_fixture.py` draws the images. Processors with bf16 units (AVX512-BF16, AMX)
and GPUs train it faster with `train.amp.enabled=True`.
"""

from ccnet_d2.data.datasets import lip_fixture  # registers it

from ..common.data.lip import dataloader
from ..common.inference import mirror as test
from ..common.models.ce2p_small import model
from ..common.optim import AdamW as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

del lip_fixture

model.sem_seg_head.category_consistent = "piecewise"

dataloader.train.dataset.names = "ccnet_lip_fixture_train"
dataloader.train.mapper.augmentations[0].crop_size = [112, 72]
dataloader.train.mapper.augmentations[0].scale_choices = [0.8, 0.9, 1.0, 1.1, 1.2]
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0
dataloader.test.dataset.names = "ccnet_lip_fixture_val"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 0

optimizer.lr = 2e-3
train.max_iter = 250
train.seed = 1
train.eval_period = 0
train.checkpointer.period = 250
