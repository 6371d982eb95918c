"""The hook that evaluates."""

from detectron2.engine import hooks


class EvaluatePeriodically(hooks.EvalHook):
    """Detectron2's `EvalHook`, which does not evaluate after a failure in the last iteration either.

    That one takes an error there for the end of the training. A process that failed alone then waits in the evaluation
    for the others, and they wait in the step for it.
    """

    def after_train(self) -> None:
        # An iteration that fails does not count it up.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
        else:
            del self._func  # as super() does: it holds the trainer
