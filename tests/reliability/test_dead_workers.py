"""Loader workers that die are reported, and quickly."""

import os
import signal
import time

import pytest
import torch

from ccnet_d2.data.train_loader import TrainLoader
from ccnet_d2.engine.trainer import Trainer
from ccnet_d2.errors import UserError


class Net(torch.nn.Module):
    """Any loss."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight * len(batch)}


def killed(record):
    if record["number"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return record


def gone(record):
    if record["number"] == 5:
        os._exit(3)
    return record


@pytest.mark.parametrize(
    ("mapper", "words"), [(killed, "was killed by signal: Killed"), (gone, "ended unexpectedly")]
)
def test_a_dead_worker(mapper, words, caplog):
    loader = TrainLoader(
        [{"number": i} for i in range(8)],
        mapper=mapper,
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=1,
        seed=0,
    )
    net = Net()
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        Trainer(net, loader, torch.optim.SGD(net.parameters(), 0.1)).train(0, 1000)
    assert time.monotonic() - start < 20
    message = str(error.value)
    assert words in message and "num_workers" in message and "\n" not in message
    assert "Exception during training" not in caplog.text
