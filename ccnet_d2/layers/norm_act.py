"""Norm and activation layers chosen by name or callable, and the block convolution + norm + activation."""

from collections.abc import Callable
from math import gcd
from typing import TypeAlias

from torch import Tensor, nn

NormLike: TypeAlias = str | Callable[[int], nn.Module | None] | None
"""A name out of `NORMS`, "" or None for no norm, or a callable that takes the number of channels
(and may return None)."""

ActivationLike: TypeAlias = str | Callable[[], nn.Module] | None
"""A name out of `ACTIVATIONS`, "" or None for no activation, or a callable without arguments."""


def _group_norm(channels: int) -> nn.Module:
    # 32 groups as published; narrow layers get the most that divide them and leave two channels in a group,
    # since a group of one channel has nothing to normalise on a 1x1 map.
    groups = gcd(32, channels)
    return nn.GroupNorm(groups // 2 if groups == channels > 1 else groups, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": _group_norm,
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    # The slope of InPlaceABN, which the official CCNet head was trained with.
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
}


def build_norm(norm: NormLike, channels: int) -> nn.Module | None:
    """The norm layer for maps (B, channels, H, W), or None where `norm` is "" or None.

    Raises:
        ValueError: the name is not in `NORMS`.
    """
    if norm is None or norm == "":
        return None
    if isinstance(norm, str):
        if norm not in NORMS:
            known = ", ".join(repr(name) for name in NORMS)
            raise ValueError(
                f"unknown norm {norm!r}: use {known}, '' for none, or a callable taking the channels."
            )
        return NORMS[norm](channels)
    return norm(channels)


def build_activation(activation: ActivationLike) -> nn.Module | None:
    """The activation layer, or None where `activation` is "" or None.

    Raises:
        ValueError: the name is not in `ACTIVATIONS`.
    """
    if activation is None or activation == "":
        return None
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            known = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"unknown activation {activation!r}: use {known}, '' for none, or a callable.")
        return ACTIVATIONS[activation]()
    return activation()


class ConvNormAct(nn.Module):
    """2D convolution that keeps the map's size (at stride 1), then norm, then activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        dilation: int = 1,
        norm: NormLike = "BN",
        activation: ActivationLike = "relu",
    ) -> None:
        """
        Args:
            in_channels: channels of the input map.
            out_channels: channels of the output map.
            kernel_size: odd side of the kernel.
            dilation: step between the kernel's taps.
            norm: see `NormLike`; without a norm the convolution has a bias.
            activation: see `ActivationLike`.
        """
        super().__init__()
        normalize = build_norm(norm, out_channels)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=normalize is None,
        )
        # As the convolutions around the context module (He et al.), so that comparisons start on equal terms.
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm = normalize
        self.activation = build_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return self.normalize(self.conv(x))

    def normalize(self, x: Tensor) -> Tensor:
        """Norm and activation, of what the convolution made: (B, out_channels, H, W) -> the same shape."""
        if self.norm is not None:
            lone = x.numel() == x.shape[1]  # one value per channel: no variance to train on
            # Of subclasses, synchronised ones see the values of other devices too.
            if lone and self.training and type(self.norm) is nn.BatchNorm2d:
                raise ValueError(
                    "batch norm cannot train on one value per channel (a 1x1 map of a batch of one image): "
                    "use two images or more per device, norm='SyncBN' on several devices, or norm='GN'."
                )
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x
