"""What every segmentation loss has in common: its call, its checks, and its precision."""

from typing import Protocol

import torch
from torch import Tensor

_VOID = 255


class SegmentationLoss(Protocol):
    """A loss that a segmentation head takes as an argument.

    Called with a map (B, K, h, w), the logits of K classes (or K features), and labels (B, H, W) of integers,
    where h, w may be smaller than H, W; returns a scalar of at least fp32, inside autocast too. If no pixel
    has a label, it is zero and still has a graph.
    """

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor: ...


def check_map_and_labels(values: Tensor, target: Tensor, what: str) -> None:
    """Shapes and dtypes of a loss's arguments.

    Raises:
        ValueError: `values` is not (B, K, h, w), `target` is not (B, H, W) of integers, or their B differ.
    """
    if values.dim() != 4 or target.dim() != 3 or values.shape[0] != target.shape[0]:
        raise ValueError(
            f"expected {what} (B, K, h, w) and labels (B, H, W) with one B, "
            f"got {tuple(values.shape)} and {tuple(target.shape)}."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {target.dtype}.")


def check_label_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Every label is a class or the ignored one. Not checked on a GPU, where reading a value would stall it, nor in a
    compiled model, where it would cut the graph in two.

    Raises:
        ValueError: names the first label found that is neither.
    """
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        label = int(wrong[0])
        # It need not be in the data set's files: this package's mappers write it for whatever is void there.
        advice = (
            "SemSegMapper gives void this label, whatever it is in the files, so leave ignore_value "
            "(MODEL.SEM_SEG_HEAD.IGNORE_VALUE) at 255."
            if label == _VOID
            else "check the data set's labels and the number of classes."
        )
        raise ValueError(
            f"label {label} is neither a class (0 to {classes - 1}) nor the ignored label {ignore_index}: {advice}"
        )
