"""Norms of heads and backbones by Detectron2's names: what does not fit is said by the one that has it."""

import pytest
from detectron2.layers import ShapeSpec
from torch import nn

from ccnet_d2.layers import PSP
from ccnet_d2.modeling import CCNetHead, CE2PHead, PlainConvNet, RANetHead, build_resnet

SHAPE = {f"res{i}": ShapeSpec(channels=32, stride=8) for i in (2, 3, 4, 5)}
ARGUMENTS = {
    CCNetHead: {"num_classes": 5, "aux_feature": "res4", "channels": 64, "aux_channels": 32},
    CE2PHead: {"num_classes": 5, "channels": 64, "fine_channels": 32},
    RANetHead: {"num_classes": 5, "channels": 64},
}
WIDTHS = [
    (CCNetHead, "channels"),
    (CCNetHead, "aux_channels"),
    (CE2PHead, "channels"),
    (CE2PHead, "fine_channels"),
    (RANetHead, "channels"),
]
HEADS = pytest.mark.parametrize("head", ARGUMENTS, ids=lambda head: head.__name__)


@pytest.mark.parametrize("head, width", WIDTHS)
def test_group_norm_names_the_head_and_the_channels(head, width):
    given = {**ARGUMENTS[head], width: 48}
    with pytest.raises(
        ValueError, match=rf"^{head.__name__} with norm='GN' .*NORM.* a convolution of 48 channels"
    ):
        head(SHAPE, norm="GN", **given)


@HEADS
def test_group_norm_within_a_context_module_names_the_head(head):
    with pytest.raises(ValueError, match=rf"^{head.__name__} with norm='GN' .* a convolution of 16 channels"):
        head(SHAPE, norm="GN", context="asymmetric_nl", **{**ARGUMENTS[head], "channels": 32})


@HEADS
def test_unknown_norm_names_the_head(head):
    with pytest.raises(ValueError, match=rf"^{head.__name__} with norm='gn' .*: there is no such norm"):
        head(SHAPE, norm="gn", **ARGUMENTS[head])


@HEADS
@pytest.mark.parametrize(
    "norm, kind",
    [("GN", nn.GroupNorm), ("BN", nn.BatchNorm2d), (nn.InstanceNorm2d, nn.InstanceNorm2d), ("", None)],
    ids=["GN", "BN", "callable", "none"],
)
def test_norms_that_fit(head, norm, kind):
    built = head(SHAPE, norm=norm, **ARGUMENTS[head])
    norms = {
        type(m) for m in built.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d | nn.InstanceNorm2d)
    }
    assert (kind in norms) if kind else not norms


@HEADS
def test_the_context_module_has_the_head_s_activation_and_corners(head):
    options = {"context": "psp", "norm": "BN", "activation": "leaky_relu"}
    for align_corners in (False, True):
        built = head(SHAPE, align_corners=align_corners, **options, **ARGUMENTS[head])
        (context,) = (module for module in built.modules() if isinstance(module, PSP))
        assert context.align_corners is align_corners
        activations = {type(m) for m in built.modules() if isinstance(m, nn.ReLU | nn.LeakyReLU)}
        assert activations == {nn.LeakyReLU}


@pytest.mark.parametrize("depth", [18, 50])
def test_unknown_norm_names_the_backbone(depth):
    """Which is met before the head's, whose norm follows it in the runs."""
    for stem in ("deep", "basic"):
        with pytest.raises(
            ValueError,
            match=r"^build_resnet with norm='bn' \(MODEL\.RESNETS\.NORM\): there is no such norm; take",
        ):
            build_resnet(depth, stem=stem, norm="bn")
    with pytest.raises(ValueError, match=r"^PlainConvNet with norm='bn': there is no such norm; take"):
        PlainConvNet(norm="bn")
    with pytest.raises(ValueError, match=r"^build_resnet with norm='GN' .* a convolution of 48 channels"):
        build_resnet(depth, stem_channels=(48, 48, 48), norm="GN")
