"""Counting floating-point operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

CONVENTION = (
    "two FLOPs for each multiply-add of convolutions, matrix products and attention; norms, activations, softmax, "
    "pooling, resizing and other element-wise work are not counted"
)
"""What `count_flops` counts, as a sentence for the user."""


def _sdpa_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the fused attention of GPUs, but not that of CPUs.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}


def count_flops(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """The FLOPs of a call, see `CONVENTION`.

    Args:
        function: usually a module; works on fake and meta tensors as well, without computing anything.
        args: its arguments.

    Returns:
        FLOPs by module, named as in `Module.named_modules` with the name of the outermost class in front; "Global" is
        the total.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        function(*args)
    by_module = {str(name): sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return {"Global": 0, **by_module}
