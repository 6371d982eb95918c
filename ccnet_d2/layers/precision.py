"""Full precision where half precision overflows: attention energies and losses."""

import torch
from torch import Tensor

from ccnet_d2.ops.autocast import autocast_disabled

__all__ = ["at_least_float32", "autocast_disabled"]


def at_least_float32(x: Tensor) -> Tensor:
    """fp16 and bf16 to fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
