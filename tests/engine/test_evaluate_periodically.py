"""When the hook evaluates."""

import numpy as np
import pytest
from detectron2.engine import TrainerBase

from ccnet_d2.engine.evaluate_periodically import EvaluatePeriodically


class Steps(TrainerBase):
    """Three iterations, of which one may fail."""

    def __init__(self, fails_at=None, results=None):
        super().__init__()
        self.fails_at = fails_at
        self.evaluated = []
        self.results = results
        self.register_hooks([EvaluatePeriodically(2, self.evaluate)])

    def run_step(self):
        if self.iter == self.fails_at:
            raise ArithmeticError

    def evaluate(self):
        self.evaluated.append(self.iter)
        return self.results


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


def test_values_that_are_not_finite_are_not_logged():
    """Of a class that does not occur; metrics.json would have NaN, which is no JSON."""
    scores = {"mIoU": 50.0, "IoU-a": float("nan"), "IoU-b": np.float32("inf"), "count": 3}
    results = {"sem_seg": scores, "nested": {"set": {"AP": 0.0}}}
    trainer = Steps(results=results)
    trainer.train(0, 3)
    logged = {key: value for key, (value, _) in trainer.storage.latest().items()}
    assert logged == {"sem_seg/mIoU": 50.0, "sem_seg/count": 3.0, "nested/set/AP": 0.0}
    assert len(scores) == 4  # what the evaluation gave stays as it is
