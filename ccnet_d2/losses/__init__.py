"""Losses of semantic segmentation. Need torch alone.

Each is a callable (logits (B, K, h, w), target (B, H, W)) -> scalar tensor (`SegmentationLoss`), so that a
head takes it as an argument.
"""

from .boundary import BoundaryLoss, label_boundaries
from .category_consistent import CategoryConsistentLoss, CategoryConsistentTerms
from .cross_entropy import CrossEntropy
from .edge import EdgeCrossEntropy, edge_labels
from .ohem import OHEMCrossEntropy
from .segmentation_loss import SegmentationLoss

__all__ = [
    "BoundaryLoss",
    "CategoryConsistentLoss",
    "CategoryConsistentTerms",
    "CrossEntropy",
    "EdgeCrossEntropy",
    "OHEMCrossEntropy",
    "SegmentationLoss",
    "edge_labels",
    "label_boundaries",
]
