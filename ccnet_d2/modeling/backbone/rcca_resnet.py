"""Detectron2's ResNet with RCCA inside, for LazyConfig and for yacs configs."""

from collections.abc import Sequence
from typing import Any

from detectron2.layers import CNNBlockBase
from detectron2.modeling import BACKBONE_REGISTRY, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ccnet_d2.modeling.add_rcca import add_rcca
from ccnet_d2.modeling.config import own_keys


def rcca_resnet(
    stem: nn.Module,
    stages: Sequence[Sequence[CNNBlockBase]],
    num_classes: int | None = None,
    out_features: Sequence[str] | None = None,
    freeze_at: int = 0,
    *,
    stage: str = "res4",
    before: int | None = -1,
    module: nn.Module | str = "rcca",
    recurrence: int | None = None,
    options: dict[str, Any] | None = None,
) -> ResNet:
    """Detectron2's `ResNet` with a context module inside, which `freeze_at` leaves to be trained.

    In a LazyConfig that has a `ResNet` it takes its place: `model.backbone.bottom_up._target_ = rcca_resnet`.

    Args:
        stem: as in `ResNet`, like the four that follow.
        stages: likewise.
        num_classes: likewise.
        out_features: likewise.
        freeze_at: likewise.
        stage: `where` of `add_rcca`, which also has the others.
        before: see `add_rcca`.
        module: see `add_rcca`.
        recurrence: see `add_rcca`.
        options: further arguments of the module.

    Raises:
        UserError: as in `add_rcca`.
    """
    resnet = ResNet(stem, stages, num_classes, out_features, freeze_at)
    return add_rcca(resnet, stage, before, recurrence, module, **(options or {}))


@BACKBONE_REGISTRY.register()
def build_resnet_rcca_backbone(cfg, input_shape) -> ResNet:
    """Detectron2's `build_resnet_backbone` with MODEL.RCCA.{MODULE,STAGE,BEFORE,RECURRENCE} inside."""
    node = own_keys(cfg, "RCCA", f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME}")
    return add_rcca(
        build_resnet_backbone(cfg, input_shape), node.STAGE, node.BEFORE, node.RECURRENCE or None, node.MODULE
    )


@BACKBONE_REGISTRY.register()
def build_resnet_rcca_fpn_backbone(cfg, input_shape) -> FPN:
    """`build_resnet_rcca_backbone` under Detectron2's FPN, with the keys of `build_resnet_fpn_backbone`."""
    return _fpn(cfg, build_resnet_rcca_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_rcca_fpn_backbone(cfg, input_shape) -> FPN:
    """The same with the levels p6 and p7 of RetinaNet, as `build_retinanet_resnet_fpn_backbone` has them."""
    resnet = build_resnet_rcca_backbone(cfg, input_shape)
    channels = resnet.output_shape()["res5"].channels
    return _fpn(cfg, resnet, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _fpn(cfg, bottom_up: ResNet, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
