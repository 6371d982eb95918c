"""Pyramid pooling."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cell_average import cell_average
from .context_module import ContextModule
from .norm_act import ActivationLike, ConvNormAct, NormLike


class PSP(ContextModule):
    """Pyramid pooling: the map averaged over 1, 2x2, 3x3 and 6x6 cells, each reduced by a 1x1 convolution,
    enlarged again and concatenated to the map; a 3x3 convolution fuses them.

    Standalone: in `in_channels` (res5) -> `out_channels`. At 2048 -> 512: four 1x1 to 512, then 3x3 from 4096
    to 512.

    :paper:`Pyramid Scene Parsing Network`, Sec. 3.2.
    """

    standalone: ClassVar[bool] = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        branch_channels: int | None = None,
        norm: NormLike = "BN",
        activation: ActivationLike = "relu",
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            channels: C, of the input.
            out_channels: of the output; None: C.
            bins: cells per side of each level.
            branch_channels: channels of each level; None: out_channels.
            norm: name or callable; batch norm of the 1x1 level needs two images per device to train.
            activation: name or callable.
            align_corners: of the bilinear enlargement.

        Raises:
            ValueError: no bins, or a bin below 1.
        """
        super().__init__(channels, out_channels)
        if not bins or min(bins) < 1:
            raise ValueError(f"bins must be one or more numbers of at least 1, got {tuple(bins)}.")
        width = self.out_channels if branch_channels is None else branch_channels
        self.bins = tuple(bins)
        self.align_corners = align_corners
        self.levels = nn.ModuleList(
            ConvNormAct(channels, width, norm=norm, activation=activation) for _ in self.bins
        )
        self.fuse = ConvNormAct(
            channels + width * len(self.bins), self.out_channels, 3, norm=norm, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        self._check_input(x)
        maps = [x]
        for size, level in zip(self.bins, self.levels, strict=True):
            pooled = level(cell_average(x, size))
            maps.append(
                F.interpolate(pooled, x.shape[-2:], mode="bilinear", align_corners=self.align_corners)
            )
        out: Tensor = self.fuse(torch.cat(maps, dim=1))
        return out
