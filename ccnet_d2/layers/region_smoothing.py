"""The convolution of region attention maps (RANet, Eq. 4): one 3x3 kernel for the maps of all pixels.

Shapes: M maps, h w size of a map.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 3
# Values worked on in one go on a CPU, whose cache they fit in; a GPU takes all at once.
_CHUNK = 1 << 18


def smooth_maps(maps: Tensor, kernel: Tensor) -> Tensor:
    """A 3x3 convolution (correlation) of each map by itself; beyond a map's edge its outermost values go on.

    The same as `conv2d` on maps of one channel, whose gradients take several times as long for thousands of them.

    Args:
        maps: (M, h, w).
        kernel: (3, 3), in the dtype of the maps.

    Returns:
        (M, h, w).
    """
    out: Tensor = _Smooth.apply(maps, kernel)
    return out


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(maps, kernel)
        out = torch.zeros_like(maps)
        weights = kernel.flatten()
        for some in _chunks(maps):
            for weight, part in zip(weights, _parts(_padded(maps[some])), strict=True):
                out[some].addcmul_(part, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        maps, kernel = ctx.saved_tensors
        weights = kernel.flatten()
        grad_maps = torch.empty_like(maps) if ctx.needs_input_grad[0] else None
        grad_kernel = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        for some in _chunks(maps):
            slope = grad[some].contiguous()
            if grad_kernel is not None:
                around = _padded(maps[some])
                grad_kernel += torch.stack([(slope * part).sum() for part in _parts(around)])
            if grad_maps is not None:
                wide = slope.new_zeros(slope.shape[0], slope.shape[1] + 2, slope.shape[2] + 2)
                for weight, part in zip(weights, _parts(wide), strict=True):
                    part.addcmul_(slope, weight)
                # What fell on the padding belongs to the edge that it repeats.
                wide[:, 1] += wide[:, 0]
                wide[:, -2] += wide[:, -1]
                wide[:, :, 1] += wide[:, :, 0]
                wide[:, :, -2] += wide[:, :, -1]
                grad_maps[some] = wide[:, 1:-1, 1:-1]
        return grad_maps, None if grad_kernel is None else grad_kernel.reshape(_SIDE, _SIDE)


def _chunks(maps: Tensor) -> Iterator[slice]:
    size = _CHUNK // maps.shape[1:].numel() if maps.device.type == "cpu" else len(maps)
    for start in range(0, len(maps), max(1, size)):
        yield slice(start, start + size)


def _padded(maps: Tensor) -> Tensor:
    return F.pad(maps[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]


def _parts(padded: Tensor) -> Iterator[Tensor]:
    """The nine views that the kernel's weights belong to, row by row."""
    height, width = padded.shape[1] - 2, padded.shape[2] - 2
    for row in range(_SIDE):
        for column in range(_SIDE):
            yield padded[:, row : row + height, column : column + width]
