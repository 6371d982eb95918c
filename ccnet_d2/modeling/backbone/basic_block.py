"""The residual block of ResNet-18 and ResNet-34 with dilation, which Detectron2's own does not have."""

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import Tensor

from ccnet_d2.layers.norm_act import NormLike


class DilatedBasicBlock(CNNBlockBase):
    """Two 3x3 convolutions and a shortcut; parameter names are those of Detectron2's `BasicBlock`.

    :paper:`ResNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: NormLike = "BN",
        dilation: int = 1,
    ) -> None:
        """
        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            stride: of the first convolution and the shortcut.
            norm: see `detectron2.layers.get_norm`.
            dilation: of both convolutions.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        # A stage of stride 1 whose channels change, as well as any stride, needs a projection.
        if in_channels != out_channels or stride != 1:
            self.shortcut = Conv2d(
                in_channels,
                out_channels,
                kernel_size=1,
                stride=stride,
                bias=False,
                norm=get_norm(norm, out_channels),
            )
        self.conv1 = _conv3x3(in_channels, out_channels, stride, norm, dilation)
        self.conv2 = _conv3x3(out_channels, out_channels, 1, norm, dilation)
        for layer in (self.conv1, self.conv2, self.shortcut):
            if layer is not None:
                weight_init.c2_msra_fill(layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


def _conv3x3(in_channels: int, out_channels: int, stride: int, norm: NormLike, dilation: int) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
