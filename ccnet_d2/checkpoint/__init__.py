"""Loading and saving checkpoints: Detectron2's formats, without running code from them."""

import ccnet_d2.compat  # first: it imports Detectron2 without its warnings
import ccnet_d2.path_handler  # noqa: F401  ccnet://NAME is a checkpoint

from .checkpointer import CheckpointError, SafeCheckpointer, load_checkpoint
from .safe_load import load_file

__all__ = [
    "CheckpointError",
    "SafeCheckpointer",
    "load_checkpoint",
    "load_file",
]
