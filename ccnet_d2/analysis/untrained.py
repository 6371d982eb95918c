"""Inputs and weights with which a model that was never trained costs what a trained one does."""

from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_OBJECTS = 8


def settle(model: nn.Module) -> nn.Module:
    """Make a model with random weights finite and busy, in place.

    A deep residual network whose norms are frozen at one overflows on random weights, and then a detector finds
    nothing, which costs less than finding something. Here every residual block starts as the identity (its last norm
    is zero), and a detector keeps its best objects however poor they are, so that its mask head has as much to do as
    it ever has.
    """
    for module in model.modules():
        if isinstance(module, BasicBlock | BottleneckBlock):
            last = getattr(module, "conv3", module.conv2).norm
            if isinstance(last, FrozenBatchNorm2d | _BatchNorm):
                nn.init.zeros_(last.weight)
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    for stage in predictor if isinstance(predictor, nn.ModuleList) else [predictor]:
        if hasattr(stage, "test_score_thresh"):
            stage.test_score_thresh = 0.0
    return model


def random_images(size: tuple[int, int], batch_size: int, frames: int | None = None) -> list[dict[str, Any]]:
    """Images of noise in Detectron2's format: uint8 (3, H, W), with the size of the answer; or clips of so many
    frames, (T, 3, H, W)."""
    clip = () if frames is None else (frames,)
    return [
        {
            "image": torch.randint(0, 256, (*clip, 3, *size), dtype=torch.uint8),
            "height": size[0],
            "width": size[1],
        }
        for _ in range(batch_size)
    ]


def label_pixels(images: list[dict[str, Any]], classes: int) -> list[dict[str, Any]]:
    """The same images with random class indices (H, W) for semantic segmentation, (T, H, W) for clips."""
    shapes = [tuple(image["image"].shape) for image in images]
    return [
        image | {"sem_seg": torch.randint(0, classes, (*shape[:-3], *shape[-2:]))}
        for image, shape in zip(images, shapes, strict=True)
    ]


def label_objects(images: list[dict[str, Any]], classes: int) -> list[dict[str, Any]]:
    """The same images with eight boxes, of a quarter to a half of each side, and their outlines as masks."""
    return [image | {"instances": _objects(tuple(image["image"].shape[-2:]), classes)} for image in images]


def _objects(size: tuple[int, int], classes: int) -> Instances:
    height, width = size
    sides = (0.25 + 0.25 * torch.rand(_OBJECTS, 2)) * torch.tensor([width, height])
    corners = torch.rand(_OBJECTS, 2) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat([corners, corners + sides], dim=1)
    instances = Instances(size)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.randint(0, classes, (_OBJECTS,))
    instances.gt_masks = PolygonMasks(
        [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
    )
    return instances
