"""What our heads and backbones read from a yacs config alike."""

import inspect

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model, build_sem_seg_head
from detectron2.modeling.backbone import BasicStem

from ccnet_d2.errors import UserError
from ccnet_d2.modeling import CCNetHead, CE2PHead, RANetHead, add_ccnet_config, build_resnet

STRIDES = {"res2": 4, "res3": 8, "res4": 8, "res5": 8}


def losses_of(name: str, weight: float) -> dict[str, torch.Tensor]:
    cfg = get_cfg()
    add_ccnet_config(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME, head.NUM_CLASSES, head.CONVS_DIM, head.NORM = name, 3, 8, "BN"
    head.IN_FEATURES, head.LOSS_WEIGHT = list(STRIDES), weight
    cfg.MODEL.CCNET.DROPOUT = 0.0
    torch.manual_seed(0)
    module = build_sem_seg_head(cfg, {key: ShapeSpec(channels=8, stride=s) for key, s in STRIDES.items()})
    features = {key: torch.randn(2, 8, 32 // stride, 32 // stride) for key, stride in STRIDES.items()}
    return module.train()(features, torch.randint(0, 3, (2, 32, 32)))[1]


@pytest.mark.parametrize("name", ["CCNetHead", "CE2PHead", "RANetHead"])
def test_detectron2_s_weight_of_the_semantic_loss(name):
    """Its configs of PanopticFPN say 0.5, which weighs a head against those of the boxes."""
    whole, half = losses_of(name, 1.0), losses_of(name, 0.5)
    assert len(whole) >= 2 and whole.keys() == half.keys()
    for key, loss in whole.items():
        assert loss > 0
        torch.testing.assert_close(half[key], 0.5 * loss)


@pytest.mark.parametrize("name", ["CCNetHead", "CE2PHead", "RANetHead"])
def test_heads_need_their_keys(name):
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.NAME = name
    with pytest.raises(
        UserError, match=rf"SEM_SEG_HEAD.NAME {name} has keys of its own: call .*add_ccnet_config"
    ):
        build_sem_seg_head(cfg, {key: ShapeSpec(channels=8, stride=s) for key, s in STRIDES.items()})


@pytest.mark.parametrize(
    "name",
    [
        "build_ccnet_resnet_backbone",
        "build_resnet_rcca_backbone",
        "build_resnet_rcca_fpn_backbone",
        "build_retinanet_resnet_rcca_fpn_backbone",
    ],
)
def test_backbones_need_their_keys(name):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    with pytest.raises(
        UserError, match=rf"BACKBONE.NAME {name} has keys of its own: call .*add_ccnet_config"
    ):
        build_backbone(cfg)


@pytest.mark.parametrize("name", ["CCNetHead", "CE2PHead", "RANetHead"])
def test_heads_without_features_say_so(name):
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME, cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = name, []
    with pytest.raises(UserError, match=r"^MODEL.SEM_SEG_HEAD.IN_FEATURES is empty"):
        build_sem_seg_head(cfg, {key: ShapeSpec(channels=8, stride=s) for key, s in STRIDES.items()})


@pytest.mark.parametrize("name", ["CCNetHead", "CE2PHead", "RANetHead"])
def test_the_common_stride_of_detectron2_s_heads_is_refused_unless_it_is_so(name):
    cfg = get_cfg()
    add_ccnet_config(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME, head.NORM, head.IN_FEATURES = name, "BN", ["res3", "res4", "res5"]
    shapes = {key: ShapeSpec(channels=8, stride=stride) for key, stride in STRIDES.items()}
    for head.COMMON_STRIDE in (4, 8):  # Detectron2's default, and what holds
        build_sem_seg_head(cfg, shapes)
    head.COMMON_STRIDE = 16
    with pytest.raises(
        UserError, match=rf"^MODEL.SEM_SEG_HEAD.COMMON_STRIDE is 16, but {name} does not read"
    ):
        build_sem_seg_head(cfg, shapes)


# Each key with a value of its own, and the argument that it is for.
_HEAD_KEYS = {"CONVS_DIM": 24, "NORM": "BN", "NUM_CLASSES": 3, "IGNORE_VALUE": 7, "LOSS_WEIGHT": 0.5}
_HEAD_ARGUMENTS = {"channels": 24, "norm": "BN", "num_classes": 3, "ignore_value": 7, "loss_weight": 0.5}
_CCNET_KEYS = {"DROPOUT": 0.3, "ACTIVATION": "leaky_relu", "ALIGN_CORNERS": True}
_CCNET_ARGUMENTS = {"dropout": 0.3, "activation": "leaky_relu", "align_corners": True}
_HEADS = {
    CCNetHead: (
        "CCNET",
        {
            **{"CONTEXT": "rcca_r1", "LOSS": "ohem", "CATEGORY_CONSISTENT": "quadratic"},
            **{"AUX_FEATURE": "res3", "AUX_CHANNELS": 40, "AUX_LOSS_WEIGHT": 0.6},
        },
        {
            **{
                "in_feature": "res5",
                "context": "rcca_r1",
                "loss": "ohem",
                "category_consistent": "quadratic",
            },
            **{"aux_feature": "res3", "aux_channels": 40, "aux_loss_weight": 0.6},
        },
        {"AUX_FEATURE": "aux_feature", "CATEGORY_CONSISTENT": "category_consistent"},
    ),
    CE2PHead: (
        "CCNET",
        {"CONTEXT": "rcca_r1", "CATEGORY_CONSISTENT": "quadratic"},
        {"in_features": ["res2", "res5"], "context": "rcca_r1", "category_consistent": "quadratic"},
        {"CATEGORY_CONSISTENT": "category_consistent"},
    ),
    RANetHead: (
        "RANET",
        {
            **{"VARIANT": "code", "CONTEXT": "psp", "COARSE_FEATURE": "res3", "OUTPUT": "coarse"},
            **{"REPRESENTATIVES": 4, "PAIR_CELLS": 36, "BOUNDARY_RADIUS": 1.5},
            **{"COARSE_LOSS_WEIGHT": 0.7, "BOUNDARY_LOSS_WEIGHT": 0.1},
        },
        {
            **{"variant": "code", "context": "psp", "coarse_feature": "res3", "output": "coarse"},
            **{"representatives": 4, "pair_cells": 36, "boundary_radius": 1.5, "in_feature": "res5"},
            **{"coarse_loss_weight": 0.7, "boundary_loss_weight": 0.1},
        },
        {"COARSE_FEATURE": "coarse_feature"},
    ),
}


@pytest.mark.parametrize("head", _HEADS, ids=lambda head: head.__name__)
def test_each_key_is_for_its_argument(head):
    node, keys, arguments, optional = _HEADS[head]
    cfg = get_cfg()
    add_ccnet_config(cfg)
    shape = {key: ShapeSpec(channels=8, stride=stride) for key, stride in STRIDES.items()}
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res5"]
    for own, values in (("SEM_SEG_HEAD", _HEAD_KEYS), ("CCNET", _CCNET_KEYS), (node, keys)):
        for key, value in values.items():
            assert cfg.MODEL[own][key] != value
            cfg.MODEL[own][key] = value
    expected = {"input_shape": shape, **_HEAD_ARGUMENTS, **_CCNET_ARGUMENTS, **arguments}
    assert head.from_config(cfg, shape) == expected
    for key, argument in optional.items():
        cfg.MODEL[node][key] = ""
        assert head.from_config(cfg, shape)[argument] is None


@pytest.mark.parametrize("head", [CCNetHead, RANetHead], ids=lambda head: head.__name__)
def test_a_key_left_alone_is_an_argument_left_alone(head):
    """Those of Detectron2's own keys aside, and CE2PHead, whose published layers are not the others'."""
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5"]
    found = head.from_config(cfg, {})
    parameters = inspect.signature(head.__init__).parameters
    for name in found.keys() - {"input_shape", "num_classes", "channels", "norm"}:
        assert found[name] == parameters[name].default, name
    parameters = inspect.signature(build_resnet).parameters
    for key in ("OUTPUT_STRIDE", "STEM", "CEIL_MODE", "CONTRACT_DILATION"):
        assert cfg.MODEL.CCNET[key] == parameters[key.lower()].default, key
    assert cfg.MODEL.CCNET.SIZE_DIVISIBILITY == 0


def test_each_key_is_for_its_argument_of_the_backbone_and_of_the_model(monkeypatch):
    built = []

    def build(depth, **arguments):
        built.append({"depth": depth, **arguments})
        return build_resnet(depth, **arguments)

    monkeypatch.setattr("ccnet_d2.modeling.backbone.resnet.build_resnet", build)
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = "CCNet", "CCNetHead"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_ccnet_resnet_backbone", 1
    resnets, ccnet = cfg.MODEL.RESNETS, cfg.MODEL.CCNET
    resnets.DEPTH, resnets.NORM, resnets.OUT_FEATURES = 34, "BN", ["res3", "res5"]
    resnets.RES2_OUT_CHANNELS = 64
    ccnet.OUTPUT_STRIDE, ccnet.STEM_CHANNELS, ccnet.CEIL_MODE, ccnet.CONTRACT_DILATION = (
        16,
        (4, 6, 8),
        True,
        True,
    )
    ccnet.AUX_FEATURE, ccnet.SIZE_DIVISIBILITY = "res3", 48
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES, cfg.MODEL.SEM_SEG_HEAD.NORM = ["res5"], "BN"
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE, cfg.INPUT.FORMAT, cfg.MODEL.DEVICE = 7, "BGR", "cpu"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    model = build_model(cfg)
    assert built == [
        {
            **{"depth": 34, "norm": "BN", "out_features": ["res3", "res5"], "freeze_at": 1, "in_channels": 3},
            **{"output_stride": 16, "stem": "deep", "stem_channels": (4, 6, 8)},
            **{"ceil_mode": True, "contract_dilation": True},
        }
    ]
    frozen = [name for name, p in model.backbone.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("stem.") for name in frozen)
    assert (model.input_format, model.size_divisibility, model.ignore_value) == ("BGR", 48, 7)
    assert model.pixel_mean.flatten().tolist() == [1, 2, 3] and model.pixel_std.flatten().tolist() == [
        4,
        5,
        6,
    ]


def ccnet_resnet(**resnets):
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_ccnet_resnet_backbone"
    for key, value in {"DEPTH": 18, "NORM": "BN", "OUT_FEATURES": ["res5"], **resnets}.items():
        cfg.MODEL.RESNETS[key] = value
    return build_backbone(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("NUM_GROUPS", 32),
        ("WIDTH_PER_GROUP", 8),
        ("RES5_DILATION", 2),
        ("RES2_OUT_CHANNELS", 128),
        ("STEM_OUT_CHANNELS", 32),
        ("DEFORM_ON_PER_STAGE", [False, False, True, True]),
    ],
)
def test_keys_of_detectron2_s_resnets_that_would_have_no_effect_are_refused(key, value):
    with pytest.raises(
        UserError, match=rf"^MODEL.RESNETS.{key} is .*build_ccnet_resnet_backbone does not read"
    ):
        ccnet_resnet(**{key: value})


def test_keys_of_detectron2_s_resnets_that_say_what_is_built_are_taken():
    resnet = ccnet_resnet(
        RES2_OUT_CHANNELS=64, STEM_OUT_CHANNELS=128, STRIDE_IN_1X1=False, RES5_DILATION=4, NUM_GROUPS=1
    )
    assert resnet.stem.out_channels == 128 and resnet.res2[0].out_channels == 64
    assert resnet.res5[1].conv1.dilation == (4, 4)


def test_the_basic_stem_is_one_key_away():
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_ccnet_resnet_backbone", "MODEL.RESNETS.NORM", "BN"])
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.OUT_FEATURES", ["res5"]])
    deep = build_backbone(cfg)
    assert [deep.stem.conv1.out_channels, deep.stem.conv3.out_channels] == [64, 128]
    cfg.merge_from_list(["MODEL.CCNET.STEM", "basic"])
    assert isinstance(build_backbone(cfg).stem, BasicStem)
    cfg.merge_from_list(["MODEL.CCNET.STEM_CHANNELS", (64, 64, 128)])
    with pytest.raises(ValueError, match="stem_channels belong to stem='deep'"):
        build_backbone(cfg)
