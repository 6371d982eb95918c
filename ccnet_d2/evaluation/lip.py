"""Evaluation of human parsing on LIP: pixel accuracy, mean accuracy and mean IoU at the images' own size."""

from .sem_seg import CheckedSemSegEvaluator

__all__ = ["LIPEvaluator"]


class LIPEvaluator(CheckedSemSegEvaluator):
    """The three numbers of the papers on LIP: pACC, mACC and mIoU over its 20 classes."""
