"""Detectron2's norms by name, for heads and backbones that say which of them it was where a name or a width does not
fit."""

from detectron2.layers import get_norm
from torch import nn

from ccnet_d2.layers.norm_act import NormLike

_GROUPS = 32  # of Detectron2's "GN"


def head_norm(head: nn.Module, norm: NormLike) -> NormLike:
    """`norm` of a head as something that takes the channels; "" and None, for none, as they are.

    Args:
        head: to be named in errors.
        norm: see `detectron2.layers.get_norm`.
    """
    return named_norm(norm, f"{type(head).__name__} with norm={norm!r} (MODEL.SEM_SEG_HEAD.NORM)")


def named_norm(norm: NormLike, told: str) -> NormLike:
    """`norm` as something that takes the channels; "" and None, for none, as they are.

    Args:
        norm: see `detectron2.layers.get_norm`.
        told: what errors begin with: whose norm it is, and which.
    """
    if not norm or not isinstance(norm, str):
        return norm

    def build(channels: int) -> nn.Module | None:
        if norm == "GN" and channels % _GROUPS:
            raise ValueError(
                f"{told} normalises {_GROUPS} groups of channels, but has a convolution of {channels} channels: make "
                f"its widths multiples of {_GROUPS}, or take another norm."
            )
        try:
            layer: nn.Module | None = get_norm(norm, channels)
        except KeyError as error:
            raise ValueError(
                f"{told}: there is no such norm; take 'BN', 'SyncBN', 'FrozenBN', 'GN', or '' for none."
            ) from error
        return layer

    return build
