"""Log probabilities of the classes of every pixel, and that of the true class."""

import torch.nn.functional as F
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Over the classes of (B, K, H, W); the same shape and dtype."""
    # As (B, K, H W): what is kept for the backward pass has four axes otherwise, which torch.compile lays out
    # channels-last where the traced graph says channels-first, and torch 2.14 then binds the backward graph to
    # the strides of the first batch, that is to the size of its images.
    return F.log_softmax(logits.flatten(2), dim=1).unflatten(2, logits.shape[2:])


def negative_log_likelihood(
    log_probability: Tensor, target: Tensor, ignore_index: int, weight: Tensor | None = None
) -> Tensor:
    """Of every pixel's true class, times that class's weight; 0 where the label is ignored.

    Args:
        log_probability: (B, K, H, W).
        target: (B, H, W) int64, 0 to K-1 or ignore_index.
        ignore_index: label of the pixels left out.
        weight: (K,).

    Returns:
        (B, H, W).
    """
    # Summed by the caller: on a GPU torch's own sum adds in any order, which deterministic algorithms forbid.
    return F.nll_loss(log_probability, target, weight, ignore_index=ignore_index, reduction="none")
