"""Which maps the products of a GPU read as they lie in memory, and copies of the others."""

import torch
from torch import Tensor

from .layout import is_channels_last, to_channels_last
from .transforms import is_traced

_ALIGNMENT = 16  # bytes


def has_aligned_rows(x: Tensor) -> bool:
    """Whether products with (B, C, *S) as it lies in memory are fast.

    On GPUs, cuBLAS multiplies half precision by its fast kernels only where rows begin at multiples of 16 bytes. The
    channels of an NCHW map with an odd number of positions, 97x97 for instance, do not, and a product takes five to ten
    times as long. Elsewhere, and in graphs, which are to take any size, True.
    """
    if not _reads_by_rows(x) or is_channels_last(x):
        return True
    return x.shape[2:].numel() * x.itemsize % _ALIGNMENT == 0


def with_aligned_rows(x: Tensor) -> Tensor:
    """x itself, or a channels-last copy that `has_aligned_rows`, which takes far less time than it saves."""
    return x if has_aligned_rows(x) else to_channels_last(x)


def _reads_by_rows(x: Tensor) -> bool:
    in_graph = torch.compiler.is_compiling() or is_traced()
    return x.device.type == "cuda" and x.itemsize == 2 and not in_graph
