"""Trained networks as files that run elsewhere: ONNX and `torch.export`, of any height, width and batch."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .check import DEFAULT_SIZES, Difference, compare
from .files import FORMATS, ExportReport, export_model, load_program
from .network import ExportedNetwork, ExportError
from .run import export_run

__all__ = [
    "DEFAULT_SIZES",
    "FORMATS",
    "Difference",
    "ExportError",
    "ExportReport",
    "ExportedNetwork",
    "compare",
    "export_model",
    "export_run",
    "load_program",
]
