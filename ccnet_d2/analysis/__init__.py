"""What a model costs: parameters, FLOPs, memory and time; and the papers' cost tables, computed again."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .costs import Cost, traced_cost
from .flops import CONVENTION, count_flops
from .memory import LiveMemory, kept_for_backward
from .run import analyze_run

__all__ = [
    "CONVENTION",
    "Cost",
    "LiveMemory",
    "analyze_run",
    "count_flops",
    "kept_for_backward",
    "traced_cost",
]
