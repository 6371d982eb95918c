"""Evaluators, for `dataloader.evaluator`."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .clips import ClipSemSegEvaluator
from .lip import LIPEvaluator
from .sem_seg import CheckedSemSegEvaluator

__all__ = ["CheckedSemSegEvaluator", "ClipSemSegEvaluator", "LIPEvaluator"]
