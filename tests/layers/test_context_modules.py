"""What holds for every context module: shapes, sizes, precision, gradients, and cost at 97x97."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ccnet_d2.layers.build import CONTEXT_MODULES, build_context
from ccnet_d2.layers.norm_act import ConvNormAct
from ccnet_d2.layers.psp import PSP

SMALL = {
    "aspp": {"branch_channels": 8, "dilations": (1, 2)},
    "psanet": {"mask_size": 7},
    "gcn": {"kernel_size": 3},
}
STANDALONE = {"psp", "aspp", "danet", "psanet"}


def small(name, in_channels=16, channels=16, **options):
    torch.manual_seed(0)
    return build_context(name, in_channels, channels, **SMALL.get(name, {}), **options)


def open_gates(module):
    """Non-zero gamma and output projections, which start at 0 and would hide everything behind them."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma") or name.startswith("project."):
            nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("name", CONTEXT_MODULES)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (7, 6)])
def test_every_size_keeps_its_shape(name, size):
    module = open_gates(small(name)).eval()
    out = module(torch.randn(2, 16, *size))
    assert out.shape == (2, 16, *size)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", CONTEXT_MODULES)
def test_an_empty_batch_stays_empty(name):
    assert small(name).eval()(torch.randn(0, 16, 4, 5)).shape == (0, 16, 4, 5)


@pytest.mark.parametrize("name", CONTEXT_MODULES)
@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_memory_format_does_not_matter(name, layout):
    module = open_gates(small(name)).eval()
    x = torch.randn(2, 16, 6, 5)
    other = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else None
    if other is None:
        other = torch.empty(2, 16, 5, 6).transpose(2, 3).copy_(x)
    torch.testing.assert_close(module(other), module(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONTEXT_MODULES)
def test_gradients_reach_the_input_and_every_parameter(name):
    module = open_gates(small(name))
    x = torch.randn(2, 16, 7, 6, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", CONTEXT_MODULES)
def test_autocast_bf16_stays_close_to_fp32(name):
    module = open_gates(small(name)).eval()
    x = torch.randn(2, 16, 7, 6, requires_grad=True)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.03
    out.float().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", CONTEXT_MODULES)
def test_trains_with_each_norm(name):
    for norm in ("BN", "GN", "", lambda channels: nn.BatchNorm2d(channels, momentum=0.01)):
        module = small(name, norm=norm, activation="leaky_relu").train()
        assert torch.isfinite(module(torch.randn(2, 16, 6, 6))).all()


@pytest.mark.parametrize("name", CONTEXT_MODULES)
def test_every_convolution_has_the_norm_and_the_activation_given(name):
    module = small(name, norm=nn.InstanceNorm2d, activation=nn.Hardswish)
    blocks = [block for block in module.modules() if isinstance(block, ConvNormAct)]
    assert bool(blocks) == (name in STANDALONE | {"asymmetric_nl"})
    for block in blocks:
        assert (type(block.norm), type(block.activation)) == (nn.InstanceNorm2d, nn.Hardswish)


@pytest.mark.parametrize("name", CONTEXT_MODULES)
def test_wrong_channels_are_named(name):
    with pytest.raises(ValueError, match=r"built for inputs \(B, 16, H, W\), got \(1, 8, 4, 4\)"):
        small(name)(torch.randn(1, 8, 4, 4))


def test_standalone_modules_change_the_channels():
    for name in CONTEXT_MODULES:
        module = small(name, in_channels=24, channels=16).eval()
        assert getattr(module, "standalone", False) == (name in STANDALONE), name
        channels = 24 if name in STANDALONE else 16
        assert module(torch.randn(1, channels, 5, 5)).shape == (1, 16, 5, 5)
        if name not in ("rcca", "rcca3d"):
            assert (module.in_channels, module.out_channels) == (channels, 16)


@pytest.mark.parametrize("name", ["none", "nl", "hv", "rcca"])
def test_gated_inserts_start_as_the_identity(name):
    x = torch.randn(1, 16, 5, 4)
    torch.testing.assert_close(small(name)(x), x)


def test_hv_vh_starts_as_twice_the_input():
    x = torch.randn(1, 16, 5, 4)
    torch.testing.assert_close(small("hv_vh")(x), 2 * x)


def test_build_context_names_what_is_wrong():
    with pytest.raises(ValueError, match="unknown context module 'ccnet': use one of none, rcca"):
        build_context("ccnet", 16, 16)
    with pytest.raises(ValueError, match="'nl' has no option 'recurence': it takes recurrence"):
        build_context("nl", 16, 16, recurence=2)
    with pytest.raises(ValueError, match="recurrence must be at least 1"):
        build_context("nl", 16, 16, recurrence=0)
    for name in ("nl", "hv", "hv_vh", "danet"):
        with pytest.raises(ValueError, match="channels=12 is not a positive multiple of reduction=8"):
            build_context(name, 12, 12)


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_module_that_resizes_does_so_as_its_head(align_corners):
    module = small("psp", align_corners=align_corners).eval()
    same = PSP(16, align_corners=align_corners).eval()
    same.load_state_dict(module.state_dict())
    x = torch.randn(1, 16, 7, 5)
    assert torch.equal(module(x), same(x))


def test_own_modules_join_the_table(monkeypatch):
    monkeypatch.setitem(
        CONTEXT_MODULES, "mine", lambda channels, width=3: nn.Conv2d(channels, channels, width)
    )
    assert build_context("mine", 32, 8, width=5).kernel_size == (5, 5)


# Closed forms at 97x97, multiply-adds counted twice: N positions, no bias, norm, softmax or pooling.
N = 97 * 97
QKV = 512 * (64 + 64 + 512)
FLOPS = {
    "none": (512, {}, 0),
    "nl": (512, {"backend": "matmul"}, QKV * N + N * N * (64 + 512)),
    "hv": (512, {}, 2 * (QKV * N + N * 97 * (64 + 512))),
    "hv_vh": (512, {}, 4 * (QKV * N + N * 97 * (64 + 512))),
    "gcn": (512, {}, 4 * 15 * 512 * 512 * N),
    "psp": (2048, {}, 2048 * 512 * (1 + 4 + 9 + 36) + 9 * 4096 * 512 * N),
    "aspp": (2048, {}, 2048 * 256 * N * (1 + 3 * 9) + 2048 * 256 + 1280 * 512 * N),
    "asymmetric_nl": (512, {}, 512 * 256 * N * 3 + 2 * 110 * 256 * N + 1024 * 512 * N),
    "danet": (
        2048,
        {"backend": "matmul"},
        2 * 9 * (2048 + 512) * 512 * N + QKV * N + N * N * (64 + 512) + 2 * 512 * 512 * N,
    ),
    "psanet": (
        2048,
        {},
        2 * 2048 * 512 * N
        + 2 * (512 * 512 + 512 * 97 * 97) * 49**2
        + 2 * 512 * 49**4
        + 1024 * 2048 * 49**2
        + 9 * 4096 * 512 * N,
    ),
}
PARAMETERS = {  # millions, of weights, biases and norms
    "none": 0,
    "nl": 0.328,
    "hv": 0.657,
    "hv_vh": 1.313,
    "gcn": 15.731,
    "psp": 23.074,
    "aspp": 15.863,
    "asymmetric_nl": 0.920,
    "danet": 23.925,
    "psanet": 33.237,
}


def measured_gflops(module, channels):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.empty(1, channels, 97, 97, device="meta"))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize("name", FLOPS)
def test_cost_at_97x97(name):
    channels, options, multiply_adds = FLOPS[name]
    with torch.device("meta"):
        module = build_context(name, channels, 512, **options)
    assert measured_gflops(module, channels) == pytest.approx(2 * multiply_adds / 1e9, rel=1e-6)
    parameters = sum(p.numel() for p in module.parameters()) / 1e6
    assert parameters == pytest.approx(PARAMETERS[name], abs=6e-4)


@pytest.mark.parametrize(("recurrence", "printed"), [(1, 108), (2, 216)])
def test_non_local_has_the_printed_cost(recurrence, printed):
    """CCNet (TPAMI), Tab. 5."""
    with torch.device("meta"):
        module = build_context("nl", 2048, 512, recurrence=recurrence, backend="matmul")
    assert measured_gflops(module, 512) == pytest.approx(printed, rel=0.005)


def test_danet_has_the_printed_parameters():
    """RANet, Tab. 3, prints 23 M for the increase over the backbone: DANet's head of 23.9 M on res5."""
    with torch.device("meta"):
        module = build_context("danet", 2048, 512)
    assert int(sum(p.numel() for p in module.parameters()) / 1e6) == 23
