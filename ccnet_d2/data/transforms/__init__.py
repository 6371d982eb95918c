"""Augmentations of the segmentation recipes, for image and label map alike.

They are ordinary Detectron2 augmentations and mix with Detectron2's own, such as `RandomFlip`.
"""

from ccnet_d2.data.transforms.mirror import is_mirroring, swap_labels
from ccnet_d2.data.transforms.outside import outside_of
from ccnet_d2.data.transforms.photometric import PhotometricTransform, RandomPhotometricDistortion
from ccnet_d2.data.transforms.resize import ResizeByScale, ResizeLinearTransform, ResizeTo, ResizeToFit
from ccnet_d2.data.transforms.rotate_fit import RandomRotateFit, RotateFitTransform
from ccnet_d2.data.transforms.scale_crop import RandomScaleCrop, ScaleCropTransform

__all__ = [
    "PhotometricTransform",
    "RandomPhotometricDistortion",
    "RandomRotateFit",
    "RandomScaleCrop",
    "ResizeByScale",
    "ResizeLinearTransform",
    "ResizeTo",
    "ResizeToFit",
    "RotateFitTransform",
    "ScaleCropTransform",
    "is_mirroring",
    "outside_of",
    "swap_labels",
]
