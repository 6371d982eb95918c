"""What a model costs: parameters, FLOPs, memory and time; and the papers' cost tables computed again.

`costs`, `flops` and `memory` need torch alone.
"""

from .costs import Cost, traced_cost
from .flops import CONVENTION, count_flops
from .memory import LiveMemory, kept_for_backward

__all__ = ["CONVENTION", "Cost", "LiveMemory", "count_flops", "kept_for_backward", "traced_cost"]
