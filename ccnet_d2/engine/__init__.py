"""The training loop and its hooks."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .overrides import apply_overrides, load_run
from .trainer import Trainer
from .training import build_model, evaluate, evaluate_only, train

__all__ = ["Trainer", "apply_overrides", "build_model", "evaluate", "evaluate_only", "load_run", "train"]
