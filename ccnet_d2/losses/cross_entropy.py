"""Cross entropy over logits enlarged to the size of the labels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ccnet_d2.layers.precision import at_least_float32, autocast_disabled

from .log_likelihood import log_softmax, negative_log_likelihood
from .reduction import mean_over_processes
from .resize import upsample
from .segmentation_loss import check_label_range, check_map_and_labels


class CrossEntropy(nn.Module):
    """Mean cross entropy of the pixels that have a label.

    Logits are enlarged bilinearly to the labels' size first. Computed in fp32, inside autocast too. A batch
    without any label gives zero with a graph, where `torch.nn.CrossEntropyLoss` gives NaN. In distributed training
    the mean is over the pixels of all processes, see `mean_over_processes`.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        align_corners: bool = False,
        class_weight: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            ignore_index: label of the pixels left out.
            align_corners: of the enlargement (True in the official CCNet, and for crops of 769).
            class_weight: K weights; the mean is then weighted by the pixels' weights, as in torch.
        """
        super().__init__()
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        weight = None if class_weight is None else torch.tensor(list(class_weight), dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            logits: (B, K, h, w).
            target: (B, H, W) integers, 0 to K-1 or ignore_index.

        Returns:
            Scalar, fp32 (fp64 for fp64 logits).

        Raises:
            ValueError: shapes or dtypes do not fit, a label is out of range, or there are not K weights.
        """
        check_map_and_labels(logits, target, "logits")
        classes = logits.shape[1]
        check_label_range(target, classes, self.ignore_index)
        if self.class_weight is not None and len(self.class_weight) != classes:
            raise ValueError(f"{len(self.class_weight)} class weights given for logits of {classes} classes.")
        target = target.long()
        with autocast_disabled(logits.device):
            logits = at_least_float32(logits)
            weight = None if self.class_weight is None else self.class_weight.to(logits)
            full = upsample(logits, (target.shape[-2], target.shape[-1]), self.align_corners)
            total = negative_log_likelihood(log_softmax(full), target, self.ignore_index, weight).sum()
            valid = target != self.ignore_index
            count = valid if weight is None else weight[target.masked_fill(~valid, 0)] * valid
            return mean_over_processes(total, count.sum())

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, align_corners={self.align_corners}"
