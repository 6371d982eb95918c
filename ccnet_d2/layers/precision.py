"""Full precision where half precision overflows: attention energies and losses."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_disabled(device: torch.device) -> AbstractContextManager[None]:
    """A context in which operations on `device` run in the dtypes of their inputs, inside autocast too."""
    if not torch.amp.is_autocast_available(device.type):  # such as meta, on which costs are counted
        return nullcontext()
    disabled: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return disabled


def at_least_float32(x: Tensor) -> Tensor:
    """fp16 and bf16 to fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
