"""Where a pixel looks: attention maps of RCCA (CCNet, TPAMI, Fig. 7).

After R loops the output at position p is a mixture of all positions. Leaving aside values and residuals, its
shares are row p of the product A_R … A_1, where A_r holds the criss-cross weights of loop r. The row is
propagated through the loops from the last to the first along lines, in O(N (H+W)); no N x N table is made.

Shapes: B batch, C channels, S = (H, W) or (T, H, W) spatial sizes, L_a the size of axis a, N = number of
positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ccnet_d2.layers import RCCA
from ccnet_d2.layers.context_module import check_recurrence
from ccnet_d2.ops import criss_cross_weights

__all__ = [
    "AttentionMaps",
    "attention_weights",
    "find_rcca",
    "pixel_attention",
    "propagate",
    "record_input",
    "record_output",
    "rows_of",
]


def find_rcca(model: nn.Module, name: str | None = None) -> RCCA:
    """The model's RCCA layer.

    Args:
        model: any module.
        name: which one, by its dotted name, where there are several.

    Raises:
        ValueError: the model has none, several and no name was given, or none of that name.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, RCCA)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no criss-cross attention (RCCA) to look into.")
    if name is None and len(layers) == 1:
        return next(iter(layers.values()))
    if name not in layers:
        problem = "several RCCA layers, name one" if name is None else f"no RCCA layer '{name}'"
        raise ValueError(f"{type(model).__name__} has {problem}: {', '.join(layers)}.")
    return layers[name]


def record_input(module: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Within the block, collect the first argument of every call of `module` in this thread."""
    return _recorded(module.register_forward_pre_hook, lambda args: args[0].detach())


def record_output(module: nn.Module) -> AbstractContextManager[list[Any]]:
    """Within the block, collect what every call of `module` in this thread returns."""
    return _recorded(module.register_forward_hook, lambda out: out)


@contextmanager
def _recorded(
    register: Callable[[Callable[..., None]], RemovableHandle], take: Callable[[Any], Any]
) -> Iterator[list[Any]]:
    """Collect what `take` makes of the last argument of a hook."""
    seen: list[Any] = []
    owner = threading.get_ident()  # others may run the same model on other images meanwhile

    def keep(*arguments: Any) -> None:
        if threading.get_ident() == owner:
            seen.append(take(arguments[-1]))

    handle = register(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def attention_weights(
    rcca: RCCA, features: Tensor, recurrence: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Criss-cross weights of each loop.

    Args:
        rcca: the layer.
        features: (B, C, *S), its input.
        recurrence: R, number of loops; default: the layer's own.

    Returns:
        For loop 1 … R what `criss_cross_weights` gives: for each axis a (B, *S, L_a).
    """
    loops = rcca.recurrence if recurrence is None else recurrence
    check_recurrence(loops)
    x = features.to(rcca.gamma.dtype)
    weights = []
    for loop in range(loops):
        query, key, _ = rcca.project(x)
        weights.append(criss_cross_weights(query, key))
        if loop + 1 < loops:
            x = rcca.attend(x)
    return weights


def propagate(row: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Row vector times criss-cross matrix: `out[j] = sum_i row[i] A[i, j]`.

    Args:
        row: (B, *S), how much each position counts.
        weights: for each axis a (B, *S, L_a), as of `criss_cross_weights`.

    Returns:
        (B, *S).
    """
    out = torch.zeros_like(row)
    for axis, table in enumerate(weights, start=1):
        line = row.movedim(axis, -1).unsqueeze(-2)  # (B, *others, 1, L_a)
        out += (line @ table.movedim(axis, -2)).squeeze(-2).movedim(-1, axis)
    return out


def pixel_attention(
    rcca: RCCA, features: Tensor, position: Sequence[int], recurrence: int | None = None
) -> list[Tensor]:
    """How much one position takes from each other position, after 1, 2, … R loops.

    Args:
        rcca: the layer.
        features: (B, C, *S), its input.
        position: one index for each spatial axis.
        recurrence: R; default: the layer's own.

    Returns:
        R maps (B, *S), each summing to 1. The r-th is row `position` of A_r … A_1; the first is zero off the
        lines through the position.

    Raises:
        ValueError: the position does not fit the features.
    """
    sizes = features.shape[2:]
    if len(position) != len(sizes) or not all(0 <= p < size for p, size in zip(position, sizes, strict=True)):
        raise ValueError(f"position {tuple(position)} lies outside features of sizes {tuple(sizes)}.")
    return rows_of(attention_weights(rcca, features, recurrence), position)


def rows_of(weights: Sequence[tuple[Tensor, ...]], position: Sequence[int]) -> list[Tensor]:
    """`pixel_attention` from weights that are known.

    Args:
        weights: of loop 1 … R, as of `attention_weights`.
        position: one index for each spatial axis.

    Returns:
        R maps (B, *S), each summing to 1.
    """
    maps = []
    for loops in range(1, len(weights) + 1):
        row = torch.zeros_like(weights[0][0][..., 0])
        row.movedim(0, -1)[tuple(position)] = 1
        for table in reversed(weights[:loops]):
            row = propagate(row, table)
        maps.append(row)
    return maps


@dataclass(frozen=True)
class AttentionMaps:
    """Where one pixel of an image looks.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        pixel: (x, y) in the image.
        cell: (row, column) of that pixel in the feature map.
        maps: R maps (h, w) on the feature grid, each summing to 1 (float32).
        extent: (rows, columns), possibly fractional, of the feature map that the image covers; the rest is
            padding.
    """

    image: np.ndarray
    pixel: tuple[int, int]
    cell: tuple[int, int]
    maps: list[np.ndarray]
    extent: tuple[float, float]
