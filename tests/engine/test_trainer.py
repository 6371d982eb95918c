"""What a trainer takes from the state of another one."""

import logging

import pytest
import torch
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn
from torch.utils.data import RandomSampler

from ccnet_d2.data.train_loader import TrainLoader
from ccnet_d2.engine import Trainer
from ccnet_d2.errors import UserError


def trainer(make=torch.optim.SGD, amp_dtype=None, **settings):
    """One on a single weight."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = make(model.parameters(), **{"lr": 0.1, **settings})
    return Trainer(model, [[]], optimizer, amp_dtype=amp_dtype)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"loss": self.weight * sum(one["x"] for one in batch)}


def state(**arguments):
    """Of a trainer in the middle of its schedule."""
    made = trainer(**arguments)
    schedule = LRMultiplier(made.optimizer, PolynomialDecayParamScheduler(1.0, 0.9), max_iter=4)
    made.optimizer.step()
    schedule.step()
    return made.state_dict()


def test_same_settings_are_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        trainer(momentum=0.9).load_state_dict(state(momentum=0.9))
    assert not caplog.records


def test_other_settings_are_told(caplog):
    resumed = trainer(lr=0.5, weight_decay=0.01)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state())
    assert resumed.optimizer.param_groups[0]["initial_lr"] == 0.1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "optimizer.lr=0.1, not with 0.5" in told[0]
    assert "optimizer.weight_decay=0, not with 0.01" in told[1]


@pytest.mark.parametrize(
    ("before", "after", "lacking"),
    [(torch.optim.SGD, torch.optim.AdamW, "betas"), (torch.optim.AdamW, torch.optim.SGD, "momentum")],
)
def test_another_optimizer_is_refused(before, after, lacking):
    with pytest.raises(UserError, match=f"is no {after.__name__}.*{lacking}"):
        trainer(after).load_state_dict(state(make=before))


def test_fp16_from_here_on():
    """The state of a run without loss scaling has none to go on with."""
    resumed = trainer(amp_dtype=torch.float16)
    scale = resumed.grad_scaler.get_scale()
    resumed.load_state_dict(state())
    assert resumed.grad_scaler.get_scale() == scale
    again = trainer(amp_dtype=torch.float16)
    resumed.grad_scaler.scale(torch.ones(()))  # which makes its scale a tensor
    resumed.grad_scaler.update(8.0)
    again.load_state_dict(resumed.state_dict())
    assert again.grad_scaler.get_scale() == 8.0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_ends_says_so(workers):
    """As with a sampler of torch's own, which gives each sample once."""
    samples = [{"x": torch.ones(1)}] * 4
    loader = TrainLoader(
        samples,
        mapper=None,
        total_batch_size=2,
        make_sampler=lambda: RandomSampler(samples),
        aspect_ratio_grouping=False,
        num_workers=workers,
        seed=0,
    )
    finite = Trainer(Sum(), loader, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(UserError, match=r"^dataloader.train has no batch for iteration 2: .* without end"):
        finite.train(0, 5)


def test_batches_that_were_dropped_still_count_after_resuming():
    before, resumed = trainer(), trainer()
    before.guard.dropped = 3
    resumed.load_state_dict(before.state_dict())
    assert resumed.guard.dropped == 3


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
@pytest.mark.parametrize(("limit", "step"), [(None, 3.0), (0.5, 0.5), (4.0, 3.0)])
def test_gradients_are_clipped_to_a_norm(limit, step, amp_dtype):
    """In fp16 that of the gradients, not of what the loss was multiplied with."""
    model = Sum()
    batches = [[{"x": torch.full((1,), 3.0)}]]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Trainer(model, batches, optimizer, amp_dtype=amp_dtype, clip_grad_norm=limit).train(0, 1)
    assert model.weight.item() == pytest.approx(-step)
