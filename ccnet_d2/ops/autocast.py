"""What autocast means for steps that choose their dtypes themselves."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_WITH_AUTOCAST = ("cpu", "cuda")  # in any torch; asking it ends a graph of torch.compile's up to 2.10


def autocasts(x: Tensor) -> bool:
    """Whether autocast would choose the dtype of a matrix product with x."""
    device = x.device.type
    castable = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return castable and _has_autocast(device) and torch.is_autocast_enabled(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product with x runs in: x's own, or autocast's where that applies."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def refuse_mixed_dtypes(x: Tensor, weight: Tensor) -> None:
    """Raises a ValueError where x and the weight of a product have two dtypes that autocast does not make one."""
    if x.dtype != weight.dtype and not autocasts(x):
        raise ValueError(
            f"outside autocast x and the weights must have one dtype, got {x.dtype} and {weight.dtype}."
        )


def autocast_disabled(device: torch.device) -> AbstractContextManager[None]:
    """A context in which operations on `device` run in the dtypes of their inputs, inside autocast too."""
    if not _has_autocast(device.type):  # such as meta, on which costs are counted
        return nullcontext()
    disabled: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return disabled


def _has_autocast(device: str) -> bool:
    return device in _WITH_AUTOCAST or torch.amp.is_autocast_available(device)
