"""Detectron2 ResNets with dilated last stages: output stride 8, 16 or 32."""

from collections.abc import Sequence
from itertools import accumulate

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet

from ccnet_d2.choices import check_choice
from ccnet_d2.layers.norm_act import NormLike
from ccnet_d2.modeling.config import own_keys, refuse_without_effect
from ccnet_d2.modeling.norm import named_norm

from .basic_block import DilatedBasicBlock
from .stem import DeepStem

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}
_STEM_STRIDE = 4


def build_resnet(
    depth: int,
    *,
    output_stride: int = 8,
    stem: str = "deep",
    stem_channels: Sequence[int] | None = None,
    ceil_mode: bool = False,
    contract_dilation: bool = False,
    norm: NormLike = "SyncBN",
    out_features: Sequence[str] = ("res4", "res5"),
    freeze_at: int = 0,
    in_channels: int = 3,
) -> ResNet:
    """A Detectron2 `ResNet` whose stages beyond `output_stride` trade their stride for dilation.

    Parameter names below `res2` … `res5` are Detectron2's, and the stride of a block sits in its 3x3 convolution.

    Args:
        depth: 18, 34, 50, 101 or 152.
        output_stride: 8, 16 or 32.
        stem: "deep" (three 3x3 convolutions) or "basic" (one 7x7, as in torchvision's weights).
        stem_channels: of the deep stem; (64, 64, 128) unless given, as in the official CCNet.
        ceil_mode: of the deep stem's max-pool; the official CCNet sets it.
        contract_dilation: give the first block of a dilated stage the dilation of the stage before
            (mmsegmentation); the official CCNet dilates every block of a stage alike.
        norm: see `detectron2.layers.get_norm`.
        out_features: names of the stages to return.
        freeze_at: number of stages, counted from the stem, to freeze.
        in_channels: channels of the image.

    Raises:
        ValueError: depth, output_stride or stem is not one of the values above, or the norm is unknown or does not fit
            the channels.
    """
    check_choice("depth", depth, _BLOCKS_PER_STAGE)
    check_choice("output_stride", output_stride, _STRIDES)
    norm = named_norm(norm, f"build_resnet with norm={norm!r} (MODEL.RESNETS.NORM)")
    stem_module = _build_stem(stem, in_channels, stem_channels, norm, ceil_mode)
    strides = _STRIDES[output_stride]
    dilations = _dilations(strides)
    is_bottleneck = _expansion(depth) > 1
    channels = stem_module.out_channels
    stages = []
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
        width = 64 * 2**i
        first_dilation = dilations[i]
        if contract_dilation and i > 0:
            first_dilation = dilations[i - 1] if strides[i] == 1 else dilations[i]
        stage_args: dict = {
            "num_blocks": num_blocks,
            "in_channels": channels,
            "out_channels": width * _expansion(depth),
            "stride_per_block": [strides[i]] + [1] * (num_blocks - 1),
            "dilation_per_block": [first_dilation] + [dilations[i]] * (num_blocks - 1),
            "norm": norm,
        }
        if is_bottleneck:
            stage_args |= {"bottleneck_channels": width, "stride_in_1x1": False}
        block_class = BottleneckBlock if is_bottleneck else DilatedBasicBlock
        stages.append(ResNet.make_stage(block_class, **stage_args))
        channels = stage_args["out_channels"]
    return ResNet(stem_module, stages, out_features=list(out_features), freeze_at=freeze_at)


def resnet_output_shape(
    depth: int, output_stride: int = 8, out_features: Sequence[str] = ("res4", "res5")
) -> dict[str, ShapeSpec]:
    """Channels and strides of `build_resnet`'s features, without building it."""
    strides = accumulate(_STRIDES[output_stride], lambda a, b: a * b, initial=_STEM_STRIDE)
    next(strides)
    shapes = {
        f"res{i + 2}": ShapeSpec(channels=64 * 2**i * _expansion(depth), stride=s)
        for i, s in enumerate(strides)
    }
    return {name: shapes[name] for name in out_features}


@BACKBONE_REGISTRY.register()
def build_ccnet_resnet_backbone(cfg, input_shape) -> ResNet:
    """`build_resnet` for yacs configs: MODEL.RESNETS.{DEPTH,NORM,OUT_FEATURES}, MODEL.BACKBONE.FREEZE_AT and
    MODEL.CCNET.{OUTPUT_STRIDE,STEM,STEM_CHANNELS,CEIL_MODE,CONTRACT_DILATION}.

    Raises:
        ValueError: as `build_resnet`.
        UserError: another key of MODEL.RESNETS says what this backbone is not.
    """
    ccnet = own_keys(cfg, "CCNET", "MODEL.BACKBONE.NAME build_ccnet_resnet_backbone")
    resnet = build_resnet(
        cfg.MODEL.RESNETS.DEPTH,
        output_stride=ccnet.OUTPUT_STRIDE,
        stem=ccnet.STEM,
        stem_channels=ccnet.STEM_CHANNELS,
        ceil_mode=ccnet.CEIL_MODE,
        contract_dilation=ccnet.CONTRACT_DILATION,
        norm=cfg.MODEL.RESNETS.NORM,
        out_features=cfg.MODEL.RESNETS.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
    )
    holds = {
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        "STRIDE_IN_1X1": False,
        "RES5_DILATION": _dilations(_STRIDES[ccnet.OUTPUT_STRIDE])[-1],
        "RES2_OUT_CHANNELS": 64 * _expansion(cfg.MODEL.RESNETS.DEPTH),
        "STEM_OUT_CHANNELS": resnet.stem.out_channels,
        "DEFORM_ON_PER_STAGE": [False] * 4,
    }
    refuse_without_effect(
        cfg.MODEL.RESNETS,
        "MODEL.RESNETS",
        holds,
        "build_ccnet_resnet_backbone does not read it: leave it out and set MODEL.CCNET.OUTPUT_STRIDE, STEM and "
        "STEM_CHANNELS, or take Detectron2's build_resnet_backbone for MODEL.BACKBONE.NAME.",
    )
    return resnet


def _expansion(depth: int) -> int:
    """Output channels of a stage by its width: from 50 layers on the blocks are bottlenecks."""
    return 4 if depth >= 50 else 1


def _build_stem(
    name: str, in_channels: int, channels: Sequence[int] | None, norm: NormLike, ceil_mode: bool
) -> BasicStem | DeepStem:
    check_choice("stem", name, ("deep", "basic"))
    if name == "deep":
        return DeepStem(in_channels, tuple(channels or (64, 64, 128)), norm, ceil_mode)
    if ceil_mode or channels:
        raise ValueError("ceil_mode and stem_channels belong to stem='deep'; the basic stem has neither.")
    return BasicStem(in_channels=in_channels, out_channels=64, norm=norm)


def _dilations(strides: Sequence[int]) -> list[int]:
    """A stage that gives up its stride doubles the dilation of what follows."""
    dilations, current = [], 1
    for i, stride in enumerate(strides):
        if i > 0 and stride == 1:
            current *= 2
        dilations.append(current)
    return dilations
