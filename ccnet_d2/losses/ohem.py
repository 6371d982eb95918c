"""Cross entropy with online hard example mining (OHEM).

Shapes: B batch, K classes, h w the logits' size, H W the labels' size.
"""

import torch
from torch import Tensor, nn

from ccnet_d2.layers.precision import at_least_float32, autocast_disabled

from .log_likelihood import log_softmax, negative_log_likelihood
from .reduction import mean_over_processes
from .resize import sample_labels, upsample
from .segmentation_loss import check_label_range, check_map_and_labels


class OHEMCrossEntropy(nn.Module):
    """Mean cross entropy of the hard pixels: those whose true class has a probability of at most a threshold.

    The threshold is `thresh`, raised if need be so that `min_kept` pixels of the batch on this device are
    hard: to the k-th smallest true-class probability, or to 1 (all pixels) where there are not more than k
    labels. It is found, as in the official CCNet code, on the batch reduced by `factor` per side:
    probabilities sampled bilinearly and labels by nearest, corners aligned, k = min_kept // factor^2. factor
    = 1 finds it at full resolution directly: at least min_kept pixels are then kept exactly.

    Computed in fp32, inside autocast too. A batch without any label, and one in which no pixel is hard, gives
    zero with a graph. In distributed training each process finds the hard pixels among its own, as in the official
    code; the mean is over those of all processes, see `mean_over_processes`.
    """

    def __init__(
        self,
        *,
        thresh: float = 0.7,
        min_kept: int = 100_000,
        factor: int = 8,
        ignore_index: int = 255,
        align_corners: bool = True,
    ) -> None:
        """
        Args:
            thresh: probability of the true class above which a pixel is easy.
            min_kept: pixels at full resolution, per device and step, to keep at least (approximately if
                factor > 1).
            factor: reduction per side for finding the threshold; 1 for none.
            ignore_index: label of the pixels left out.
            align_corners: of the enlargement of the logits.

        Raises:
            ValueError: thresh is outside [0, 1], min_kept is negative, or factor is below 1.
        """
        super().__init__()
        if not 0 <= thresh <= 1:
            raise ValueError(f"thresh is a probability between 0 and 1, got {thresh}.")
        if min_kept < 0:
            raise ValueError(f"min_kept must not be negative, got {min_kept}.")
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}.")
        self.thresh = thresh
        self.min_kept = min_kept
        self.factor = factor
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            logits: (B, K, h, w).
            target: (B, H, W) integers, 0 to K-1 or ignore_index.

        Returns:
            Scalar, fp32 (fp64 for fp64 logits).

        Raises:
            ValueError: shapes or dtypes do not fit, or a label is out of range.
        """
        check_map_and_labels(logits, target, "logits")
        check_label_range(target, logits.shape[1], self.ignore_index)
        target = target.long()
        with autocast_disabled(logits.device):
            full = upsample(
                at_least_float32(logits), (target.shape[-2], target.shape[-1]), self.align_corners
            )
            log_probability = log_softmax(full)
            with torch.no_grad():
                hard = self._hard(log_probability, target)
            loss = negative_log_likelihood(
                log_probability, target.masked_fill(~hard, self.ignore_index), self.ignore_index
            )
            return mean_over_processes(loss.sum(), hard.sum())

    def _hard(self, log_probability: Tensor, target: Tensor) -> Tensor:
        """Which pixels are kept: (B, K, H, W), (B, H, W) -> bool (B, H, W)."""
        valid = target != self.ignore_index
        classes = target.masked_fill(~valid, 0)
        probability = log_probability.gather(1, classes.unsqueeze(1)).squeeze(1).exp()
        if self.factor == 1:
            threshold = self._threshold(probability, valid)
        else:
            size = (
                max(1, round(target.shape[-2] / self.factor)),
                max(1, round(target.shape[-1] / self.factor)),
            )
            labels = sample_labels(target, size, align_corners=True)
            valid_sample = labels != self.ignore_index
            sample = sample_probability(log_probability, labels.masked_fill(~valid_sample, 0))
            threshold = self._threshold(sample, valid_sample)
        return valid & (probability <= threshold)

    def _threshold(self, probability: Tensor, valid: Tensor) -> Tensor:
        """Scalar threshold out of true-class probabilities and their validity, without waiting for the
        GPU."""
        kept = self.min_kept // self.factor**2
        # Not new_tensor, which copies a number from the CPU.
        thresh = probability.new_full((), self.thresh)
        one = probability.new_ones(())
        if kept >= probability.numel():
            return one
        if kept == 0:
            return thresh
        # Pixels without a label go behind all others; with k of fewer than k labels the rank does not matter.
        ranked = probability.masked_fill(~valid, 2.0).flatten()
        kth = ranked.kthvalue(kept).values
        return torch.where(valid.sum() <= kept, one, torch.maximum(thresh, kth))

    def extra_repr(self) -> str:
        return (
            f"thresh={self.thresh}, min_kept={self.min_kept}, factor={self.factor}, "
            f"ignore_index={self.ignore_index}, align_corners={self.align_corners}"
        )


def sample_probability(log_probability: Tensor, labels: Tensor) -> Tensor:
    """Probability of each label's class, read bilinearly on a coarser grid with its corners on those of the
    map.

    Args:
        log_probability: (B, K, H, W).
        labels: (B, h, w) classes.

    Returns:
        (B, h, w). Only the four neighbours of each sample are exponentiated and no map of all classes is
        resized.
    """
    top, bottom, down = _neighbours(log_probability.shape[-2], labels.shape[-2], log_probability)
    left, right, across = _neighbours(log_probability.shape[-1], labels.shape[-1], log_probability)
    image = torch.arange(labels.shape[0], device=labels.device)[:, None, None]

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return log_probability[image, labels, rows[:, None], columns[None, :]].exp()

    upper = torch.lerp(at(top, left), at(top, right), across)
    lower = torch.lerp(at(bottom, left), at(bottom, right), across)
    return torch.lerp(upper, lower, down[:, None])


def _neighbours(length: int, out_length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each output position: the inputs before and after it, and how far it is from the first."""
    steps = max(out_length - 1, 1)
    position = torch.arange(out_length, device=like.device) * (length - 1)
    before = position // steps
    weight = (position % steps).to(like.dtype) / steps
    return before, (before + 1).clamp(max=length - 1), weight
