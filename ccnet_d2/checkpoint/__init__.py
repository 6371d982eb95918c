"""Loading and saving checkpoints: Detectron2's formats, without running code from them."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .atomic_file import DiskFullError, atomic_write, atomic_write_text, disk_full_reported
from .checkpointer import CheckpointError, SafeCheckpointer, load_checkpoint
from .safe_load import load_file

__all__ = [
    "CheckpointError",
    "DiskFullError",
    "SafeCheckpointer",
    "atomic_write",
    "atomic_write_text",
    "disk_full_reported",
    "load_checkpoint",
    "load_file",
]
