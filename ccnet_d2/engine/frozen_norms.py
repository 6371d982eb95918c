"""Norms that are frozen before they have seen anything."""

import logging

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ccnet_d2.wording import listed

__all__ = ["warn_of_idle_norms"]

logger = logging.getLogger(__name__)


def warn_of_idle_norms(model: nn.Module) -> None:
    """Log which frozen norms give what they get: no checkpoint filled them, and they do not learn.

    A head has such norms where it follows a backbone that keeps those of ImageNet (`model.backbone.norm=FrozenBN`), and
    trains without a word, if worse by far.

    Args:
        model: as it is when the training begins.
    """
    idle = [name for name, module in model.named_modules() if _is_idle(module)]
    if idle:
        logger.warning(
            "These norms are frozen as they were made, and normalise nothing: %s. No checkpoint has values for them, "
            "and they do not learn; a head that is to be trained needs others, such as model.sem_seg_head.norm=BN.",
            listed(idle, 3),
        )


def _is_idle(module: nn.Module) -> bool:
    if not isinstance(module, FrozenBatchNorm2d):
        return False
    values = torch.stack([module.weight, module.bias, module.running_mean, module.running_var])
    ones_and_zeros = values.new_tensor([1.0, 0.0, 0.0, 1.0])[:, None].expand_as(values)
    # Made with a variance of 1 - eps; one of 1 stands in for what a checkpoint lacks.
    return torch.allclose(values, ones_and_zeros, rtol=0, atol=2 * module.eps)
