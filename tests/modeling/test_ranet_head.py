"""RANet's head: shapes, losses, both outputs, both variants, the tables' rows, and a run that learns."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from scipy import ndimage

from ccnet_d2.losses import BoundaryLoss, CrossEntropy
from ccnet_d2.modeling import CCNet, PlainConvNet, RANetHead, add_ccnet_config

SHAPE = {"res4": ShapeSpec(channels=12, stride=8), "res5": ShapeSpec(channels=16, stride=8)}


def head(**options) -> RANetHead:
    torch.manual_seed(0)
    return RANetHead(SHAPE, **{"num_classes": 3, "channels": 8, "norm": "BN", "dropout": 0.0} | options)


def features(batch: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(batch, spec.channels, 5, 6) for name, spec in SHAPE.items()}


def targets(batch: int = 2) -> torch.Tensor:
    labels = torch.randint(0, 3, (batch, 5, 6), generator=torch.Generator().manual_seed(2))
    labels[:, 0, 0] = 255
    return labels.repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.mark.parametrize(("variant", "ignored"), [("paper", 255), ("code", 255), ("code", 2)])
def test_losses_are_those_of_the_variant(variant, ignored):
    net = head(variant=variant, align_corners=True, ignore_value=ignored, loss_weight=0.7).train()
    x, labels = features(), targets()
    labels[labels == 255] = ignored
    none, losses = net(x, labels)
    assert none is None
    expected = {"loss_sem_seg", "loss_sem_seg_coarse", "loss_boundary"}
    assert set(losses) == expected | ({"loss_boundary_fine"} if variant == "code" else set())
    sum(losses.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "bias" not in name:
            assert parameter.grad.abs().sum() > 0, name

    # The weights, from the maps that a head in the same state gives.
    again = copy.deepcopy(net)
    found = {}
    for part in ("classifier", "semantic", "boundary", "fine_boundary"):
        module = getattr(again, part)
        if module is not None:
            module.register_forward_hook(lambda m, i, out, part=part: found.__setitem__(part, out))
    again(x, labels)
    common = {"align_corners": True, "ignore_index": ignored}
    ce = CrossEntropy(**common)
    be = BoundaryLoss(**common, resolution="map" if variant == "paper" else "labels")
    for name, weight, loss, part in (
        ("loss_sem_seg", 1.0, ce, "classifier"),
        ("loss_sem_seg_coarse", 0.4, ce, "semantic"),
        ("loss_boundary", 0.2 if variant == "paper" else 0.08, be, "boundary"),
        ("loss_boundary_fine", 0.2, be, "fine_boundary"),
    ):
        if name in losses:
            torch.testing.assert_close(losses[name], 0.7 * weight * loss(found[part], labels))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_parts_are_put_together_as_in_the_table(variant):
    net = head(variant=variant).eval()
    with torch.no_grad():  # sharper scores, so that there are several regions
        net.semantic.weight.mul_(30)
        net.boundary.weight.mul_(8)
    x = features()
    a = net.reduce(x["res5"])
    source = a if variant == "paper" else net.coarse_reduce(x["res4"])
    o = net.context(a, net.boundary(source)[:, 0].sigmoid(), net.semantic(source).softmax(1))
    assert not torch.allclose(a, o)
    fused = net.fuse(torch.cat([a, o], dim=1))
    expected = F.interpolate(net.classifier(fused), (40, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(x)[0], expected)


def test_the_code_variant_learns_boundaries_of_its_fine_features_too():
    net = head(variant="code").train()
    seen = []
    net.fuse.register_forward_hook(lambda module, inputs, out: seen.append(out))
    net.fine_boundary.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(features(), targets())
    assert len(seen) == 2 and torch.equal(*seen)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_dropout_of_whole_channels_comes_before_the_classifiers(variant):
    net = head(variant=variant, channels=32, dropout=0.5).train()
    seen = {}
    for part in ("classifier", "semantic", "boundary"):
        getattr(net, part).register_forward_pre_hook(
            lambda module, inputs, part=part: seen.__setitem__(part, inputs[0])
        )
    net(features(), targets())
    shares = {part: (x == 0).flatten(2).all(dim=2).float().mean().item() for part, x in seen.items()}
    assert 0.2 < shares["classifier"] < 0.8
    # A itself is not dropped: the regions' features are those that the paper's B and C come from.
    assert shares["semantic"] == shares["boundary"]
    assert 0.2 < shares["semantic"] < 0.8 if variant == "code" else shares["semantic"] == 0


def test_boundaries_start_at_a_tenth_everywhere():
    for channels, off in ((8, 0.005), (512, 0.06)):
        net = head(channels=channels).train()
        first = net.boundary(net.reduce(features()["res5"])).sigmoid()
        assert (first - 0.1).abs().max() < off


@pytest.mark.parametrize(
    ("options", "loss_options"),
    [
        ({"boundary_radius": 5.0}, {"radius": 5.0, "resolution": "map"}),
        ({"boundary_resolution": "labels"}, {"resolution": "labels"}),
        ({"balanced_boundaries": True}, {"balanced": True, "resolution": "map"}),
    ],
)
def test_options_of_the_boundary_loss(options, loss_options):
    found = []
    net = head(**options).train()
    net.boundary.register_forward_hook(lambda module, inputs, out: found.append(out))
    # Stripes of a cell and a half: boundaries at some distance of each other, on a part of the cells.
    labels = torch.arange(48).div(12, rounding_mode="floor").remainder(3).expand(2, 40, 48)
    loss = net(features(), labels)[1]["loss_boundary"]
    torch.testing.assert_close(loss, 0.2 * BoundaryLoss(**loss_options)(found[0], labels))
    assert not torch.allclose(loss, 0.2 * BoundaryLoss(resolution="map")(found[0], labels), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "reaches"),
    [
        ({}, False),
        ({"map_gradients": True}, True),
        ({"variant": "code"}, True),
        ({"variant": "code", "map_gradients": False}, False),
    ],
)
def test_whether_the_fine_loss_teaches_the_maps(options, reaches):
    net = head(**options).train()
    loss = net(features(), targets())[1]["loss_sem_seg"]
    weights = (net.boundary.weight, net.semantic.weight)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [reaches] * 2


def test_all_its_convolutions_have_the_head_s_activation():
    net = head(variant="code", activation="leaky_relu")
    kinds = {type(m) for m in net.modules() if isinstance(m, torch.nn.ReLU | torch.nn.LeakyReLU)}
    assert kinds == {torch.nn.LeakyReLU}


def test_fine_and_coarse_output():
    net = head().eval()
    x = features()
    fine, losses = net(x, image_size=(40, 48))
    assert fine.shape == (2, 3, 40, 48) and losses == {}
    coarse_net = head(output="coarse").eval()
    coarse_net.load_state_dict(net.state_dict())
    coarse, _ = coarse_net(x, image_size=(40, 48))
    logits = net.semantic(net.reduce(x["res5"]))
    expected = F.interpolate(logits, (40, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(coarse, expected)
    assert not torch.allclose(coarse, fine)
    assert net(x)[0].shape == (2, 3, 40, 48)  # stride 8, without a size given


def test_the_coarse_maps_come_from_res4_in_the_code_variant_only():
    for variant, moved in (("paper", False), ("code", True)):
        net = head(variant=variant, output="coarse").eval()
        x = features()
        before = net(x)[0]
        x["res4"] = x["res4"] + 1
        assert torch.equal(net(x)[0], before) != moved


def test_an_untrained_network_sees_one_region():
    net = head().eval()
    seen = []
    net.context.construction.register_forward_hook(lambda m, i, out: seen.extend(out))
    net(features())
    assert [int(regions.region.max()) for regions in seen] == [0, 0]
    assert [len(regions.representatives) for regions in seen] == [8, 8]


@pytest.mark.parametrize("context", ["none", "psp", "nl", "rcca", "region"])
def test_other_context_in_its_place(context):
    net = head(channels=16, context=context).train()
    _, losses = net(features(), targets())
    assert ("loss_boundary" in losses) == (context == "region")
    sum(losses.values()).backward()
    assert net.classifier.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"use_boundary": False},
        {"use_semantic": False},
        {"intra": False},
        {"inter": False},
        {"representatives": 2},
        {"normalization": "others"},
        {"samples": 2},
        {"pair_cells": 6},
        {"threshold": 0.2},
        {"small_regions": "join"},
        {"kernel": "free"},
    ],
)
def test_rows_of_the_tables_and_other_choices_change_the_output(options):
    common = {"small_regions": "keep", "threshold": 0.8}
    plain, changed = head(**common).eval(), head(**common | options).eval()
    changed.load_state_dict(plain.state_dict())
    with torch.no_grad():  # sharper scores, so that there are several regions
        for net in (plain, changed):
            net.semantic.weight.mul_(30)
            net.boundary.weight.mul_(8)
    x = features()
    one, other = plain(x)[0], changed(x)[0]
    assert other.isfinite().all() and not torch.allclose(one, other)


def test_half_precision_trains():
    net = head().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = net(features(), targets())
    sum(losses.values()).backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_labels_all_ignored_give_no_nan():
    net = head().train()
    _, losses = net(features(), torch.full((2, 40, 48), 255))
    assert sum(losses.values()) == 0
    sum(losses.values()).backward()


def test_learns_and_its_coarse_output_as_well():
    """Squares of two classes on a background; 32 steps."""
    torch.manual_seed(0)
    backbone = PlainConvNet(channels=(16, 16), strides=(1, 2))
    net = RANetHead(
        backbone.output_shape(), in_feature="conv", num_classes=3, channels=16, norm="BN", dropout=0.0
    )
    model = CCNet(backbone=backbone, sem_seg_head=net, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    labels = torch.zeros(2, 24, 24, dtype=torch.long)
    labels[0, 4:12, 4:12], labels[1, 10:20, 6:14], labels[1, 2:8, 14:22] = 1, 2, 1
    images = F.one_hot(labels, 3).permute(0, 3, 1, 2).float() + 0.3 * torch.randn(2, 3, 24, 24)
    batch = [{"image": i, "sem_seg": s} for i, s in zip(images, labels, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(32):
        losses = model(batch)
        first = first or {name: value.item() for name, value in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(losses[name].item() < 0.5 * value for name, value in first.items() if "boundary" not in name)
    assert losses["loss_boundary"] < first["loss_boundary"]
    model.eval()
    for output in ("fine", "coarse"):
        net.output = output
        with torch.no_grad():
            found = torch.stack([x["sem_seg"].argmax(0) for x in model(batch)])
        assert (found == labels).float().mean() > 0.95


def test_its_regions_become_the_objects():
    """Two squares of one class, one of another and the background; the regions after 60 steps, beside SciPy's."""
    torch.manual_seed(0)
    backbone = PlainConvNet(channels=(16, 16), strides=(1, 2))
    net = RANetHead(
        backbone.output_shape(),
        **{"in_feature": "conv", "num_classes": 3, "channels": 16, "norm": "BN", "boundary_radius": 1.0},
        **{"representatives": 4, "dropout": 0.0},
    )
    model = CCNet(backbone=backbone, sem_seg_head=net, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    labels = torch.zeros(2, 40, 40, dtype=torch.long)
    labels[0, 4:16, 4:16] = labels[0, 4:16, 22:36] = 1
    labels[0, 22:36, 10:30] = labels[1, 20:36, 4:36] = 2
    images = F.one_hot(labels, 3).permute(0, 3, 1, 2).float() + 0.3 * torch.randn(2, 3, 40, 40)
    batch = [{"image": i, "sem_seg": s} for i, s in zip(images, labels, strict=True)]
    seen = []
    net.context.construction.register_forward_hook(lambda module, args, out: seen.append(out))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert [int(regions.region.max()) + 1 for regions in seen[0]] == [1, 1]  # no training, one region
    for label, regions, objects in zip(labels, seen[-1], (4, 2), strict=True):
        classes = label[::2, ::2].numpy()
        components = sum(
            ((classes == c) * 100 * (c + 1) + ndimage.label(classes == c)[0]) * (classes == c)
            for c in range(3)
        ).ravel()
        found = regions.region.numpy()
        assert len(np.unique(components)) == objects == found.max() + 1
        largest = [np.unique(components[found == q], return_counts=True)[1].max() for q in range(objects)]
        assert sum(largest) > 0.95 * len(found)
        assert len(regions.representatives) == 4 * objects


def test_yacs_builds_the_same_head():
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "CCNet"
    cfg.MODEL.BACKBONE.NAME = "build_ccnet_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.CCNET.STEM = "basic"
    cfg.MODEL.CCNET.STEM_CHANNELS = ()
    cfg.MODEL.SEM_SEG_HEAD.NAME = "RANetHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 16
    cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.RANET.VARIANT = "code"
    cfg.MODEL.RANET.REPRESENTATIVES = 4
    model = build_model(cfg).eval()
    built = model.sem_seg_head
    assert isinstance(built, RANetHead) and built.coarse_reduce is not None
    assert built.context.construction.representatives == 4 and built.context.construction.variant == "code"
    with torch.no_grad():
        (result,) = model([{"image": torch.zeros(3, 32, 48, dtype=torch.uint8)}])
    assert result["sem_seg"].shape == (5, 32, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_feature": "res6"}, r"'res6' is not among the backbone's \['res4', 'res5'\]"),
        ({"variant": "code", "coarse_feature": "res3"}, "'res3' is not among"),
        ({"activation": "gelu"}, "activation='gelu' is not one of"),
        ({"output": "middle"}, "output='middle' is not one of 'fine', 'coarse'"),
        ({"variant": "paperr"}, "variant='paperr' is not one of"),
        ({"variant": "paperr", "context": "psp"}, "variant='paperr' is not one of 'paper', 'code'"),
        ({"context": None}, "context=None is not the name of a context module: 'none'"),
        ({"context": "rccaa"}, "unknown context module 'rccaa': use one of region, none, rcca"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        head(**options)
