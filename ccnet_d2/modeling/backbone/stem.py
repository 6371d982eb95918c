"""The deep stem of the CCNet papers' ResNets."""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import Tensor

from ccnet_d2.layers.norm_act import NormLike


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions, the first of stride 2, then a 3x3 max-pool of stride 2.

    The official CCNet uses channels (64, 64, 128) and ceil_mode=True, mmsegmentation's ResNetV1c (32, 32, 64) and
    ceil_mode=False. On even sides ceil_mode gives one more row and column.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (64, 64, 128),
        norm: NormLike = "BN",
        ceil_mode: bool = False,
    ) -> None:
        """
        Args:
            in_channels: channels of the image.
            channels: output channels of the three convolutions.
            norm: see `detectron2.layers.get_norm`.
            ceil_mode: of the max-pool.
        """
        if len(channels) != 3 or min(channels) < 1:
            raise ValueError(
                f"channels must be those of the stem's three convolutions, each at least 1, got {list(channels)}."
            )
        super().__init__(in_channels, channels[-1], 4)
        self.in_channels = in_channels
        self.ceil_mode = ceil_mode
        inputs = (in_channels, *channels[:-1])
        for i, (c_in, c_out) in enumerate(zip(inputs, channels, strict=True), start=1):
            conv = Conv2d(
                c_in,
                c_out,
                kernel_size=3,
                stride=2 if i == 1 else 1,
                padding=1,
                bias=False,
                norm=get_norm(norm, c_out),
            )
            weight_init.c2_msra_fill(conv)
            self.add_module(f"conv{i}", conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/4, W/4)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        ceil_mode = self.ceil_mode
        if ceil_mode and torch.compiler.is_compiling():
            # The same windows, without the comparison that would bind an exported graph to even or to odd sides.
            x, ceil_mode = F.pad(x, (0, 1, 0, 1), value=float("-inf")), False
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=ceil_mode)
