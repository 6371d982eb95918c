"""Evaluators, for `dataloader.evaluator`."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .clips import ClipSemSegEvaluator
from .lip import LIPEvaluator

__all__ = ["ClipSemSegEvaluator", "LIPEvaluator"]
