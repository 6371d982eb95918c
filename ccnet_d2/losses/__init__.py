"""Losses of semantic segmentation. Need torch alone.

Each is a callable (logits (B, K, h, w), target (B, H, W)) -> scalar tensor (`SegmentationLoss`), so that a
head takes it as an argument.
"""

from .category_consistent import CategoryConsistentLoss, CategoryConsistentTerms
from .cross_entropy import CrossEntropy
from .ohem import OHEMCrossEntropy
from .segmentation_loss import SegmentationLoss

__all__ = [
    "CategoryConsistentLoss",
    "CategoryConsistentTerms",
    "CrossEntropy",
    "OHEMCrossEntropy",
    "SegmentationLoss",
]
