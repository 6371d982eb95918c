"""A plain stack of 3x3 convolutions: a backbone small enough to see only a neighbourhood."""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor

from ccnet_d2.layers.norm_act import NormLike
from ccnet_d2.modeling.norm import named_norm


class PlainConvNet(Backbone):
    """3x3 convolutions with norm and ReLU. Its one feature is named "conv".

    With the default strides an output pixel sees 5x5 input pixels and nothing beyond them, which is what the
    synthetic set needs to show what attention adds.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (64, 64),
        strides: Sequence[int] = (1, 2),
        norm: NormLike = "BN",
    ) -> None:
        """
        Args:
            in_channels: channels of the image.
            channels: output channels of each convolution.
            strides: stride of each convolution.
            norm: see `detectron2.layers.get_norm`.

        Raises:
            ValueError: there are not as many strides as channels, or the norm is unknown or does not fit the channels.
        """
        super().__init__()
        if len(channels) != len(strides):
            raise ValueError(
                f"channels {list(channels)} and strides {list(strides)} must name the same convolutions."
            )
        norm = named_norm(norm, f"PlainConvNet with norm={norm!r}")
        self.num_convs = len(channels)
        stride = 1
        for i, (c_out, conv_stride) in enumerate(zip(channels, strides, strict=True), start=1):
            conv = Conv2d(
                in_channels,
                c_out,
                kernel_size=3,
                stride=conv_stride,
                padding=1,
                bias=not norm,
                norm=get_norm(norm, c_out),
            )
            self.add_module(f"conv{i}", conv)
            in_channels = c_out
            stride *= conv_stride
        self._shape = {"conv": ShapeSpec(channels=in_channels, stride=stride)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"conv": (B, C, H/stride, W/stride)}."""
        for i in range(1, self.num_convs + 1):
            x = F.relu_(getattr(self, f"conv{i}")(x))
        return {"conv": x}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shape)
