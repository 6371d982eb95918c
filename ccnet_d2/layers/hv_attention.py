"""Attention along rows (H) and columns (V), stacked: the other shapes that CCNet compares the criss-cross
with."""

import torch
from torch import Tensor, nn

from ccnet_d2.choices import check_choice

from .context_module import ContextModule, key_channels
from .non_local import attention_matmul


class LineAttention(ContextModule):
    """`gamma * softmax(q k^T) v + x` where every position attends over its own row, or over its own column.

    Projections and gamma as in criss-cross attention: q, k: C -> C/8, v: C -> C, no scale, `gamma` starts at
    0.
    """

    def __init__(self, channels: int, axis: str, *, reduction: int = 8) -> None:
        """
        Args:
            channels: C, of input and output.
            axis: "H" (horizontal: the positions of the row) or "V" (vertical: those of the column).
            reduction: C' = channels / reduction.

        Raises:
            ValueError: channels is not a positive multiple of reduction, or axis is neither "H" nor "V".
        """
        super().__init__(channels)
        if axis not in ("H", "V"):
            raise ValueError(f"axis must be 'H' (rows) or 'V' (columns), got {axis!r}.")
        self.channels = channels
        self.axis = axis
        self.key_channels = key_channels(channels, reduction)
        self.qkv = nn.Conv2d(channels, 2 * self.key_channels + channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        self._check_input(x)
        # (B, lines, channels, positions on the line): a line is one small dense attention.
        order = (0, 2, 1, 3) if self.axis == "H" else (0, 3, 1, 2)
        lines = self.qkv(x).permute(order)
        batch, number, _, length = lines.shape
        query, key, value = lines.flatten(0, 1).split(
            [self.key_channels, self.key_channels, self.channels], dim=1
        )
        out = attention_matmul(query, key, value).reshape(batch, number, self.channels, length)
        out = out.permute((0, 2, 1, 3) if self.axis == "H" else (0, 2, 3, 1))
        return self.gamma.to(out.dtype) * out + x

    def extra_repr(self) -> str:
        return f"channels={self.channels}, key_channels={self.key_channels}, axis={self.axis!r}"


class HV(ContextModule):
    """Horizontal attention, then vertical attention on its result, each with its own weights.

    :paper:`CCNet` (TPAMI), Tab. 4, "+HV"; `order="VH"` is the other branch of "+HV&VH".
    """

    def __init__(self, channels: int, *, order: str = "HV", reduction: int = 8) -> None:
        """
        Args:
            channels: C, of input and output.
            order: "HV" or "VH", the order in which the two are stacked.
            reduction: C' = channels / reduction.

        Raises:
            ValueError: channels is not a positive multiple of reduction, or order is neither "HV" nor "VH".
        """
        super().__init__(channels)
        check_choice("order", order, ("HV", "VH"))
        self.first = LineAttention(channels, order[0], reduction=reduction)
        self.second = LineAttention(channels, order[1], reduction=reduction)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out: Tensor = self.second(self.first(x))
        return out


class HVAndVH(ContextModule):
    """The sum of two parallel branches, HV and VH, with weights of their own.

    Each branch carries its residual, so the module starts as 2x, not x; the normalised convolution behind it
    makes the factor immaterial.

    :paper:`CCNet` (TPAMI), Tab. 4, "+HV&VH".
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        """
        Args:
            channels: C, of input and output.
            reduction: C' = channels / reduction.

        Raises:
            ValueError: channels is not a positive multiple of reduction.
        """
        super().__init__(channels)
        self.hv = HV(channels, order="HV", reduction=reduction)
        self.vh = HV(channels, order="VH", reduction=reduction)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out: Tensor = self.hv(x) + self.vh(x)
        return out
