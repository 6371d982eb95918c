"""Backbones: Detectron2 ResNets at small output strides, and a small network for small machines."""

from .basic_block import DilatedBasicBlock
from .plain import PlainConvNet
from .rcca_resnet import (
    build_resnet_rcca_backbone,
    build_resnet_rcca_fpn_backbone,
    build_retinanet_resnet_rcca_fpn_backbone,
    rcca_resnet,
)
from .resnet import build_ccnet_resnet_backbone, build_resnet, resnet_output_shape
from .stem import DeepStem

__all__ = [
    "DeepStem",
    "DilatedBasicBlock",
    "PlainConvNet",
    "build_ccnet_resnet_backbone",
    "build_resnet",
    "build_resnet_rcca_backbone",
    "build_resnet_rcca_fpn_backbone",
    "build_retinanet_resnet_rcca_fpn_backbone",
    "rcca_resnet",
    "resnet_output_shape",
]
