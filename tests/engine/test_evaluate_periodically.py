"""When the hook evaluates."""

import pytest
from detectron2.engine import TrainerBase

from ccnet_d2.engine.evaluate_periodically import EvaluatePeriodically


class Steps(TrainerBase):
    """Three iterations, of which one may fail."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.fails_at = fails_at
        self.evaluated = []
        self.register_hooks([EvaluatePeriodically(2, self.evaluate)])

    def run_step(self):
        if self.iter == self.fails_at:
            raise ArithmeticError

    def evaluate(self):
        self.evaluated.append(self.iter)
        return {}


def test_every_period_and_at_the_end():
    trainer = Steps()
    trainer.train(0, 3)
    assert trainer.evaluated == [1, 3]


@pytest.mark.parametrize(("fails_at", "evaluated"), [(1, []), (2, [1])])
def test_not_after_a_failure(fails_at, evaluated):
    """The other processes are still in the step, and do not take part."""
    trainer = Steps(fails_at)
    with pytest.raises(ArithmeticError):
        trainer.train(0, 3)
    assert trainer.evaluated == evaluated
