"""What the segmentation heads are made of: convolutions, the context module by name, and the block around it."""

import re
from typing import Any

import torch
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from ccnet_d2.choices import check_choice
from ccnet_d2.layers.build import CONTEXT_MODULES, build_context
from ccnet_d2.layers.norm_act import ACTIVATIONS, NormLike
from ccnet_d2.losses import CategoryConsistentLoss
from ccnet_d2.losses.category_consistent import FORMS

from .norm import head_norm

CATEGORY_CONSISTENT_CHANNELS = 16  # TPAMI, Sec. 3.4
_NAME = re.compile(r"(?P<name>.+?)(_r(?P<recurrence>\d+))?(?P<recompute>_recompute)?")


def conv_norm_act(
    in_channels: int, channels: int, kernel_size: int, norm: NormLike, activation: str
) -> Conv2d:
    """Convolution of stride 1, norm and activation: (B, C_in, h, w) -> (B, C, h, w)."""
    # torch's own initial weights, as in the official code: larger ones learn several times slower behind a norm.
    return Conv2d(
        in_channels,
        channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, channels),
        activation=ACTIVATIONS[activation](),
    )


def named_context(
    name: str,
    in_channels: int,
    channels: int,
    *,
    norm: NormLike,
    activation: str,
    align_corners: bool,
    others: tuple[str, ...] = (),
) -> nn.Module:
    """A module of `ccnet_d2.layers.CONTEXT_MODULES` by its name and suffixes.

    A suffix _r<R> sets the number of loops, and _recompute after it sets `recompute`, which saves memory in training:
    "rcca", "rcca_r3", "rcca_recompute", "rcca_r3_recompute".

    Args as of `ContextBlock`, and
        others: names that the caller knows besides, for the error.

    Raises:
        ValueError: the name is unknown or none, or its module has no loops or cannot recompute.
    """
    if not isinstance(name, str):
        raise ValueError(f"context={name!r} is not the name of a context module: 'none' is that for none.")
    match = _NAME.fullmatch(name)
    module = match["name"] if match else name
    if module not in CONTEXT_MODULES:
        raise ValueError(
            f"unknown context module {name!r}: use one of {', '.join([*others, *CONTEXT_MODULES])}, where it has loops "
            "also with _r<R> for R of them, and _recompute to save memory, such as rcca_r1 or rcca_r3_recompute."
        )
    return build_context(
        module,
        in_channels,
        channels,
        norm=lambda c: get_norm(norm, c),
        activation=activation,
        align_corners=align_corners,
        **({"recurrence": int(match["recurrence"])} if match and match["recurrence"] else {}),
        **({"recompute": True} if match and match["recompute"] else {}),
    )


class ContextBlock(nn.Module):
    """The CCNet head without its classifier: `conva`, context module, `convb`, fused with the input.

    :paper:`CCNet: Criss-Cross Attention for Semantic Segmentation (TPAMI)`, Fig. 2. A context module that is a head
    of its own (`standalone`, such as PSP) takes the input directly, and its output is the block's.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        context: nn.Module | str,
        *,
        norm: NormLike,
        activation: str,
        align_corners: bool,
    ) -> None:
        """
        Args:
            in_channels: of the input.
            channels: of the output, and of the map that the context module works on.
            context: a module (B, C, h, w) -> (B, C, h, w), or the name of one in `ccnet_d2.layers.CONTEXT_MODULES`,
                with the suffixes of `named_context`.
            norm: see `detectron2.layers.get_norm`.
            activation: a key of `ccnet_d2.layers.norm_act.ACTIVATIONS`.
            align_corners: for the context modules that resize.

        Raises:
            ValueError: a name is unknown, or the norm does not fit the channels.
        """
        super().__init__()
        norm = head_norm(self, norm)
        check_choice("activation", activation, ACTIVATIONS)
        if not isinstance(context, nn.Module):
            context = named_context(
                context, in_channels, channels, norm=norm, activation=activation, align_corners=align_corners
            )
        self.context = context
        self.standalone = getattr(context, "standalone", False)
        if not self.standalone:
            self.conva = conv_norm_act(in_channels, channels, 3, norm, activation)
            self.convb = conv_norm_act(channels, channels, 3, norm, activation)
            self.fuse = conv_norm_act(in_channels + channels, channels, 3, norm, activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C_in, h, w) -> the block's output and that of the context module, (B, C, h, w) both."""
        if self.standalone:
            out = self.context(x)
            return out, out
        context = self.context(self.conva(x))
        return self.fuse(torch.cat([x, self.convb(context)], dim=1)), context


def category_consistent_branch(
    loss: CategoryConsistentLoss | str | None, block: ContextBlock, channels: int, **loss_args: Any
) -> tuple[nn.Conv2d | None, CategoryConsistentLoss | None]:
    """The 1x1 convolution to 16 channels and the category consistent loss on them, or None twice for no loss.

    Args:
        loss: a loss, or its form for one with the paper's weights.
        block: whose context module's output, of `channels`, it works on.
        loss_args: of a loss that is made here.

    Raises:
        ValueError: the form is unknown, or the context module is standalone.
    """
    if loss is None:
        return None, None
    if isinstance(loss, str):
        check_choice("category_consistent", loss, (*FORMS, None))
    if block.standalone:
        raise ValueError(
            f"category_consistent works on the map that goes into convb, which {type(block.context).__name__} "
            "as a whole head of its own does not have: choose another context, or leave the loss out "
            "(category_consistent=null)."
        )
    features = nn.Conv2d(channels, CATEGORY_CONSISTENT_CHANNELS, kernel_size=1)
    return features, CategoryConsistentLoss(form=loss, **loss_args) if isinstance(loss, str) else loss
