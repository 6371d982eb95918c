"""add_rcca: where the module runs, what it leaves as it was, and what it answers to wrong arguments."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch._dynamo
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN, BasicStem, BottleneckBlock, RegNet, ResNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from detectron2.modeling.backbone.resnet import BasicBlock
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

import ccnet_d2
from ccnet_d2.errors import UserError
from ccnet_d2.layers import NonLocal
from ccnet_d2.layers.non_local_block import NonLocalBlock
from ccnet_d2.modeling import add_rcca
from ccnet_d2.modeling.backbone import DilatedBasicBlock
from ccnet_d2.ops import criss_cross_attention

NEW_KEYS = ["rcca.gamma", "rcca.qkv.bias", "rcca.qkv.weight"]


def resnet(block=BasicBlock, num_blocks=3, freeze_at=0):
    """A ResNet of 16, 24 and 32 channels at res2, res3, res4."""
    torch.manual_seed(0)
    stages, channels = [], 16
    for i, width in enumerate((16, 24, 32)):
        options = {"norm": "BN", "stride_per_block": [2 if i else 1] + [1] * (num_blocks - 1)}
        if block is BottleneckBlock:
            options["bottleneck_channels"] = 8
        stages.append(
            ResNet.make_stage(block, num_blocks, in_channels=channels, out_channels=width, **options)
        )
        channels = width
    stem = BasicStem(out_channels=16, norm="BN")
    return ResNet(stem, stages, out_features=["res2", "res3", "res4"], freeze_at=freeze_at).eval()


def image(batch=1, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def attended(rcca, x):
    """RCCA from the bare operator."""
    for _ in range(rcca.recurrence):
        c = rcca.key_channels
        query, key, value = rcca.qkv(x).split([c, c, x.shape[1]], dim=1)
        x = x + rcca.gamma * criss_cross_attention(query, key, value, backend="reference")
    return x


def assert_same(found, expected):
    """Up to fp32 rounding; values reach some 100 in these random networks."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def opened(model):
    """The model with every gamma away from 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock, DilatedBasicBlock])
def test_runs_right_before_the_last_block_of_res4(block):
    plain = resnet(block)
    model = resnet(block)
    assert add_rcca(model) is model
    opened(model)
    rcca = model.res4[-1].rcca
    assert (rcca.channels, rcca.key_channels, rcca.recurrence) == (32, 4, 2)

    x = plain.res3(plain.res2(plain.stem(image())))
    expected = plain.res4[2](attended(rcca, plain.res4[1](plain.res4[0](x))))
    found = model(image())["res4"]
    assert_same(found, expected)
    assert (found - plain(image())["res4"]).abs().max() > 1e-3


@pytest.mark.parametrize("before", [0, 1, 2, -3, -2, None])
def test_any_place_in_a_stage(before):
    plain, model = resnet(), opened(add_rcca(resnet(), "res3", before, recurrence=1))
    (rcca,) = (m for name, m in model.named_modules() if name.endswith(".rcca"))
    x = plain.res2(plain.stem(image()))
    for index, block in enumerate(plain.res3):
        if before is not None and index == before % 3:
            x = attended(rcca, x)
        x = block(x)
    assert_same(model(image())["res3"], attended(rcca, x) if before is None else x)
    assert len(model.res3) == 3 and model.stages[1] is model.res3


def test_several_in_one_model():
    model = opened(add_rcca(add_rcca(resnet(), "res3"), "res4"))
    add_rcca(model, "res4", before=-1, module="nl", name="nl")
    calls = []
    for path, module in model.named_modules():
        if path.endswith(("rcca", ".nl")) or path == "res4.2.conv1":
            module.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
    model(image())
    assert calls == ["res3.2.rcca", "res4.2.rcca", "res4.2.nl", "res4.2.conv1"]


def test_state_dict_is_the_plain_one_and_the_module_s():
    plain, model = resnet().state_dict(), add_rcca(resnet()).state_dict()
    assert sorted(model.keys() - plain.keys()) == [f"res4.2.{key}" for key in NEW_KEYS]
    assert all(torch.equal(model[key], value) for key, value in plain.items())


@pytest.mark.parametrize("module", ["rcca", "nl"])
def test_identity_at_the_start(module):
    plain, model = resnet(), add_rcca(resnet(), module=module)
    for training in (False, True):
        expected, found = plain.train(training)(image(2)), model.train(training)(image(2))
        for key, value in expected.items():
            assert_same(found[key], value)
    x = torch.randn(2, 32, 4, 5)
    inserted = model.res4[2].get_submodule(module)
    assert torch.equal(inserted.train()(x), x) and torch.equal(inserted.eval()(x), x)


def test_plain_checkpoints_load(tmp_path):
    plain = resnet()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    result = add_rcca(resnet()).load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys and sorted(result.missing_keys) == [f"res4.2.{k}" for k in NEW_KEYS]

    # As backbones of the model zoo do: names without the model's prefix, matched by their ends.
    path = tmp_path / "R-test.pkl"
    weights = {key: value.numpy() for key, value in plain.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "test", "matching_heuristics": True}))
    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": add_rcca(resnet())})})
    DetectionCheckpointer(detector).load(str(path))
    found = detector["backbone"]["bottom_up"]
    assert torch.equal(found.res4[2].conv2.weight, plain.res4[2].conv2.weight)
    assert found.res4[2].rcca.gamma == 0
    assert_same(found.eval()(image())["res4"], plain(image())["res4"])


def test_every_parameter_gets_a_gradient_and_gamma_moves():
    model = add_rcca(resnet()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image(2))["res4"].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert model.res4[2].rcca.gamma.abs() > 0


def test_copies_are_whole_and_their_own(tmp_path):
    model = opened(add_rcca(resnet()))
    expected = model(image())["res4"]
    torch.save(model, tmp_path / "model.pth")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pth", weights_only=False),
    ]
    nn.init.constant_(model.res4[2].rcca.gamma, 9.0)
    for one in copies:
        torch.testing.assert_close(one(image())["res4"], expected, rtol=0, atol=0)


def test_an_unpickled_model_keeps_its_hook_in_a_new_process(monkeypatch):
    model = opened(add_rcca(resnet()))
    expected = model(image())["res4"]
    data = pickle.dumps(model)
    # Hooks are numbered from 0 in every process: a hook registered there must not take the number of ours.
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model = pickle.loads(data)
    for _ in range(50):
        model.res4[2].register_forward_pre_hook(lambda *_: None)
        assert torch.equal(model(image())["res4"], expected)


def test_compiles_in_one_graph():
    model = opened(add_rcca(resnet()))
    compiled = torch.compile(model.res4, backend="eager", fullgraph=True)
    x = torch.randn(1, 24, 8, 8)
    assert_same(compiled(x), model.res4(x))


@pytest.fixture
def compiler():
    """torch.compile as it is at first."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["added before", "added to compiled", "unpickled"])
@pytest.mark.parametrize("where", [{"before": -1}, {"before": None}])
def test_compiled_code_of_the_plain_model_is_not_run_in_its_place(compiler, order, where):
    plain, x = resnet(), torch.randn(1, 24, 8, 8)
    model = opened(add_rcca(copy.deepcopy(plain), **where))
    expected = model.res4(x)
    data = pickle.dumps(model)
    if order != "added before":
        torch._dynamo.config.skip_nnmodule_hook_guards = True  # as in another process
    compiled_plain = torch.compile(plain.res4, backend="eager")
    assert_same(compiled_plain(x), plain.res4(x))
    if order == "added to compiled":
        add_rcca(plain, **where).load_state_dict(model.state_dict())
        assert_same(compiled_plain(x), expected)
        return
    model = pickle.loads(data) if order == "unpickled" else model
    assert_same(torch.compile(model.res4, backend="eager")(x), expected)


def test_follows_device_dtype_and_mode():
    model = add_rcca(resnet().double())
    rcca = model.res4[2].rcca
    assert {p.dtype for p in rcca.parameters()} == {torch.float64} and not rcca.training
    assert model(image().double())["res4"].dtype == torch.float64
    with torch.device("meta"):
        meta = resnet()
    assert add_rcca(meta).res4[2].rcca.gamma.is_meta


def test_freezing_includes_the_module():
    model = add_rcca(resnet(freeze_at=4))
    assert model.res4[2].rcca.gamma.requires_grad  # added to a frozen stage, it learns
    model.freeze(4)
    assert not any(p.requires_grad for p in model.res4.parameters())


def test_found_by_the_end_of_its_path():
    fpn = FPN(resnet(), ["res2", "res3", "res4"], 8)
    add_rcca(nn.ModuleDict({"backbone": fpn}))
    assert "bottom_up.res4.2.rcca.gamma" in fpn.state_dict()
    with pytest.raises(UserError, match=r"ambiguous: a\.res4, b\.res4"):
        add_rcca(nn.ModuleDict({"a": resnet(), "b": resnet()}))


def test_other_backbones_by_path():
    regnet = RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=8,
        w_a=8.0,
        w_0=16,
        w_m=2.0,
        group_width=8,
        norm="BN",
        out_features=["s2"],
    ).eval()
    before = regnet(image())["s2"]
    last = list(regnet.s2.children())[-1]
    add_rcca(regnet, "s2")
    assert last.rcca.channels == before.shape[1] and torch.equal(regnet(image())["s2"], before)
    assert not torch.equal(opened(regnet)(image())["s2"], before)

    network = torchvision.models.resnet18(weights=None).eval()
    before = network(image())
    add_rcca(network, "layer3")
    assert network.layer3[1].rcca.channels == 256
    torch.testing.assert_close(network(image()), before, rtol=0, atol=1e-5)
    assert not torch.equal(opened(network)(image()), before)


def test_blocks_that_are_sequences_themselves_run_it_once():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())).eval()
    plain = copy.deepcopy(model)
    nested = nn.ModuleDict({"body": model})
    opened(add_rcca(nested, "body"))
    rcca = model[1][0].rcca
    assert_same(model(image()), plain[1](attended(rcca, plain[0](image()))))
    opened(add_rcca(nested, "body", before=None, channels=16))
    x = plain[1](attended(rcca, plain[0](image())))
    assert_same(model(image()), attended(model[1][1].rcca, x))


def test_beside_a_block_without_parameters_it_has_the_model_s_dtype():
    model = activation().double()
    add_rcca(model, "body", before=None, channels=16)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model["body"](image(size=8).double()).dtype == torch.float64


class Pyramid(Backbone):
    """Gives a dict of features, like a Swin or ViT backbone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        return {"p2": self.conv(x), "p3": self.conv(x)[:, :, ::2, ::2]}

    def output_shape(self):
        return {"p2": ShapeSpec(channels=16, stride=1), "p3": ShapeSpec(channels=16, stride=2)}


def test_one_feature_of_a_backbone():
    torch.manual_seed(0)
    plain = nn.ModuleDict({"backbone": Pyramid()})
    model = copy.deepcopy(plain)
    opened(add_rcca(model, "backbone", before=None, feature="p3", recurrence=3))
    found, expected = model["backbone"](image(size=8)), plain["backbone"](image(size=8))
    assert torch.equal(found["p2"], expected["p2"])
    torch.testing.assert_close(found["p3"], attended(model["backbone"].rcca, expected["p3"]))


def test_modules_of_one_s_own_and_options():
    model = add_rcca(resnet(), module=NonLocal(32))
    assert isinstance(model.res4[2].context, NonLocal)
    model = add_rcca(resnet(), module="nl", recurrence=2, norm="GN")
    assert isinstance(model.res4[2].nl, NonLocalBlock) and isinstance(model.res4[2].nl.norm, nn.GroupNorm)
    assert add_rcca(resnet(), reduction=4).res4[2].rcca.key_channels == 8


def test_the_package_offers_it():
    assert "add_rcca" in dir(ccnet_d2) and ccnet_d2.add_rcca is add_rcca


def pyramid():
    return nn.ModuleDict({"backbone": Pyramid()})


def activation():
    return nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())})


class CoarseHead(nn.Module):
    """Its `output_shape` is the size of a mask, as that of PointRend's coarse mask head."""

    def __init__(self):
        super().__init__()
        self.conv, self.output_shape = nn.Conv2d(16, 16, 1), (16, 7, 7)

    def forward(self, x):
        return self.conv(x)


class PooledHead(CoarseHead):
    """The same as the property that Detectron2's box heads have."""

    output_shape = property(lambda self: ShapeSpec(channels=16), lambda self, value: None)


class ByIndex(nn.Module):
    """Runs its blocks by their number, as Detectron2's Swin does: what is added to the list never runs."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def detector():
    """A backbone of features without stages, and a head with a Sequential, which is no place to point to."""
    return nn.ModuleDict({"backbone": Pyramid(), "head": nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())})


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (ByIndex, {"where": "blocks", "before": None, "channels": 8}, ["blocks, a ModuleList", "'blocks.1'"]),
        (ByIndex, {"where": "blocks"}, ["blocks, a ModuleList", "'blocks.1', with before=None"]),
        (detector, {}, ["'res4': it has backbone (with before=None and feature= one of p2, p3); any path"]),
        (resnet, {"where": "res9"}, ["'res9'", "res2, res3, res4"]),
        (resnet, {"where": "res4.3"}, ["'res4.3'", "res4"]),
        (pyramid, {"where": "backbon"}, ["'backbon'", "backbone"]),
        (resnet, {"before": 3}, ["before=3", "res4 has 3 blocks", "-3 to -1"]),
        (resnet, {"before": -4}, ["before=-4", "3 blocks"]),
        (resnet, {"where": "res4.0"}, ["res4.0, a BasicBlock", "before=None"]),
        (resnet, {"module": "nonlocal"}, ["'nonlocal'", "rcca, nl"]),
        (resnet, {"reductions": 4}, ["'reductions'", "reduction"]),
        (resnet, {"recurrence": 0}, ["recurrence must be at least 1"]),
        (resnet, {"reduction": 7}, ["channels=32", "reduction=7"]),
        (resnet, {"module": NonLocal(32), "recurrence": 2}, ["recurrence", "NonLocal"]),
        (resnet, {"feature": "res4"}, ["feature='res4'", "before=None"]),
        (resnet, {"name": "conv1"}, ["res4.2", "'conv1'", "name="]),
        (resnet, {"name": "my.rcca"}, ["name='my.rcca'", "no dot"]),
        (resnet, {"where": nn.Linear(2, 2)}, ["where must be the path of a module", "not a Linear."]),
        (resnet, {"before": "last"}, ["before must be the index of a block, or None", "not 'last'"]),
        (
            resnet,
            {"module": NonLocal},
            ["module must be one of rcca, nl, or a module built already", "NonLocal"],
        ),
        (pyramid, {"where": "backbone", "before": None, "feature": "p9"}, ["'p9'", "p2, p3"]),
        (
            pyramid,
            {"where": "backbone", "before": None},
            ["backbone gives a dict", "feature=, out of p2, p3"],
        ),
        (activation, {"where": "body", "before": None}, ["after body.1, a ReLU", "channels="]),
        (CoarseHead, {"where": "", "before": None}, ["after CoarseHead, a CoarseHead", "channels="]),
        (PooledHead, {"where": "", "before": None}, ["after PooledHead, a PooledHead", "channels="]),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(make, arguments, words):
    model = make()
    before = list(model.state_dict())
    with pytest.raises(ValueError) as error:
        add_rcca(model, **arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert list(model.state_dict()) == before


def test_an_element_of_a_list_takes_it():
    model = ByIndex()
    x = torch.randn(1, 8, 6, 6)
    expected = model(x)
    opened(add_rcca(model, "blocks.1", before=None))
    assert_same(model(x), attended(model.blocks[1].rcca, expected))


def test_features_that_are_no_map_are_named_when_they_come():
    model = add_rcca(pyramid(), "backbone", before=None, channels=16)
    with pytest.raises(
        UserError, match=r"output of backbone is a dict; choose one with feature=, out of p2, p3"
    ):
        model["backbone"](image(size=8))
    model = add_rcca(pyramid(), "backbone.conv", before=None, channels=24)
    with pytest.raises(ValueError, match=r"\(B, 24, H, W\), got \(1, 16, 8, 8\)"):
        model["backbone"](image(size=8))


def test_a_model_wrapped_for_several_processes_is_refused(tmp_path):
    """Its wrapper knows the parameters that there were; those of the module would differ from process to process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"DistributedDataParallel already.*wrap the model after it"):
            add_rcca(DistributedDataParallel(resnet()))
    finally:
        torch.distributed.destroy_process_group()


def test_twice_in_one_place_needs_a_second_name():
    model = add_rcca(resnet())
    with pytest.raises(UserError, match=r"res4\.2 has a 'rcca' already.*rcca_2"):
        add_rcca(model)
    add_rcca(model, name="rcca_2")
    keys = Counter(key.split(".")[2] for key in model.state_dict() if "rcca" in key)
    assert keys == {"rcca": 3, "rcca_2": 3}
