"""Edges between classes, and the cross entropy that balances them against the pixels between.

Shapes: B batch, h w the logits' size, H W the labels' size.
"""

import torch
from torch import Tensor, nn

from ccnet_d2.layers.precision import at_least_float32, autocast_disabled

from .log_likelihood import log_softmax, negative_log_likelihood
from .reduction import balanced_mean_over_processes
from .resize import upsample
from .segmentation_loss import check_label_range, check_map_and_labels


def edge_labels(labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Where classes meet: 1 on an edge, 0 elsewhere, ignore_index where the labels are ignored.

    A pixel whose upper, lower, left or right neighbour has another label, both not ignored, is an edge pixel, and so
    is everything in the 3x3 pixels around it: edges are four pixels wide, and those of a mirrored label map are the
    mirrored edges. CE2P's code marks one of the two pixels only, which moves every edge by half a pixel to one side,
    and takes ignored pixels for "no edge", though nothing is known of them.

    Made of the labels that a network is trained on, that is, after every geometric transform.

    Args:
        labels: (B, H, W) integers.
        ignore_index: label of the pixels left out.

    Returns:
        (B, H, W) of the labels' dtype and device.

    Raises:
        ValueError: the labels are not (B, H, W) integers.
    """
    if labels.dim() != 3 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be (B, H, W) integers, got {labels.dtype} {tuple(labels.shape)}.")
    ignored = labels == ignore_index
    edge = torch.zeros_like(ignored)
    # Pixels and their right neighbours, pixels and their lower neighbours.
    for axis in (1, 2):
        size = labels.shape[axis]
        before, after = (labels.narrow(axis, start, size - 1) for start in (0, 1))
        differ = (before != after) & (before != ignore_index) & (after != ignore_index)
        for start in (0, 1):
            edge.narrow(axis, start, size - 1).logical_or_(differ)
    for axis in (1, 2):  # 3x3 around every edge pixel, one axis after the other
        size = edge.shape[axis]
        narrow = edge.clone()
        edge.narrow(axis, 0, size - 1).logical_or_(narrow.narrow(axis, 1, size - 1))
        edge.narrow(axis, 1, size - 1).logical_or_(narrow.narrow(axis, 0, size - 1))
    return edge.to(labels.dtype).masked_fill_(ignored, ignore_index)


class EdgeCrossEntropy(nn.Module):
    """Cross entropy of two classes, no edge and edge, that carry the same weight in every batch.

    The published weights, w_edge = N_0 / (N_0 + N_1) and w_no = N_1 / (N_0 + N_1), where N_0 and N_1 count the
    batch's pixels of each, and a mean weighted by them, come to half the mean over edge pixels plus half the mean over
    the others, which is how it is computed: in distributed training over the pixels of all processes, see
    `mean_over_processes`. Of a batch without edge pixels only the second half is left, where the published code gives
    NaN; a batch without any label gives zero with a graph.

    Logits are enlarged bilinearly to the labels' size first. Computed in fp32, inside autocast too.

    :paper:`Devil in the Details: Towards Accurate Single and Multiple Human Parsing` (CE2P), Sec. 3.3.
    """

    def __init__(self, *, ignore_index: int = 255, align_corners: bool = False) -> None:
        """
        Args:
            ignore_index: label of the pixels left out.
            align_corners: of the enlargement.

        Raises:
            ValueError: ignore_index is 0 or 1, which are the two classes.
        """
        super().__init__()
        if ignore_index in (0, 1):
            raise ValueError(
                f"the ignored label {ignore_index} is one of the two classes of edges, 0 and 1: give void another "
                "label, such as 255."
            )
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            logits: (B, 2, h, w): no edge, edge.
            target: (B, H, W) integers, 0, 1 or ignore_index, such as `edge_labels` gives.

        Returns:
            Scalar, fp32 (fp64 for fp64 logits).

        Raises:
            ValueError: shapes or dtypes do not fit, or a label is out of range.
        """
        check_map_and_labels(logits, target, "logits")
        if logits.shape[1] != 2:
            raise ValueError(f"edges have the classes 0 and 1, but there are logits of {logits.shape[1]}.")
        check_label_range(target, 2, self.ignore_index)
        target = target.long()
        with autocast_disabled(logits.device):
            full = upsample(
                at_least_float32(logits), (target.shape[-2], target.shape[-1]), self.align_corners
            )
            per_pixel = negative_log_likelihood(log_softmax(full), target, self.ignore_index)
            return balanced_mean_over_processes(per_pixel, target == 0, target == 1)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, align_corners={self.align_corners}"
