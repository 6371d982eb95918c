"""Atrous spatial pyramid pooling."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context_module import ContextModule
from .norm_act import ActivationLike, ConvNormAct, NormLike


class ASPP(ContextModule):
    """A 1x1 convolution, three dilated 3x3 convolutions and the average of the whole map, side by side; a 1x1
    convolution fuses them.

    Standalone: in `in_channels` (res5) -> `out_channels`. At 2048 -> 512: five branches of 256, then 1x1 from
    1280 to 512. The dilations 12, 24, 36 are those of output stride 8.

    :paper:`Rethinking Atrous Convolution for Semantic Image Segmentation`, Sec. 3.3.
    """

    standalone: ClassVar[bool] = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        dilations: Sequence[int] = (12, 24, 36),
        branch_channels: int = 256,
        norm: NormLike = "BN",
        activation: ActivationLike = "relu",
    ) -> None:
        """
        Args:
            channels: C, of the input.
            out_channels: of the output; None: C.
            dilations: of the 3x3 branches.
            branch_channels: channels of each branch.
            norm: name or callable; batch norm of the image branch needs two images per device to train.
            activation: name or callable.

        Raises:
            ValueError: a dilation or branch_channels below 1.
        """
        super().__init__(channels, out_channels)
        if any(dilation < 1 for dilation in dilations) or branch_channels < 1:
            raise ValueError(
                f"dilations and branch_channels must be at least 1, got {tuple(dilations)} and "
                f"{branch_channels}."
            )
        self.pointwise = ConvNormAct(channels, branch_channels, norm=norm, activation=activation)
        self.dilated = nn.ModuleList(
            ConvNormAct(channels, branch_channels, 3, dilation=dilation, norm=norm, activation=activation)
            for dilation in dilations
        )
        self.image = ConvNormAct(channels, branch_channels, norm=norm, activation=activation)
        self.fuse = ConvNormAct(
            branch_channels * (2 + len(self.dilated)), self.out_channels, norm=norm, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        self._check_input(x)
        maps = [self.pointwise(x), *(branch(x) for branch in self.dilated)]
        maps.append(self.image(F.adaptive_avg_pool2d(x, 1)).expand_as(maps[0]))
        out: Tensor = self.fuse(torch.cat(maps, dim=1))
        return out
