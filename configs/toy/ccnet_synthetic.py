"""CCNet on the synthetic set: minutes on a CPU. `model.sem_seg_head.context` chooses what attention it has."""

from ..common.data.synthetic import dataloader
from ..common.inference import whole as test
from ..common.models.ccnet_toy import model
from ..common.optim import AdamW as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

optimizer.lr = 2e-3
train.max_iter = 600
train.eval_period = 0
train.checkpointer.period = 600
