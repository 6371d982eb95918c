"""How (B, C, *S) maps lie in memory, NCHW or channels-last, copies between the two, and sums that take both."""

import torch
from torch import Tensor, library

from . import compiled


def is_channels_last(x: Tensor) -> bool:
    """Whether (B, C, *S) lies in memory as (B, *S, C), without gaps."""
    return x.movedim(1, -1).is_contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether (B, C, *S) lies in memory as NCHW or channels-last, without gaps."""
    return x.is_contiguous() or is_channels_last(x)


def has_even_rows(x: Tensor) -> bool:
    """Whether the channels of each position of (B, C, *S) lie side by side, and the positions at one distance.

    So do some channels of a channels-last map.
    """
    step = None
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if step is not None and stride != step:
            return False
        step = size * stride
    return x.shape[1] == 1 or x.stride(1) == 1


def to_channels_last(x: Tensor) -> Tensor:
    """(B, C, *S) itself where it is channels-last without gaps, else a copy that is; differentiable."""
    return x if is_channels_last(x) else compiled.channels_last_copy(x)


def to_channels_second(x: Tensor) -> Tensor:
    """(B, C, *S) itself where it is NCHW without gaps, else a copy that is; of channels-last maps a fast one."""
    if x.is_contiguous() or not (is_channels_last(x) and compiled.supports(x) is None):
        return x.contiguous()
    # The positions as the channels of a line of C positions: what makes channels-last maps makes NCHW ones of these.
    copy = compiled.channels_last_copy(x.flatten(2).transpose(1, 2))
    return copy.transpose(1, 2).unflatten(2, x.shape[2:])


def channel_sums(x: Tensor) -> Tensor:
    """Over images and positions, as a bias's gradient is: (B, C, *S) -> (C,); nothing is copied if x has no gaps."""
    return x.flatten(2).sum((0, 2))


def on_huge_pages(x: Tensor) -> Tensor:
    """The same new tensor without gaps, from 32 MiB on with its memory on pages of 2 MiB if the system has them.

    From that size on, the C library takes memory from the system at every call. Given out page by page, 4 KiB each, it
    takes as long as a good part of the work on CPUs.
    """
    if not torch.compiler.is_compiling() and compiled.runs_on_cpu(x):
        torch.ops.ccnet_d2.use_huge_pages(x)
    return x


if compiled.is_available():
    library.register_fake("ccnet_d2::use_huge_pages", lambda x: None)
