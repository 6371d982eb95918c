"""ResNets with RCCA from yacs and LazyConfig, and the COCO runs made of them."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.layers import RCCA
from ccnet_d2.layers.non_local_block import NonLocalBlock
from ccnet_d2.model_zoo import config_names, get_config
from ccnet_d2.modeling import add_ccnet_config, rcca_resnet

NEW_KEYS = {
    "": [],
    "rcca": ["rcca.gamma", "rcca.qkv.bias", "rcca.qkv.weight"],
    "nl": [
        "nl.norm.bias",
        "nl.norm.num_batches_tracked",
        "nl.norm.running_mean",
        "nl.norm.running_var",
        "nl.norm.weight",
        "nl.out.weight",
        "nl.qkv.bias",
        "nl.qkv.weight",
    ],
}


def yacs(name, **rcca):
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in rcca.items():
        cfg.MODEL.RCCA[key] = value
    return cfg


def test_yacs_resnet_is_detectron2_s_with_rcca():
    built = build_backbone(yacs("build_resnet_rcca_backbone"))
    plain = build_backbone(yacs("build_resnet_backbone"))
    assert isinstance(built, ResNet) and built.res4[1].rcca.recurrence == 2
    assert sorted(built.state_dict().keys() - plain.state_dict().keys()) == [
        f"res4.1.{key}" for key in NEW_KEYS["rcca"]
    ]
    plain.load_state_dict(built.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    for key, value in plain(x).items():
        torch.testing.assert_close(built(x)[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"NORM": "GN", "FUSE_TYPE": "avg", "OUT_CHANNELS": 64}])
@pytest.mark.parametrize("kind", ["", "retinanet_"])
def test_yacs_fpn_is_detectron2_s_with_rcca(kind, keys):
    configs = [yacs(f"build_{kind}resnet{part}_fpn_backbone") for part in ("_rcca", "")]
    for cfg in configs:
        for key, value in keys.items():
            cfg.MODEL.FPN[key] = value
    built, plain = (build_backbone(cfg) for cfg in configs)
    assert isinstance(built, FPN) and built.output_shape() == plain.output_shape()
    assert plain.state_dict().keys() < built.state_dict().keys()
    plain.load_state_dict(built.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    for key, value in plain(x).items():
        torch.testing.assert_close(built(x)[key], value, rtol=1e-5, atol=1e-5)


def test_yacs_keys_choose_module_and_place():
    built = build_backbone(
        yacs("build_resnet_rcca_backbone", MODULE="nl", STAGE="res3", BEFORE=0, RECURRENCE=2)
    )
    block = built.res3[0].nl
    assert isinstance(block, NonLocalBlock) and (block.in_channels, block.recurrence) == (64, 2)
    assert build_backbone(yacs("build_resnet_rcca_backbone", MODULE="nl")).res4[1].nl.recurrence == 1
    with pytest.raises(UserError, match="'res7'"):
        build_backbone(yacs("build_resnet_rcca_backbone", STAGE="res7"))


def test_rcca_resnet_takes_the_place_of_resnet():
    arguments = {"stages": ResNet.make_default_stages(18, norm="FrozenBN"), "out_features": ["res4"]}
    built = rcca_resnet(
        BasicStem(norm="FrozenBN"), freeze_at=5, recurrence=3, options={"reduction": 4}, **arguments
    )
    rcca = built.res4[1].rcca
    assert (rcca.recurrence, rcca.key_channels) == (3, 64)
    assert built.output_shape() == {"res4": ShapeSpec(channels=256, stride=16)}
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert trained == {"res4.1.rcca.gamma", "res4.1.rcca.qkv.weight", "res4.1.rcca.qkv.bias"}


RUNS = [
    (f"coco/mask_rcnn_{kind}{'_' if kind else ''}R_{depth}_FPN_{times}x.py", kind, depth, times)
    for kind in NEW_KEYS
    for depth in (50, 101)
    for times in (1, 3)
]


def test_the_runs_are_those_of_the_paper_s_table():
    assert {name for name in config_names() if name.startswith("coco/")} == {run[0] for run in RUNS}


@pytest.mark.parametrize(("name", "kind", "depth", "times"), RUNS)
def test_run_is_detectron2_s_baseline_and_the_module(name, kind, depth, times):
    cfg = get_config(name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    baseline = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    baseline.model.backbone.bottom_up.stages.depth = depth
    with torch.device("meta"):
        plain = instantiate(baseline.model)
    last = {50: 5, 101: 22}[depth]
    assert sorted(model.state_dict().keys() - plain.state_dict().keys()) == [
        f"backbone.bottom_up.res4.{last}.{key}" for key in NEW_KEYS[kind]
    ]
    assert plain.state_dict().keys() <= model.state_dict().keys()
    found = [m for m in model.modules() if isinstance(m, RCCA | NonLocalBlock)]
    assert [type(m).__name__ for m in found] == {"": [], "rcca": ["RCCA"], "nl": ["NonLocalBlock"]}[kind]
    if kind:
        assert found[0].qkv.in_channels == 1024
        assert found[0].key_channels == {"rcca": 128, "nl": 512}[kind]
        assert found[0].recurrence == {"rcca": 2, "nl": 1}[kind]

    assert cfg.train.init_checkpoint == f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl"
    assert cfg.train.max_iter == 90000 * times and cfg.train.num_pictures == 0
    assert cfg.train.cudnn_benchmark == get_cfg().CUDNN_BENCHMARK
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.02, 0.9, 1e-4)
    cfg.optimizer.params.model = model
    assert sum(len(g["params"]) for g in instantiate(cfg.optimizer).param_groups) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )
    multiplier = instantiate(cfg.lr_multiplier)
    drops = {1: (60000, 80000), 3: (210000, 250000)}[times]
    for drop, before, after in zip(drops, (1.0, 0.1), (0.1, 0.01), strict=True):
        assert multiplier((drop - 100) / cfg.train.max_iter) == pytest.approx(before)
        assert multiplier((drop + 100) / cfg.train.max_iter) == pytest.approx(after)
    assert MultiStepParamScheduler is type(instantiate(cfg.lr_multiplier.scheduler))
    assert cfg.dataloader.train.dataset.names == "coco_2017_train"
    assert cfg.dataloader.evaluator.dataset_name == "coco_2017_val"
    assert cfg.dataloader.train.mapper.image_format == cfg.model.input_format == "BGR"


def test_overrides_of_the_module():
    cfg = get_config("coco/mask_rcnn_nl_R_50_FPN_1x.py")
    cfg = apply_overrides(cfg, ["model.backbone.bottom_up.recurrence=2", "model.backbone.bottom_up.before=0"])
    with torch.device("meta"):
        block = instantiate(cfg.model).backbone.bottom_up.res4[0].nl
    assert block.recurrence == 2 and block.in_channels == 512
    with pytest.raises(UserError, match="recurrences"):
        apply_overrides(cfg, ["model.backbone.bottom_up.recurrences=2"])
