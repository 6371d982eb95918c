"""What our heads and backbones read from a yacs config alike."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_sem_seg_head
from detectron2.modeling.backbone import BasicStem

from ccnet_d2.errors import UserError
from ccnet_d2.modeling import add_ccnet_config

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
