"""The polynomial decay to a minimum, as an optimizer sees it."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    LinearParamScheduler,
    PolynomialDecayParamScheduler,
)
from omegaconf import OmegaConf

from ccnet_d2.engine.schedule import PolynomialDecayToMinimum, build_lr_multiplier
from ccnet_d2.errors import UserError


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


def test_decays_at_the_limits():
    papers = PolynomialDecayToMinimum(base_lr=0.01, min_lr=0.0)
    assert papers(0.25) == pytest.approx(0.75**0.9)
    assert PolynomialDecayToMinimum(base_lr=0.01, min_lr=0.01)(0.5) == 1
    assert PolynomialDecayToMinimum(base_lr=0.01, min_lr=0.0, power=0)(0.5) == 1


def test_a_decay_that_would_rise_is_named():
    with pytest.raises(ValueError, match=r"power=-0\.9: at least 0"):
        PolynomialDecayToMinimum(base_lr=0.01, min_lr=0.0, power=-0.9)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        # The last step of the scheduler comes after the last iteration: hours of training ended in a traceback.
        (
            L(PolynomialDecayParamScheduler)(base_value=1.0, power=-1),
            "gives 0.0 cannot be raised .* at 100% of",
        ),
        (L(PolynomialDecayParamScheduler)(base_value=-1.0, power=1), "gives -1.0 at 0% of the training"),
        (
            L(PolynomialDecayParamScheduler)(base_value=1.0, power="x"),
            "gives unsupported operand .* at 0% of",
        ),
        (L(LinearParamScheduler)(start_value=1.0, end_value=-1.0), r"gives -0.0\d* at 51% of the training"),
        (L(ConstantParamScheduler)(value=float("nan")), "gives nan at 0% of the training"),
        (L(ConstantParamScheduler)(value=float("inf")), "gives inf at 0% of the training"),
        (L(ConstantParamScheduler)(value=None), "gives None at 0% of the training"),
        (None, "^lr_multiplier=null builds no object"),
    ],
)
def test_schedules_that_fail_in_the_course_of_a_training(node, message):
    with pytest.raises(UserError, match=f"{message}"):
        build_lr_multiplier(OmegaConf.create({"lr_multiplier": node}, flags={"allow_objects": True}))


def test_schedules_that_are_taken():
    schedule = L(LinearParamScheduler)(start_value=1.0, end_value=0)
    made = build_lr_multiplier(OmegaConf.create({"lr_multiplier": schedule}, flags={"allow_objects": True}))
    assert made(0.25) == 0.75
    other = object()  # such as one of torch's
    assert (
        build_lr_multiplier(OmegaConf.create({"lr_multiplier": other}, flags={"allow_objects": True}))
        is other
    )
