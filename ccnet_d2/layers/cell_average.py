"""Averages over the cells of a grid, in a form that a compiler or exporter takes for maps of any size."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32, autocast_disabled

__all__ = ["average_by_products", "cell_average"]


def cell_average(x: Tensor, cells: int) -> Tensor:
    """`F.adaptive_avg_pool2d`: (B, C, H, W) -> (B, C, cells, cells).

    While it is compiled it is `average_by_products`: Inductor's form of the pool is for the size that it was traced
    with, and a model would be compiled again for every other.
    """
    if torch.compiler.is_compiling():
        return average_by_products(x, (cells, cells))
    return F.adaptive_avg_pool2d(x, cells)


def average_by_products(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """`F.adaptive_avg_pool2d` as two products with averaging matrices, which may be of any input size.

    Cell i of n over a side of length L averages pixels floor(i L / n) to ceil((i+1) L / n) - 1.
    """
    with autocast_disabled(x.device):
        wide = at_least_float32(x)
        rows = _averaging(output_size[0], x.shape[-2], wide)
        columns = _averaging(output_size[1], x.shape[-1], wide)
        averaged = F.linear(F.linear(wide, columns).transpose(-1, -2), rows).transpose(-1, -2)
    return averaged.to(x.dtype)


def _averaging(cells: int, length: Any, like: Tensor) -> Tensor:
    """(cells, length): each row averages one cell."""
    cell = torch.arange(cells, device=like.device)[:, None]
    pixel = torch.arange(length, device=like.device)[None, :]
    first = cell * length // cells
    end = ((cell + 1) * length + cells - 1) // cells
    inside = (pixel >= first) & (pixel < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)
