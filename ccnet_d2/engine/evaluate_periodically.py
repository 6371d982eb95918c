"""The hook that evaluates."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine import hooks


class EvaluatePeriodically(hooks.EvalHook):
    """Detectron2's `EvalHook`, which does not evaluate after a failure in the last iteration either, and logs no value
    that is not finite.

    That one takes an error there for the end of the training. A process that failed alone then waits in the evaluation
    for the others, and they wait in the step for it. A class that does not occur it logs as NaN, which is no JSON:
    what reads metrics.json strictly refuses the file.
    """

    def __init__(self, period: int, evaluate: Callable[[], Mapping[str, Any] | None]) -> None:
        """
        Args:
            period: iterations; 0 evaluates at the end alone.
            evaluate: gives {task: {metric: value}}.
        """
        super().__init__(period, lambda: _without_non_finite(evaluate() or {}))

    def after_train(self) -> None:
        # An iteration that fails does not count it up.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
        else:
            del self._func  # as super() does: it holds the trainer


def _without_non_finite(results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_non_finite(value) if isinstance(value, Mapping) else value
        for key, value in results.items()
        if not (isinstance(value, numbers.Real) and not math.isfinite(value))
    }
