"""The polynomial decay to a minimum, as an optimizer sees it."""

import pytest
import torch
from detectron2.solver import LRMultiplier

from ccnet_d2.engine.schedule import PolynomialDecayToMinimum


def test_learning_rates_of_a_whole_training():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    iterations = 50
    schedule = PolynomialDecayToMinimum(base_lr=0.01, min_lr=1e-4, power=0.9)
    scheduler = LRMultiplier(optimizer, schedule, iterations)
    for step in range(iterations):
        # mmsegmentation's poly policy, written out.
        expected = (0.01 - 1e-4) * (1 - step / iterations) ** 0.9 + 1e-4
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(("base", "minimum"), [(0.0, 0.0), (0.01, 0.02), (0.01, -1.0)])
def test_impossible_decays_are_named(base, minimum):
    with pytest.raises(ValueError, match=f"base_lr={base} to min_lr={minimum}"):
        PolynomialDecayToMinimum(base_lr=base, min_lr=minimum)


def test_a_decay_that_would_rise_is_named():
    with pytest.raises(ValueError, match=r"power=-0\.9: at least 0"):
        PolynomialDecayToMinimum(base_lr=0.01, min_lr=0.0, power=-0.9)
