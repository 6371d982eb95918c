"""Converted weights give the logits of the network that they come from; every name is accounted for."""

import pickle
import re
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import instantiate
from torch import Tensor, nn

from ccnet_d2.atomic_file import DiskFullError
from ccnet_d2.checkpoint import CheckpointError, SafeCheckpointer, load_checkpoint
from ccnet_d2.checkpoint.convert import (
    Conversion,
    convert_file,
    convert_weights,
    detect_layout,
    read_weights,
)
from ccnet_d2.checkpoint.convert.write import write_checkpoint
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling import build_resnet
from tests.checkpoint.source_networks import (
    MMSegCCNet,
    OfficialCCNet,
    ResNetV1c,
    randomize,
)

OFFICIAL = "cityscapes/ccnet_official_R_101_D8_769x769_60k.py"
OFFICIAL_R1 = "cityscapes/ccnet_official_r1_R_101_D8_769x769_60k.py"
MMSEG = "cityscapes/ccnet_R_50_D8_512x1024_40k.py"
MMSEG_769 = "cityscapes/ccnet_R_50_D8_769x769_40k.py"


def model_for(run: str, checkpoint: Path, **head) -> nn.Module:
    """A run's model with a checkpoint's weights, all of them."""
    cfg = get_config(run)
    cfg.model.sem_seg_head.update(head)
    if head:
        cfg.model.backbone.depth = 50
    model = instantiate(cfg.model).eval()
    load_checkpoint(model, checkpoint, strict=True)
    return model


def image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).to(torch.uint8)


def logits(model: nn.Module, rgb: Tensor) -> Tensor:
    given = rgb if model.input_format == "RGB" else rgb.flip(0)
    return model([{"image": given, "height": rgb.shape[1], "width": rgb.shape[2]}])[0]["sem_seg"]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1  # there is something to compare
    assert (ours - theirs).abs().max() <= 1e-4


SMALL = {"channels": 64, "aux_channels": 64}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[OfficialCCNet, Path, Path]:
    net = randomize(OfficialCCNet((3, 4, 6, 3), channels=64))
    folder = tmp_path_factory.mktemp("official")
    # As from a network under DataParallel.
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, folder / "source.pth")
    convert_file(folder / "source.pth", folder / "converted.pth")
    return net, folder / "source.pth", folder / "converted.pth"


@pytest.fixture(scope="module")
def mmseg(tmp_path_factory) -> tuple[MMSegCCNet, Path, Path]:
    net = randomize(MMSegCCNet(channels=64, aux=64))
    folder = tmp_path_factory.mktemp("mmseg")
    meta = {"CLASSES": ("road", "car"), "PALETTE": [[128, 64, 128]], "iter": 40000, "env_info": "…"}
    torch.save({"meta": meta, "state_dict": net.state_dict()}, folder / "source.pth")
    convert_file(folder / "source.pth", folder / "converted.pth")
    return net, folder / "source.pth", folder / "converted.pth"


@torch.no_grad()
@pytest.mark.parametrize("size", [(65, 97), (64, 100)])
@pytest.mark.parametrize(("run", "recurrence"), [(OFFICIAL, 2), (OFFICIAL_R1, 1)])
def test_official_logits(official, size, run, recurrence):
    net, _, converted = official
    net.head.recurrence = recurrence
    assert_close(logits(model_for(run, converted, **SMALL), image(*size)), net.logits(image(*size)))


@torch.no_grad()
@pytest.mark.parametrize("size", [(65, 97), (64, 100)])
@pytest.mark.parametrize(("run", "align_corners"), [(MMSEG, False), (MMSEG_769, True)])
def test_mmseg_logits(mmseg, size, run, align_corners):
    net, _, converted = mmseg
    ours = logits(model_for(run, converted, **SMALL), image(*size))
    assert_close(ours, net.logits(image(*size), align_corners))


@torch.no_grad()
def test_auxiliary_logits(official, mmseg):
    x = torch.randn(1, 3, 33, 49, generator=torch.Generator().manual_seed(0))
    for (net, _, converted), run in ((official, OFFICIAL), (mmseg, MMSEG)):
        model = model_for(run, converted, **SMALL)
        scale = 50.0 if run == OFFICIAL else 1.0
        ours = model.sem_seg_head.auxiliary(model.backbone(scale * x)["res4"])
        assert_close(ours, net(scale * x)[1])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("size", [(257, 385), (1024, 2048)])
@pytest.mark.parametrize("source", ["official", "mmseg"])
def test_logits_of_the_published_networks(tmp_path, source, size):
    """The networks in their own sizes: ResNet-101 with 512 channels, and ResNet-50 of mmsegmentation."""
    net, run = (OfficialCCNet(), OFFICIAL) if source == "official" else (MMSegCCNet(), MMSEG)
    randomize(net, seed=1)
    torch.save(net.state_dict(), tmp_path / "source.pth")
    convert_file(tmp_path / "source.pth", tmp_path / "converted.pth")
    ours = logits(model_for(run, tmp_path / "converted.pth"), image(*size))
    theirs = net.logits(image(*size))
    print(f"{source} {size}: logits to {theirs.abs().max():.2f}, differ by {(ours - theirs).abs().max():.2e}")
    assert_close(ours, theirs)


def test_every_name_is_accounted_for(official, mmseg):
    for net, source, _ in (official, mmseg):
        conversion = convert_weights(read_weights(source))
        used = [name for names in conversion.sources.values() for name in names]
        assert sorted([*used, *conversion.unused]) == sorted(net.state_dict())
        assert set(conversion.sources) == set(conversion.weights)
        assert conversion.unused == {} and conversion.missing == ()
        text = conversion.text(every_name=True)
        assert all(name in text for name in (*net.state_dict(), *conversion.weights))


def test_report(official):
    _, source, _ = official
    weights = read_weights(source)
    conversion = convert_weights(
        {k: v for k, v in weights.items() if not k.startswith("dsn.")}
        | {"fc.weight": torch.zeros(1000, 2048)}
    )
    text = conversion.text()
    assert text.startswith("CCNet of 19 classes on ResNet-50, deep stem 64/64/128 (official layout)")
    assert "unused   fc.weight (the ImageNet classifier)" in text
    assert "missing  none" in text and "InPlaceABN" in text
    used = sum(not name.startswith("dsn.") for name in weights)
    # The weights and biases of query, key and value are joined.
    assert f"mapped   {used} of {used + 1} tensors, to {used - 4} here" in text
    model = instantiate_on_meta(OFFICIAL, depth=50, channels=64, aux_channels=64)
    conversion = convert_weights({k: v for k, v in weights.items() if not k.startswith("dsn.")}, model=model)
    assert len(conversion.missing) == 7
    assert re.search(
        r"missing  sem_seg_head\.auxiliary\.0\.weight, [^,]+, [^,]+ and 4 more\n", conversion.text()
    )


@pytest.mark.parametrize("count", [4, 5])
def test_few_names_are_all_in_the_report_and_each_reason_has_a_line(count):
    reasons = {f"name{index}": "of no use" for index in range(count)} | {"other": "not asked for"}
    sources = {"x": ("one", "two")}
    conversion = Conversion("mmseg", "A net", {"x": torch.zeros(1)}, sources, reasons, hint="RGB images")
    assert conversion.text().splitlines() == [
        "A net (mmseg layout)",
        f"  mapped   2 of {3 + count} tensors, to 1 here",
        f"  unused   name0, name1, name2{', name3' if count == 4 else ' and 2 more'} (of no use)",
        "  unused   other (not asked for)",
        "  missing  none",
        "  note     RGB images",
    ]


def test_every_name_is_in_a_report_that_is_to_have_every_one():
    unused = {f"left{index}": "of no use" for index in range(6)}
    missing = tuple(f"gone{index}" for index in range(6))
    weights, sources = {"x": torch.zeros(1)}, {"x": ("one", "two")}
    text = Conversion("mmseg", "A net", weights, sources, unused, missing).text(every_name=True)
    assert text.splitlines()[2:] == [
        "           one + two -> x",
        f"  unused   {', '.join(unused)} (of no use)",
        f"  missing  {', '.join(missing)}",
    ]


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        ("official", "criterion.weight", "the loss"),
        ("official", "fc.bias", "the ImageNet classifier"),
        ("mmseg", "head.fc.weight", "the ImageNet classifier"),
        ("mmseg", "data_preprocessor.mean", "mean and deviation of images, which configs say here"),
    ],
)
def test_what_no_model_needs_is_left_out_with_the_reason(official, mmseg, source, name, reason):
    weights = read_weights({"official": official, "mmseg": mmseg}[source][1])
    conversion = convert_weights(weights | {name: torch.zeros(19)})
    assert conversion.unused == {name: reason} and conversion.missing == ()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("official", "BGR images less the mean 104.007, 116.669, 122.679"),
        ("mmseg", "RGB images; the first block"),
    ],
)
def test_what_no_weight_tells_is_noted(official, mmseg, source, words):
    weights = read_weights({"official": official, "mmseg": mmseg}[source][1])
    assert convert_weights(weights).text().splitlines()[-1].startswith(f"  note     {words}")


def test_what_is_left_out_as_asked_adds_to_what_is_missing_and_unused(official):
    weights = {k: v for k, v in read_weights(official[1]).items() if not k.startswith("dsn.")}
    model = instantiate_on_meta(OFFICIAL, depth=50, channels=64, aux_channels=64)
    conversion = convert_weights(weights | {"fc.weight": torch.zeros(1000, 2048)}, model=model)
    cut = conversion.without_classifier()
    gone = {"sem_seg_head.classifier.weight", "sem_seg_head.classifier.bias"}
    assert len(conversion.missing) == 7 and set(cut.missing) == {*conversion.missing, *gone}
    assert cut.unused == {
        "fc.weight": "the ImageNet classifier",
        "head.bottleneck.3.weight": "left out as asked",
        "head.bottleneck.3.bias": "left out as asked",
    }
    assert cut.sources.keys() == cut.weights.keys() == conversion.weights.keys() - gone


def instantiate_on_meta(run: str, *, depth: int, **head) -> nn.Module:
    cfg = get_config(run)
    cfg.model.backbone.depth = depth
    cfg.model.sem_seg_head.update(head)
    with torch.device("meta"):
        return instantiate(cfg.model)


def test_what_the_model_has_no_place_for_is_left_out_and_named(official):
    weights = read_weights(official[1])
    model = instantiate_on_meta(OFFICIAL, depth=50, channels=64, aux_feature=None)
    conversion = convert_weights(weights, model=model)
    assert (
        conversion.weights.keys()
        == conversion.sources.keys()
        == model.state_dict().keys()
        - {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    )
    assert conversion.missing == ()
    auxiliary = [name for name in weights if name.startswith("dsn.")]
    assert len(auxiliary) == 8
    assert conversion.unused == dict.fromkeys(auxiliary, "the model has no place for it")


def test_without_classifier(mmseg, tmp_path):
    _, source, _ = mmseg
    conversion = convert_file(source, tmp_path / "x.pth", classifier=False)
    written = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    gone = {
        f"sem_seg_head.{head}.{kind}" for head in ("classifier", "auxiliary.2") for kind in ("weight", "bias")
    }
    assert set(convert_weights(read_weights(source)).weights) - set(written) == gone
    assert "auxiliary_head.conv_seg.bias" in conversion.unused and set(conversion.missing) == gone


def test_first_commits_of_the_official_code(official):
    _, source, _ = official
    weights = read_weights(source)
    renamed = {
        name.replace("head.conva", "head.conv1a").replace("head.convb", "head.conv1b"): value
        for name, value in weights.items()
    }
    ours, expected = convert_weights(renamed).weights, convert_weights(weights).weights
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_norms_that_count_batches_keep_their_weights(official):
    """A port of the official network to ordinary batch norms has counters, which InPlaceABN has not."""
    _, source, _ = official
    weights = read_weights(source)
    counted = weights | {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(1)
        for name in weights
        if name.endswith("running_mean")
    }
    conversion = convert_weights(counted)
    assert torch.equal(conversion.weights["backbone.stem.conv1.norm.weight"], weights["bn1.weight"])
    assert not any("InPlaceABN" in change for change in conversion.changes)


def test_norms_of_other_layouts_keep_their_weights(mmseg):
    """Also without counters, which old versions of torch did not have."""
    weights = {k: v for k, v in read_weights(mmseg[1]).items() if not k.endswith("num_batches_tracked")}
    conversion = convert_weights(weights)
    norm = conversion.weights["backbone.res2.0.conv1.norm.weight"]
    assert torch.equal(norm, weights["backbone.layer1.0.bn1.weight"])
    assert not any("InPlaceABN" in change for change in conversion.changes)


class TimmResNet(nn.Module):
    """timm's ResNet with a deep stem, whose last norm has a name of its own."""

    def __init__(self, width: int = 32):
        super().__init__()
        net = torchvision.models.resnet18()
        layers = []
        for c_in, c_out, stride in ((3, width, 2), (width, width, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.conv1 = nn.Sequential(*layers, nn.Conv2d(width, 64, 3, 1, 1, bias=False))
        self.bn1 = net.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.fc = net.fc

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class TorchvisionFeatures(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x = self.net.maxpool(self.net.relu(self.net.bn1(self.net.conv1(x))))
        return self.net.layer4(self.net.layer3(self.net.layer2(self.net.layer1(x))))


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "make", "arguments"),
    [
        ("torchvision", torchvision.models.resnet18, {"depth": 18, "stem": "basic"}),
        ("torchvision", torchvision.models.resnet50, {"depth": 50, "stem": "basic"}),
        ("timm", TimmResNet, {"depth": 18, "stem_channels": (32, 32, 64)}),
        ("mmseg", ResNetV1c, {"depth": 50, "stem_channels": (32, 32, 64), "contract_dilation": True}),
    ],
)
def test_imagenet_backbones(tmp_path, layout, make, arguments):
    net = randomize(make())
    torch.save({"state_dict": net.state_dict(), "meta": {}}, tmp_path / "source.pth")
    conversion = convert_file(tmp_path / "source.pth", tmp_path / "converted.pth")
    assert conversion.layout == layout and conversion.missing == ()
    assert set(conversion.unused) == {name for name in net.state_dict() if name.startswith("fc.")}

    stride = 8 if layout == "mmseg" else 32
    model = nn.ModuleDict({"backbone": build_resnet(**arguments, output_stride=stride, norm="BN")}).eval()
    load_checkpoint(model, tmp_path / "converted.pth", strict=True)
    x = torch.randn(1, 3, 65, 96, generator=torch.Generator().manual_seed(0))
    theirs = (
        net(x)[1] if layout == "mmseg" else TorchvisionFeatures(net)(x) if layout == "torchvision" else net(x)
    )
    assert_close(model["backbone"](x)["res5"], theirs)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnets_are_told_by_their_blocks(depth):
    with torch.device("meta"):
        weights = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    assert convert_weights(weights).network == f"ResNet-{depth}, basic stem"


def test_a_resnet_under_the_name_backbone():
    """As mmsegmentation and its relatives keep one that they pretrained."""
    bare = torchvision.models.resnet18().state_dict()
    under = {name if name.startswith("fc.") else f"backbone.{name}": value for name, value in bare.items()}
    conversion, expected = convert_weights(under), convert_weights(bare).weights
    assert conversion.layout == "mmseg" and conversion.weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in conversion.weights.items())


def test_a_plain_resnet_of_timm_has_torchvisions_names():
    weights = torchvision.models.resnet18().state_dict()
    conversion, other = convert_weights(weights, "timm"), convert_weights(weights, "torchvision")
    assert (conversion.layout, other.layout) == ("timm", "torchvision")
    assert conversion.sources == other.sources
    assert all(torch.equal(value, other.weights[name]) for name, value in conversion.weights.items())


@torch.no_grad()
def test_imagenet_weights_in_the_official_layout(official):
    """MIT's ResNets, which the official code starts from: ordinary norms."""
    net, source, _ = official
    weights = {
        name: value for name, value in read_weights(source).items() if not name.startswith(("head.", "dsn."))
    } | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    conversion = convert_weights(weights)
    assert conversion.network == "ResNet-50, deep stem 64/64/128" and conversion.layout == "official"
    assert torch.equal(conversion.weights["backbone.res2.0.conv1.norm.weight"], net.layer1[0].bn1.weight)


def test_pkl_in_the_format_of_the_model_zoo(mmseg, tmp_path):
    _, source, converted = mmseg
    convert_file(source, tmp_path / "zoo.pkl", "mmseg")
    data = pickle.loads((tmp_path / "zoo.pkl").read_bytes())
    assert set(data) == {"model", "__author__"} and "mmseg layout" in data["__author__"]
    torch_data = torch.load(converted, weights_only=True)
    assert set(torch_data) == {"model", "__author__"}
    assert {k: v.shape for k, v in data["model"].items()} == {
        k: v.shape for k, v in torch_data["model"].items()
    }
    model = model_for(MMSEG, tmp_path / "zoo.pkl", **SMALL)
    loaded = SafeCheckpointer(model).load(str(converted))
    assert loaded["__author__"]


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


def test_what_does_not_fit_is_an_error(official, mmseg):
    official_weights, mmseg_weights = read_weights(official[1]), read_weights(mmseg[1])
    ade = instantiate_on_meta("ade20k/ccnet_R_50_D8_512x512_80k.py", depth=50, channels=64, aux_channels=64)
    for weights, options, sentence in (
        (
            mmseg_weights,
            {"model": ade},
            r"decode_head\.conv_seg\.weight has shape \(19, 64, 1, 1\).*\(150, 64",
        ),
        (
            mmseg_weights | {"backbone.layer1.0.conv1.weight": torch.zeros(64, 32, 1, 1)},
            {},
            r"layer1\.0\.conv1\.weight has shape \(64, 32, 1, 1\), and backbone\.res2",
        ),
        (without(mmseg_weights, "decode_head.convs.1.bn.bias"), {}, "convb.norm.bias of the model cannot be"),
        (without(mmseg_weights, "decode_head.cca.key_conv.bias"), {}, "no key.bias"),
        (without(mmseg_weights, "decode_head.conv_seg.weight"), {}, "the head has no classifier"),
        (without(official_weights, "head.cca.gamma"), {}, r"context\.gamma of the model"),
        (
            mmseg_weights | {"decode_head.norm.weight": torch.zeros(3)},
            {},
            "decode_head.norm.weight .* nothing here",
        ),
        (mmseg_weights, {"layout": "official"}, "have the mmseg layout, not official"),
        (mmseg_weights, {"layout": "timm"}, "have the mmseg layout, not timm"),
        (mmseg_weights, {"layout": "caffe"}, "Unknown layout 'caffe'"),
        (
            {"encoder.weight": torch.zeros(1)},
            {},
            r"none of official, mmseg, torchvision, timm .*encoder\.weight",
        ),
        ({"conv1.weight": torch.zeros(6, 1, 5, 5)}, {}, r"none of official, mmseg, .*conv1\.weight"),
        ({"backbone.res2.0.conv1.weight": torch.zeros(1)}, {}, "Detectron2's names already"),
        ({"res2.0.conv1.weight": torch.zeros(1)}, {}, "Detectron2's names already"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            convert_weights(weights, **options)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decode_head.conv_seg.weight", (19,)),
        ("decode_head.conv_seg.weight", (0, 64, 1, 1)),
        ("decode_head.conv_seg.bias", ()),
        ("decode_head.cca.query_conv.weight", (8, 64)),
        ("decode_head.cca.value_conv.bias", (64, 1)),
        ("decode_head.cca.gamma.scale", (1, 1)),
        ("auxiliary_head.convs.0.conv.weight", ()),
        ("backbone.stem.3.weight", ()),
        ("backbone.stem.4.weight", (32, 1, 1, 1)),
    ],
)
def test_a_tensor_that_can_be_no_weight_of_its_name_is_an_error(mmseg, name, shape):
    weights = read_weights(mmseg[1])
    assert name in weights
    with pytest.raises(CheckpointError, match=rf"^{re.escape(f'{name} has shape {shape}')}, which no "):
        convert_weights(weights | {name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"head.cca.value_conv.weight": (64, 64, 3, 1)},
            r"^head\.cca\.query_conv\.weight, .*value_conv\.weight have shapes \(8, 64, 1, 1\), .*\(64, 64, 3, 1\),",
        ),
        (  # as many rows as the model's in all
            {"head.cca.query_conv.bias": (7,), "head.cca.key_conv.bias": (9,)},
            r"have shapes \(7,\), \(9,\), \(64,\), which no attention has",
        ),
        (
            {"dsn.0.bias": (1,)},
            r"^dsn\.0\.bias has shape \(1,\), and dsn\.1\.running_mean, which it is taken off, \(64,\)\.$",
        ),
        ({"dsn.0.bias": (65,)}, r"^dsn\.0\.bias has shape \(65,\)"),
        (
            {"head.bottleneck.3.weight": (19, 1, 1, 1)},
            r"classifier has shape \(19, 1, 1, 1\), .* channels=1 is not a positive multiple of reduction=8\.$",
        ),
    ],
)
def test_tensors_that_do_not_go_together_are_an_error(official, changed, sentence):
    weights = read_weights(official[1])
    assert changed.keys() <= weights.keys()
    with pytest.raises(CheckpointError, match=sentence):
        convert_weights(weights | {name: torch.ones(shape) for name, shape in changed.items()})


def test_resnet_d_is_refused():
    weights = torchvision.models.resnet18().state_dict()
    for kind in ("weight", "bias", "running_mean", "running_var"):
        weights[f"layer2.0.downsample.2.{kind}"] = torch.zeros(128)
    with pytest.raises(CheckpointError, match="ResNet-D"):
        convert_weights(weights)
    short = {name: value for name, value in weights.items() if ".downsample.2." not in name}
    with pytest.raises(CheckpointError, match="no ResNet of 18, 34"):
        convert_weights({name: value for name, value in short.items() if not name.startswith("layer3.1.")})


def test_a_resnet_without_a_block_in_the_middle_and_names_that_meet_are_refused():
    weights = torchvision.models.resnet34().state_dict()
    gap = {name: value for name, value in weights.items() if not name.startswith("layer2.1.")}
    with pytest.raises(CheckpointError, match=r"weights of res3 are not whole: there are blocks \[0, 2, 3\]"):
        convert_weights(gap)
    both = {"stem.0.weight": torch.zeros(32, 3, 3, 3)}
    both |= {f"backbone.{name}": value for name, value in both.items()}
    with pytest.raises(
        CheckpointError, match=r"stem\.0\.weight and backbone\.stem\.0\.weight are both backbone\.stem\.conv1"
    ):
        convert_weights(both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_fp32(tmp_path, dtype):
    """Torch would compute with them as they are, and numpy, for a .pkl file, knows no bfloat16."""
    source = torchvision.models.resnet18().state_dict()
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in source.items()}
    torch.save(stored, tmp_path / "source.pth")
    convert_file(tmp_path / "source.pth", tmp_path / "out.pkl")
    weights = pickle.loads((tmp_path / "out.pkl").read_bytes())["model"]
    first = stored["conv1.weight"].to(torch.float32).numpy()
    np.testing.assert_array_equal(weights["backbone.stem.conv1.weight"], first)
    assert {str(value.dtype) for value in weights.values()} == {"float32", "int64"}


def test_numbers_of_eight_bits_and_parameters_become_plain_fp32(tmp_path):
    net = torchvision.models.resnet18()
    stored = dict(net.named_parameters()) | dict(net.named_buffers())
    stored["bn1.weight"] = torch.tensor([1.0, 0.5]).repeat(32).to(torch.float8_e4m3fn)
    torch.save(stored, tmp_path / "source.pth")
    for name in ("out.pth", "out.pkl"):
        convert_file(tmp_path / "source.pth", tmp_path / name)
    weights = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert weights["backbone.stem.conv1.norm.weight"].tolist() == [1.0, 0.5] * 32
    assert torch.equal(weights["backbone.stem.conv1.weight"], net.conv1.weight)
    assert not any(value.requires_grad for value in weights.values())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            torch.zeros(64, 3, 7, 7, dtype=torch.int8),
            r"conv1\.weight is of torch\.int8, not of floating-point",
        ),
        (torch.zeros(64, 3, 7, 7, dtype=torch.complex64), r"conv1\.weight is of torch\.complex64, not of"),
        (torch.zeros(64, 3, 7, 7, device="meta"), r"conv1\.weight is sparse, quantized or without values"),
        (torch.zeros(64, 3, 7, 7).to_sparse(), r"conv1\.weight is sparse, quantized or without values"),
        (
            torch.full((64, 3, 7, 7), 1e300, dtype=torch.float64),
            r"damaged: conv1\.weight holds values that are not",
        ),
    ],
)
def test_a_tensor_that_holds_no_weights_is_an_error(tmp_path, value, sentence):
    torch.save(torchvision.models.resnet18().state_dict() | {"conv1.weight": value}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth.*{sentence}"):
        convert_file(tmp_path / "x.pth", tmp_path / "y.pth")
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_what_wraps_weights_is_taken_off(tmp_path, key, prefix):
    weights = {"conv1.weight": torch.ones(2), "fc.bias": torch.zeros(3)}
    torch.save(
        {"epoch": 3, key: {prefix + name: value for name, value in weights.items()}}, tmp_path / "x.pth"
    )
    found = read_weights(tmp_path / "x.pth")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_files_that_are_no_weights(tmp_path):
    for content, sentence in (
        ({"state_dict": {"a": 1}}, "entry 'a' is a int"),
        ([1, 2], "a list instead of a state dict"),
        ({0: torch.zeros(1)}, r"x\.pth is not a state dict: 0, of type int, names no tensor"),
        ({}, "no weights"),
        ({"conv1.weight": torch.tensor([float("nan")])}, "not finite"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=sentence):
            convert_file(tmp_path / "x.pth", tmp_path / "y.pth")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"^\S+x\.pth: The layout of the weights is none of"):
        convert_file(tmp_path / "x.pth", tmp_path / "y.pth")
    assert not (tmp_path / "y.pth").exists()


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_source_runs_only_where_it_is_allowed(tmp_path):
    evil, out, victim = tmp_path / "evil.pth", tmp_path / "out.pth", tmp_path / "victim"
    torch.save({"state_dict": {"stem.0.weight": Payload(victim)}}, evil)
    for read in (read_weights, partial(convert_file, target=out)):
        with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read as weights: .* would run code"):
            read(evil)
        assert not victim.exists()
        with pytest.raises(CheckpointError, match=r"evil\.pth .* entry 'stem.0.weight' is a NoneType"):
            read(evil, allow_pickle=True)
        victim.unlink()
    assert not out.exists()


def test_the_target_is_written_whole_or_not_at_all(mmseg, tmp_path):
    _, source, _ = mmseg
    for target, sentence in (
        (tmp_path / "out.bin", "neither a .pth nor a .pkl"),
        (source, "is the source itself"),
        (source / "out.pth", "cannot be written"),
        (tmp_path / f"{'x' * 300}.pth", "cannot be written: .*File name too long"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            convert_file(source, target)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.pth").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        convert_file(tmp_path / "none.pth", tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["x.pth", "x.pkl"])
def test_a_full_disk_is_told_in_the_system_s_words(tmp_path, name):
    """Torch's own say that a position in the archive is unexpected."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            DiskFullError, match=r"^Writing to \S+ failed: File too large \(.* MiB are free\); make room and"
        ):
            write_checkpoint({"a": torch.ones(1000)}, tmp_path / name, "nobody")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_other_trouble_of_torch_s_writer_is_one_sentence(tmp_path, monkeypatch):
    write_checkpoint({"a": torch.ones(1)}, tmp_path / "new/x.pth", "nobody")  # the folder is made
    assert torch.load(tmp_path / "new/x.pth", weights_only=True)["model"] == {"a": torch.ones(1)}

    def save(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")  # torch's

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be written: .*file write failed\.$"):
        write_checkpoint({"a": torch.zeros(1)}, tmp_path / "x.pth", "nobody")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_detection_by_names(official, mmseg):
    assert detect_layout(read_weights(official[1])).name == "official"
    assert detect_layout(read_weights(mmseg[1])).name == "mmseg"
    assert detect_layout(torchvision.models.resnet18().state_dict()).name == "torchvision"
    assert detect_layout(TimmResNet().state_dict()).name == "timm"
