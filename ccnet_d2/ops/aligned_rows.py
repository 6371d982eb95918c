"""Which maps the products of a GPU read as they lie in memory, and copies of the others."""

import torch
from torch import Tensor

from . import compiled
from .layout import is_channels_last, to_channels_last
from .transforms import is_traced

_ALIGNMENT = 16  # bytes


def has_aligned_rows(x: Tensor) -> bool:
    """Whether products with (B, C, *S) as it lies in memory are fast.

    On GPUs, cuBLAS multiplies half precision by its fast kernels only where rows begin at multiples of 16 bytes. The
    channels of an NCHW map with an odd number of positions, 97x97 for instance, do not, and a product takes four to
    eight times as long. Elsewhere, in graphs, which are to take any size, and where copies are slow, True.
    """
    if not _pays_to_copy(x) or is_channels_last(x):
        return True
    return x.shape[2:].numel() * x.itemsize % _ALIGNMENT == 0


def with_aligned_rows(x: Tensor) -> Tensor:
    """x itself, or a channels-last copy that `has_aligned_rows`, which takes far less time than it saves."""
    return x if has_aligned_rows(x) else to_channels_last(x)


def _pays_to_copy(x: Tensor) -> bool:
    if x.device.type != "cuda" or x.itemsize != 2 or torch.compiler.is_compiling() or is_traced():
        return False
    return compiled.supports(x) is None  # its kernels make the copy
