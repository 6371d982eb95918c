"""Criss-cross attention written to be read: the specification every other backend is held to."""

import torch
from torch import Tensor

from .autocast import autocast_disabled


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See `ccnet_d2.ops.criss_cross_attention`."""
    out = torch.zeros(value.shape, dtype=_compute_dtype(value), device=value.device)
    for axis, weights in enumerate(criss_cross_weights(query, key), 2):
        lines = value.to(weights.dtype).movedim(axis, -1)  # (B, C, *others, L)
        weights = weights.movedim(axis - 1, -2)  # (B, *others, L, L): from position i to position j of a line
        with autocast_disabled(value.device):
            out = out + torch.einsum("bc...j,b...ij->bc...i", lines, weights).movedim(-1, axis)
    return out.to(value.dtype)


def criss_cross_weights(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """The attention weights, one tensor for each spatial axis.

    Args:
        query: (B, C', *S).
        key: (B, C', *S).

    Returns:
        For each spatial axis a of length L_a a tensor (B, *S, L_a) of at least fp32: how much a position takes from
        each position of its line along a. A position's own weight stands on the last axis and is 0 on the others;
        all weights of a position, over all axes, sum to 1.
    """
    last = query.dim() - 1
    energies = [_line_energies(query, key, axis, mask_self=axis != last) for axis in range(2, query.dim())]
    weights = torch.cat(energies, dim=-1).softmax(dim=-1)
    return weights.split([energy.shape[-1] for energy in energies], dim=-1)


def _line_energies(query: Tensor, key: Tensor, axis: int, mask_self: bool) -> Tensor:
    """Query-key products along one axis: (B, *S, L)."""
    dtype = _compute_dtype(query)
    q = query.to(dtype).movedim(axis, -1)
    k = key.to(dtype).movedim(axis, -1)
    with autocast_disabled(query.device):  # it would run the energies in half precision, where they overflow
        energy = torch.einsum("bc...i,bc...j->b...ij", q, k)
    if mask_self:
        diagonal = torch.eye(energy.shape[-1], dtype=torch.bool, device=energy.device)
        energy = energy.masked_fill(diagonal, float("-inf"))
    return energy.movedim(-2, axis - 1)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
