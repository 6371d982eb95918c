"""The training loop and its hooks."""

from .overrides import apply_overrides
from .trainer import Trainer
from .training import build_model, evaluate, evaluate_only, train

__all__ = ["Trainer", "apply_overrides", "build_model", "evaluate", "evaluate_only", "train"]
