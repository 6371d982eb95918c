"""What the context modules have in common, and the one that does nothing."""

from typing import ClassVar

from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""By the number of spatial axes."""


class ContextModule(nn.Module):
    """Base of the modules that gather context: (B, in_channels, *S) -> (B, out_channels, *S), S unchanged.

    There are two kinds. An *insert* (`standalone = False`) has as many channels out as in and sits where RCCA
    sits in the CCNet head, between the 3x3 convolution that reduces the backbone's map and the one after it.
    A *standalone* module (`standalone = True`) is the whole of its paper's head up to the classifier: it
    takes the backbone's map itself (for instance 2048 channels) and gives `out_channels` (for instance 512),
    in place of the convolutions around RCCA as well. `out_channels` defaults to `in_channels`, so that every
    module also fits between equal maps.
    """

    standalone: ClassVar[bool] = False

    def __init__(self, in_channels: int, out_channels: int | None = None, *, spatial_dims: int = 2) -> None:
        """
        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input's.
            spatial_dims: number of spatial axes, len(S): 1, 2 or 3.

        Raises:
            ValueError: a number of channels below 1, or another number of axes.
        """
        super().__init__()
        if spatial_dims not in CONVOLUTIONS:
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}.")
        out_channels = in_channels if out_channels is None else out_channels
        for name, value in (("channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.spatial_dims = spatial_dims

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            axes = "".join(", " + axis for axis in "THW"[3 - self.spatial_dims :])
            raise ValueError(
                f"{type(self).__name__} was built for inputs (B, {self.in_channels}{axes}), "
                f"got {tuple(x.shape)}."
            )


def check_recurrence(recurrence: int) -> None:
    """
    Raises:
        ValueError: R, the number of loops, is below 1 or no whole number.
    """
    if not hasattr(recurrence, "__index__") or recurrence < 1:
        raise ValueError(f"recurrence must be at least 1 and whole, got {recurrence!r}: one loop is R=1.")


def key_channels(channels: int, reduction: int) -> int:
    """C' = channels / reduction.

    Raises:
        ValueError: channels is not a positive multiple of reduction, or that is no whole number.
    """
    if not hasattr(reduction, "__index__"):
        raise ValueError(f"reduction must be a whole number, got {reduction!r}.")
    if reduction < 1 or channels < 1 or channels % reduction:
        raise ValueError(
            f"channels={channels} is not a positive multiple of reduction={reduction}: "
            "choose channels divisible by reduction, or another reduction."
        )
    return channels // reduction


class NoContext(ContextModule):
    """The identity: the FCN baseline of the tables, without any context module."""

    def __init__(self, channels: int, *, spatial_dims: int = 2) -> None:
        """
        Args:
            channels: C, of input and output.
            spatial_dims: 2 for (B, C, H, W), 3 for (B, C, T, H, W).
        """
        super().__init__(channels, spatial_dims=spatial_dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> the same tensor."""
        self._check_input(x)
        return x
