"""Criss-cross attention as batched matrix products on channels-last memory: fast wherever torch runs.

In channels-last memory the lines of every axis are plain strided matrices, so no product needs a permuted copy. Each
axis gives energies S_a and l_a = logsumexp(S_a); merging the l_a gives the one softmax over all axes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .autocast import autocast_disabled
from .transforms import is_traced


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See `ccnet_d2.ops.criss_cross_attention`."""
    compute_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    # Autocast would run the energies in half precision, where they overflow.
    with autocast_disabled(query.device):
        q, k, v = (_channels_last(t) for t in (query.to(compute_dtype), key.to(compute_dtype), value))
        spatial = q.shape[1:-1]
        axes = [axis for axis, length in enumerate(spatial) if length > 1 or axis == len(spatial) - 1]
        energies = [_energies(q, k, axis) for axis in axes]
        log_sums = [
            _from_lines(s.logsumexp(-1, keepdim=True), q.shape, a)
            for s, a in zip(energies, axes, strict=True)
        ]
        total = log_sums[0]
        for log_sum in log_sums[1:]:
            total = torch.logaddexp(total, log_sum)
        out = None
        for energy, axis in zip(energies, axes, strict=True):
            weights = (energy - _to_lines(total, axis)).exp().to(v.dtype)
            part = _from_lines(_bmm(weights, _to_lines(v, axis)), v.shape, axis)
            out = part if out is None else out + part
    assert out is not None
    return out.movedim(-1, 1)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()  # no copy when x is channels-last already


def _energies(q: Tensor, k: Tensor, axis: int) -> Tensor:
    """(outer, inner, L, L) energies of the lines along `axis`, self kept on the last axis only."""
    energy = _bmm(_to_lines(q, axis), _to_lines(k, axis).transpose(-2, -1))
    if axis != q.dim() - 3:
        energy.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
    return energy


def _to_lines(x: Tensor, axis: int) -> Tensor:
    """(B, *S, C) as a view (outer, inner, L, C): the lines along spatial axis `axis`."""
    lines = x.flatten(0, axis)
    lines = lines.unsqueeze(2) if lines.dim() == 3 else lines.flatten(2, -2)
    return lines.transpose(1, 2)


def _from_lines(lines: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The inverse of `_to_lines`: (outer, inner, L, c) as (B, *S, c)."""
    return lines.transpose(1, 2).reshape(*shape[:-1], lines.shape[-1])


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Products of (outer, inner, n, m) and (outer, inner, m, p), copying neither.

    torch.matmul would copy four-dimensional strided inputs; bmm takes three-dimensional ones as they are.
    """
    if a.shape[1] == 1:
        return torch.bmm(a.squeeze(1), b.squeeze(1)).unsqueeze(1)
    # A trace is to take any batch; and of a batch of no image there is nothing to stack, and nothing to copy.
    if is_traced() or a.shape[0] == 0:
        return a @ b
    if a.shape[0] == 1:
        return torch.bmm(a[0], b[0]).unsqueeze(0)
    return torch.stack([torch.bmm(x, y) for x, y in _pairs(a, b)])


def _pairs(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(a.unbind(0), b.unbind(0), strict=True)
