"""RANet on the synthetic set: minutes on a CPU, under the same schedule as `ccnet_synthetic.py`."""

from ..common.data.synthetic import dataloader
from ..common.inference import whole as test
from ..common.models.ranet_toy import model
from ..common.optim import AdamW as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

optimizer.lr = 2e-3
train.max_iter = 600
train.eval_period = 0
train.checkpointer.period = 600
