"""Dual attention: over positions and over channels."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .context_module import ContextModule
from .non_local import NonLocal
from .norm_act import ActivationLike, ConvNormAct, NormLike
from .precision import at_least_float32, autocast_disabled


class ChannelAttention(ContextModule):
    """`gamma * A x + x` with A the (C, C) attention of channels over channels; no projections.

    With E = X X^T, A = softmax(max(E) - E) over each row, as released: the *least* similar channels weigh
    most. `gamma` starts at 0.

    :paper:`Dual Attention Network for Scene Segmentation`, Sec. 3.3.
    """

    def __init__(self, channels: int) -> None:
        """
        Args:
            channels: C, of input and output.
        """
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        self._check_input(x)
        rows = x.flatten(2)
        # The energy sums over all positions, beyond what fp16 holds.
        with autocast_disabled(x.device):
            wide = at_least_float32(rows)
            energy = torch.bmm(wide, wide.transpose(1, 2))
            attention = (energy.amax(dim=-1, keepdim=True) - energy).softmax(dim=-1).to(rows.dtype)
            out = torch.bmm(attention, rows).reshape(x.shape)
        return self.gamma.to(out.dtype) * out + x


class DANet(ContextModule):
    """Position and channel attention, each between two 3x3 convolutions, and their sum.

    Standalone: in `in_channels` (res5) -> `out_channels`. Position attention is `NonLocal` (query and key
    out_channels / 8: 64 of 512).

    :paper:`Dual Attention Network for Scene Segmentation`, Fig. 2; RANet, Tab. 3.
    """

    standalone: ClassVar[bool] = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        reduction: int = 8,
        backend: str = "sdpa",
        norm: NormLike = "BN",
        activation: ActivationLike = "relu",
    ) -> None:
        """
        Args:
            channels: C, of the input.
            out_channels: of the output and of both attentions; None: C.
            reduction: query and key channels of the position attention are out_channels / reduction.
            backend: of the position attention, see `NonLocal`.
            norm: name or callable.
            activation: name or callable.

        Raises:
            ValueError: out_channels is not a positive multiple of reduction, or the backend is unknown.
        """
        super().__init__(channels, out_channels)

        def convolution(in_channels: int) -> ConvNormAct:
            return ConvNormAct(in_channels, self.out_channels, 3, norm=norm, activation=activation)

        self.position = nn.Sequential(
            convolution(channels),
            NonLocal(self.out_channels, reduction=reduction, backend=backend),
            convolution(self.out_channels),
        )
        self.channel = nn.Sequential(
            convolution(channels), ChannelAttention(self.out_channels), convolution(self.out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        self._check_input(x)
        out: Tensor = self.position(x) + self.channel(x)
        return out
