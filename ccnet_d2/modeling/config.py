"""Keys that this package adds to a yacs config, and what its heads read from it alike."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec

from ccnet_d2.errors import UserError


def add_ccnet_config(cfg: CfgNode) -> None:
    """Add this package's keys, with their defaults, to a Detectron2 config.

    `MODEL.CCNET` is for use with META_ARCHITECTURE "CCNet", BACKBONE.NAME "build_ccnet_resnet_backbone" and
    SEM_SEG_HEAD.NAME "CCNetHead"; head width, norm, classes, ignored label and loss weight are Detectron2's own
    MODEL.SEM_SEG_HEAD keys. `MODEL.RCCA` is for use with BACKBONE.NAME "build_resnet_rcca_backbone",
    "build_resnet_rcca_fpn_backbone" and "build_retinanet_resnet_rcca_fpn_backbone" in Detectron2's detection
    models. `TEST.CCNET` and `SOLVER.POLY_LR_*` are read by `ccnet_d2.engine.yacs`, `INPUT.CCNET` by
    `ccnet_d2.engine.yacs_augmentations`.
    """
    cfg.MODEL.CCNET = _ccnet_keys()
    cfg.MODEL.RANET = _ranet_keys()
    cfg.MODEL.RCCA = _rcca_keys()
    cfg.INPUT.CCNET = _input_keys()
    cfg.TEST.CCNET = _test_keys()
    # For SOLVER.LR_SCHEDULER_NAME "PolyLR"; the minimum is a learning rate
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_MINIMUM = 0.0


def own_keys(cfg: CfgNode, node: str, reader: str) -> CfgNode:
    """`cfg.MODEL.<node>`, which `add_ccnet_config` adds, for a part of this package that a config names.

    Args:
        cfg: a Detectron2 config.
        node: "CCNET", "RANET" or "RCCA".
        reader: the key that names the part, and its value, for the error.

    Raises:
        UserError: the keys were not added.
    """
    if node not in cfg.MODEL:
        raise UserError(
            f"{reader} has keys of its own: call ccnet_d2.modeling.add_ccnet_config(cfg) before the config's files are "
            "merged."
        )
    return cfg.MODEL[node]


def refuse_without_effect(node: CfgNode, name: str, holds: Mapping[str, Any], told: str) -> None:
    """Refuse values that change nothing here.

    One that is the default may not have been set, and one that says what holds anyway does no harm.

    Args:
        node: where the keys are.
        name: of the node, such as "MODEL.RESNETS".
        holds: what holds, whatever these keys say.
        told: for the error, after "…, but": why, and what to do.

    Raises:
        UserError: a key has another value.
    """
    defaults = get_cfg()
    add_ccnet_config(defaults)
    for part in name.split("."):
        defaults = defaults[part]
    for key, value in holds.items():
        if node[key] not in (value, defaults[key]):
            raise UserError(f"{name}.{key} is {node[key]!r}, but {told}")


def head_arguments(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
    """The constructor arguments that all segmentation heads here take from the same keys."""
    head = cfg.MODEL.SEM_SEG_HEAD
    ccnet = own_keys(cfg, "CCNET", f"MODEL.SEM_SEG_HEAD.NAME {head.NAME}")
    if not head.IN_FEATURES:
        raise UserError(
            "MODEL.SEM_SEG_HEAD.IN_FEATURES is empty: name the backbone's features that the head takes, such as [res5]."
        )
    strides = [shape.stride for name, shape in input_shape.items() if name in head.IN_FEATURES]
    refuse_without_effect(
        head,
        "MODEL.SEM_SEG_HEAD",
        {"COMMON_STRIDE": min(strides, default=None)},
        f"{head.NAME} does not read it: leave it out; logits have the stride of the finest feature of IN_FEATURES, "
        "and MODEL.CCNET.OUTPUT_STRIDE sets the backbone's.",
    )
    return {
        "input_shape": input_shape,
        "num_classes": head.NUM_CLASSES,
        "channels": head.CONVS_DIM,
        "norm": head.NORM,
        "ignore_value": head.IGNORE_VALUE,
        "loss_weight": head.LOSS_WEIGHT,
        "dropout": ccnet.DROPOUT,
        "activation": ccnet.ACTIVATION,
        "align_corners": ccnet.ALIGN_CORNERS,
    }


def _ccnet_keys() -> CfgNode:
    node = CfgNode()
    # Backbone
    node.OUTPUT_STRIDE = 8
    node.STEM = "deep"
    # Of the deep stem; () for (64, 64, 128)
    node.STEM_CHANNELS = ()
    node.CEIL_MODE = False
    node.CONTRACT_DILATION = False
    # Head: names are those of ccnet_d2.layers.CONTEXT_MODULES (suffixes: _r<R> sets the loops, _recompute saves
    # memory) and LOSSES in ccnet_d2.modeling.ccnet_head
    node.CONTEXT = "rcca"
    node.LOSS = "cross_entropy"
    # Category consistent loss: "piecewise", "quadratic", or "" for none
    node.CATEGORY_CONSISTENT = ""
    node.ACTIVATION = "relu"
    node.DROPOUT = 0.1
    node.ALIGN_CORNERS = False
    # Auxiliary classifier; "" for none
    node.AUX_FEATURE = "res4"
    node.AUX_CHANNELS = 512
    node.AUX_LOSS_WEIGHT = 0.4
    # Images are padded to a multiple of this; 0 pads no further than the batch needs
    node.SIZE_DIVISIBILITY = 0
    # Patterns such as "sem_seg_head.classifier.*" of the names that may be of another shape in MODEL.WEIGHTS, and then
    # keep their random start
    node.WEIGHTS_MAY_DIFFER = ()
    return node


def _ranet_keys() -> CfgNode:
    """For SEM_SEG_HEAD.NAME "RANetHead", beside MODEL.CCNET's keys of the same meaning; see that class."""
    node = CfgNode()
    node.VARIANT = "paper"
    # "region", or a name of ccnet_d2.layers.CONTEXT_MODULES
    node.CONTEXT = "region"
    node.COARSE_FEATURE = "res4"
    node.REPRESENTATIVES = 8
    node.PAIR_CELLS = 49 * 49
    node.COARSE_LOSS_WEIGHT = 0.4
    node.BOUNDARY_LOSS_WEIGHT = 0.2
    node.BOUNDARY_RADIUS = 2.0
    node.OUTPUT = "fine"
    return node


def _rcca_keys() -> CfgNode:
    node = CfgNode()
    # "rcca", or "nl" for the non-local block, right before this block of this stage
    node.MODULE = "rcca"
    node.STAGE = "res4"
    node.BEFORE = -1
    # Loops; 0 for the module's own number: 2 for "rcca", 1 for "nl"
    node.RECURRENCE = 0
    return node


def _input_keys() -> CfgNode:
    """Beside INPUT.CROP (of TYPE "absolute"), see `ccnet_d2.data.transforms.RandomScaleCrop`; () for none."""
    node = CfgNode()
    node.SCALE_RANGE = ()
    node.SHORT_SIDES = ()
    node.BASE_SIZE = ()
    # 0 for no limit
    node.CATEGORY_MAX_RATIO = 0.0
    # Brightness, contrast, saturation and hue
    node.PHOTOMETRIC = False
    return node


def _test_keys() -> CfgNode:
    """See `ccnet_d2.inference.build_mode`."""
    node = CfgNode()
    node.MODE = "whole"
    node.TILE = (769, 769)
    # () for two thirds of the tile
    node.STRIDE = ()
    return node
