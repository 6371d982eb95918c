"""What the compiled operator is measured against: the textbook form of criss-cross attention, and non-local attention.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes, N number of positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccnet_d2.ops import criss_cross_attention


def textbook_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Criss-cross attention as it is usually written in PyTorch.

    For each axis permuted copies, a batched product and an energy volume; the volumes are concatenated for one
    softmax and taken apart again. Self is masked on all axes but the last.

    Args:
        query: (B, C', *S).
        key: (B, C', *S).
        value: (B, C, *S).

    Returns:
        (B, C, *S).
    """
    axes = range(2, query.dim())
    energies = []
    for axis in axes:
        q, k = _lines(query, axis), _lines(key, axis)  # (B * others, C', L)
        energy = torch.bmm(q.transpose(1, 2), k)
        if axis != query.dim() - 1:
            length = energy.shape[-1]
            energy = energy + torch.diag(energy.new_full((length,), float("-inf"))).unsqueeze(0)
        energies.append(_unline(energy, query, axis))
    weights = torch.cat(energies, dim=-1).softmax(dim=-1)
    out = None
    for axis, part in zip(axes, weights.split([query.shape[axis] for axis in axes], dim=-1), strict=True):
        lines = torch.bmm(
            _lines(value, axis), _line_weights(part, axis).transpose(1, 2)
        )  # (B * others, C, L)
        lines = _unline(lines.transpose(1, 2), value, axis).movedim(-1, 1)
        out = lines if out is None else out + lines
    assert out is not None
    return out


def non_local_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every position attends to every other; the N x N weights are materialised."""
    q, k, v = (x.flatten(2) for x in (query, key, value))
    weights = torch.bmm(q.transpose(1, 2), k).softmax(dim=-1)
    return torch.bmm(v, weights.transpose(1, 2)).view_as(value)


def non_local_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same through `scaled_dot_product_attention`, which need not keep the weights."""
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))
    # The fused kernels take one number of channels for all three: zeros change neither energies nor outputs.
    channels = max(q.shape[-1], v.shape[-1])
    q, k, v_padded = (F.pad(x, (0, channels - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v_padded, scale=1.0)[..., : v.shape[-1]]
    return out.squeeze(1).transpose(1, 2).reshape(value.shape)


class TextbookModule(nn.Module):
    """The whole layer around one of these functions: three 1x1 convolutions, gamma and the residual."""

    def __init__(
        self, channels: int, reduction: int, spatial_dims: int, attention=textbook_attention
    ) -> None:
        """
        Args:
            channels: C.
            reduction: C' = channels / reduction.
            spatial_dims: 1, 2 or 3.
            attention: called with query, key and value.
        """
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
        self.query = convolution(channels, channels // reduction, 1)
        self.key = convolution(channels, channels // reduction, 1)
        self.value = convolution(channels, channels, 1)
        self.gamma = nn.Parameter(torch.ones(1))
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        return self.gamma.to(x.dtype) * self.attention(self.query(x), self.key(x), self.value(x)) + x


class RecurrentModule(nn.Module):
    """R loops of one module with shared weights."""

    def __init__(self, module: nn.Module, recurrence: int) -> None:
        super().__init__()
        self.module, self.recurrence = module, recurrence

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        for _ in range(self.recurrence):
            x = self.module(x)
        return x


def operator_attention(backend: str):
    """`ccnet_d2.ops.criss_cross_attention` on one backend."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return criss_cross_attention(query, key, value, backend=backend)

    return attend


def operator_flops(batch: int, key_channels: int, channels: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Floating-point operations of criss-cross attention, forward and backward."""
    pairs = batch * math.prod(sizes) * sum(sizes)
    return 2 * pairs * (key_channels + channels), 2 * pairs * (3 * key_channels + 2 * channels)


def operator_elements(
    batch: int, key_channels: int, channels: int, sizes: tuple[int, ...]
) -> tuple[int, int]:
    """The fewest elements that forward and backward can move: every operand read once, every result written once."""
    positions = batch * math.prod(sizes)
    return positions * 2 * (key_channels + channels), positions * 4 * (key_channels + channels)


def _lines(x: Tensor, axis: int) -> Tensor:
    """(B, C, *S) -> a copy (B * other positions, C, L)."""
    moved = x.movedim(axis, -1).movedim(1, -2).contiguous()
    return moved.view(-1, x.shape[1], x.shape[axis])


def _unline(lines: Tensor, like: Tensor, axis: int) -> Tensor:
    """(B * other positions, L, n) -> (B, *S, n)."""
    others = [size for dim, size in enumerate(like.shape) if dim not in (1, axis)]
    return lines.reshape(*others, lines.shape[1], lines.shape[2]).movedim(-2, axis - 1)


def _line_weights(weights: Tensor, axis: int) -> Tensor:
    """(B, *S, L) -> a copy (B * other positions, L, L)."""
    moved = weights.movedim(axis - 1, -2).contiguous()
    return moved.view(-1, moved.shape[-2], moved.shape[-1])
