"""Log probabilities of the classes of every pixel."""

import torch.nn.functional as F
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Over the classes of (B, K, H, W); the same shape and dtype."""
    # As (B, K, H W): what is kept for the backward pass has four axes otherwise, which torch.compile lays out
    # channels-last where the traced graph says channels-first, and torch 2.14 then binds the backward graph to
    # the strides of the first batch, that is to the size of its images.
    return F.log_softmax(logits.flatten(2), dim=1).unflatten(2, logits.shape[2:])
