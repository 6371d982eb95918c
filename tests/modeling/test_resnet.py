"""Output-stride-8 ResNets against torchvision's networks with the same weights."""

import pytest
import torch
import torchvision
from torch import nn

from ccnet_d2.modeling import build_resnet, resnet_output_shape
from ccnet_d2.modeling.backbone import DeepStem


def to_torchvision_name(name, is_bottleneck):
    name = name.replace("stem.conv1.norm", "bn1").replace("stem.conv1", "conv1")
    for stage in range(2, 6):
        name = name.replace(f"res{stage}.", f"layer{stage - 1}.")
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    for conv in (1, 2, 3):
        name = name.replace(f"conv{conv}.norm", f"bn{conv}")
    return name


@pytest.mark.parametrize("depth", [18, 50])
def test_equals_torchvision_at_stride_32(depth):
    torch.manual_seed(0)
    ours = build_resnet(depth, output_stride=32, stem="basic", norm="BN", out_features=("res5",)).eval()
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    state = {to_torchvision_name(k, depth >= 50): v for k, v in ours.state_dict().items()}
    missing = theirs.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys
    x = torch.randn(1, 3, 65, 97)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        y = layer(y)
    torch.testing.assert_close(ours(x)["res5"], y, rtol=1e-4, atol=1e-5)


def test_equals_torchvision_with_dilation():
    """torchvision's dilated ResNets contract the first block's dilation, as mmsegmentation's do."""
    torch.manual_seed(0)
    ours = build_resnet(
        50, output_stride=8, stem="basic", contract_dilation=True, norm="BN", out_features=("res5",)
    ).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(
        {to_torchvision_name(k, True): v for k, v in ours.state_dict().items()}, strict=False
    )
    x = torch.randn(1, 3, 65, 65)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        y = layer(y)
    torch.testing.assert_close(ours(x)["res5"], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(("stride", "res5"), [(8, 4), (16, 2), (32, 1)])
def test_dilations(depth, stride, res5):
    net = build_resnet(depth, output_stride=stride, norm="BN")
    dilations = [block.conv2.dilation[0] for block in net.res5]
    assert dilations == [res5] * len(dilations)
    contracted = build_resnet(depth, output_stride=stride, norm="BN", contract_dilation=True)
    assert contracted.res5[0].conv2.dilation[0] == max(res5 // 2, 1)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_blocks_are_as_many_as_torchvision_s(depth):
    with torch.device("meta"):
        ours = build_resnet(depth, norm="BN")
        theirs = getattr(torchvision.models, f"resnet{depth}")()
    stages = (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    assert [len(stage) for stage in ours.stages] == [len(stage) for stage in stages]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_shapes_are_as_announced(depth):
    names = ("res2", "res3", "res4", "res5")
    net = build_resnet(depth, output_stride=8, norm="BN", out_features=names).eval()
    announced = resnet_output_shape(depth, 8, names)
    for name, feature in net(torch.zeros(1, 3, 64, 96)).items():
        spec = net.output_shape()[name]
        assert (announced[name].channels, announced[name].stride) == (spec.channels, spec.stride)
        assert feature.shape == (1, spec.channels, 64 // spec.stride, 96 // spec.stride)


@pytest.mark.parametrize(("side", "plain", "ceil"), [(769, 97, 97), (64, 8, 9)])
def test_ceil_mode_matters_on_even_sides_only(side, plain, ceil):
    # conv1 gives ceil(side / 2); the pool halves it again, and the next stage once more.
    for ceil_mode, expected in ((False, plain), (True, ceil)):
        x = DeepStem(norm="BN", ceil_mode=ceil_mode, channels=(4, 4, 8))(torch.zeros(1, 3, side, side))
        assert nn.Conv2d(8, 8, 3, stride=2, padding=1)(x).shape[-1] == expected


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_deep_stem_is_that_of_the_published_networks(ceil_mode):
    """Three 3x3 convolutions without bias, the first of stride 2, each with norm and ReLU, and a max-pool."""
    torch.manual_seed(0)
    stem = DeepStem(norm="BN", channels=(4, 6, 8), ceil_mode=ceil_mode).eval()
    layers, channels = [], (3, 4, 6, 8)
    for i in (1, 2, 3):
        ours = getattr(stem, f"conv{i}")
        conv = nn.Conv2d(*channels[i - 1 : i + 1], 3, stride=2 if i == 1 else 1, padding=1, bias=False)
        norm = nn.BatchNorm2d(channels[i])
        for value in (ours.norm.weight, ours.norm.bias, ours.norm.running_mean):
            nn.init.normal_(value)
        conv.load_state_dict({"weight": ours.weight})
        norm.load_state_dict(ours.norm.state_dict(), strict=False)
        layers += [conv, norm, nn.ReLU()]
    theirs = nn.Sequential(*layers, nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=ceil_mode)).eval()
    for size in ((33, 48), (34, 29)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(stem(x), theirs(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 20}, "depth=20"),
        ({"depth": 18, "output_stride": 4}, "output_stride=4"),
        ({"depth": 18, "stem": "deeper"}, "stem='deeper'"),
        ({"depth": 18, "stem": "basic", "ceil_mode": True}, "basic stem has neither"),
        ({"depth": 18, "stem_channels": (16, 32)}, r"three convolutions, .* got \[16, 32\]"),
        ({"depth": 18, "stem_channels": (0, 16, 32)}, r"each at least 1, got \[0, 16, 32\]"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_resnet(**kwargs)
