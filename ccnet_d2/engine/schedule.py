"""Learning-rate schedules that fvcore does not have."""

import math
from typing import Any

from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig

from ccnet_d2.errors import UserError
from ccnet_d2.instantiation import build_object

_TRIED = tuple(step / 100 for step in range(101))
"""Parts of a training. The end is one: a scheduler steps after the last iteration as well."""


def build_lr_multiplier(cfg: DictConfig) -> Any:
    """`lr_multiplier` of a run, tried out over the whole training: a rate below 0 climbs the loss, and a schedule that
    fails at the end does so after all the hours before.

    Raises:
        UserError: it cannot be built, or gives no finite number of 0 or more somewhere.
    """
    multiplier = build_object(cfg, "lr_multiplier")
    if isinstance(multiplier, ParamScheduler):
        for where in _TRIED:
            try:
                value: Any = multiplier(where)
            except (ArithmeticError, TypeError, ValueError) as error:
                value = error
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise UserError(
                    f"lr_multiplier gives {value} at {where:.0%} of the training, but has to give a factor of the "
                    "learning rate, 0 or more."
                )
    return multiplier


class PolynomialDecayToMinimum(ParamScheduler):
    """Polynomial decay of the learning rate from its base value to a minimum, as a multiplier of the base value.

    lr(t) = (base_lr - min_lr) (1 - t)^power + min_lr, with t from 0 to 1 over the training, as in mmsegmentation's
    recipes. Like every fvcore scheduler it knows no iterations, so it follows `train.max_iter`.
    """

    def __init__(self, *, base_lr: float, min_lr: float, power: float = 0.9) -> None:
        """
        Args:
            base_lr: the optimizer's learning rate.
            min_lr: the learning rate at the end.
            power: exponent of the decay, at least 0, which is none.

        Raises:
            ValueError: not 0 <= min_lr <= base_lr, base_lr is 0, or power is below 0.
        """
        if not 0 <= min_lr <= base_lr or base_lr == 0:
            raise ValueError(
                f"the learning rate cannot decay from base_lr={base_lr} to min_lr={min_lr}: "
                "0 <= min_lr <= base_lr is needed, with base_lr above 0."
            )
        # It would rise without bounds, and end in a division by zero with the training.
        if power < 0:
            raise ValueError(f"the learning rate cannot decay with power={power}: at least 0 is needed.")
        self.floor = min_lr / base_lr
        self.power = power

    def __call__(self, where: float) -> float:
        """The multiplier at `where`, the part of the training that is done, 0 to 1."""
        return (1 - self.floor) * (1 - where) ** self.power + self.floor
