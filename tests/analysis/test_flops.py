"""FLOPs against numbers worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ccnet_d2 import add_rcca
from ccnet_d2.analysis import count_flops
from ccnet_d2.layers import HV, RCCA, GlobalConvolution, NonLocal
from ccnet_d2.ops import available_backends

BACKENDS = [name for name, reason in available_backends().items() if reason is None]


def test_layers_and_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.rest = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2, padding=1))

        def forward(self, x):
            return self.rest(self.first(x)).mean((2, 3)) @ torch.ones(6, 5)

    flops = count_flops(Net(), torch.zeros(2, 3, 10, 14))
    first = 2 * 2 * (5 * 7) * 8 * 3 * 9
    grouped = 2 * 2 * (5 * 7) * 6 * 4 * 9
    assert flops["Net.first"] == first and flops["Net.rest"] == grouped
    assert flops["Global"] == first + grouped + 2 * 2 * 6 * 5
    assert count_flops(nn.ReLU(), torch.zeros(3)) == {"Global": 0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width", "recurrence"), [(5, 9, 1), (6, 4, 3)])
def test_criss_cross_attention(backend, height, width, recurrence):
    channels, keys, positions = 16, 2, height * width
    projections = 2 * positions * channels * (channels + 2 * keys)
    # The lines of both axes; the self key that one of them masks is computed nevertheless.
    energies = 2 * positions * (height + width) * keys
    aggregation = 2 * positions * (height + width) * channels
    expected = recurrence * (projections + energies + aggregation)
    module = RCCA(channels, recurrence, backend=backend)
    measured = count_flops(module, torch.randn(1, channels, height, width))["Global"]
    # A backend may leave the masked key out.
    masked = recurrence * 2 * positions * (keys + channels)
    assert expected - masked <= measured <= expected


@pytest.mark.parametrize("fake", [False, True])
def test_non_local_attention(fake):
    positions, channels, keys = 30, 16, 2
    projections = 2 * positions * channels * (channels + 2 * keys)
    dense = 2 * positions**2 * (keys + channels)
    # Value channels in pieces as wide as the keys, each with the energies anew.
    pieces = 2 * positions**2 * (channels // keys * keys + channels)

    def count(backend):
        x = torch.randn(1, channels, 5, 6)
        return count_flops(NonLocal(channels, backend=backend), x)["Global"]

    if fake:
        with FakeTensorMode():
            counts = count("matmul"), count("sdpa")
    else:
        counts = count("matmul"), count("sdpa")
    assert counts == (projections + dense, projections + pieces)


def test_other_shapes_of_attention_and_large_kernels():
    channels, keys, height, width = 16, 2, 5, 9
    x = torch.randn(1, channels, height, width)
    projections = 2 * height * width * channels * (channels + 2 * keys)
    lines = 2 * height * width * (height + width) * (keys + channels)
    assert count_flops(HV(channels), x)["Global"] == 2 * projections + lines
    thin = 2 * height * width * channels * channels * 7
    assert count_flops(GlobalConvolution(channels, kernel_size=7), x)["Global"] == 4 * thin


@pytest.mark.parametrize("module", ["rcca", "nl"])
def test_fvcore_counts_all_of_matmul_and_nothing_of_what_is_fused(module):
    """As docs/add-rcca.md says, in multiply-adds."""
    height, width, channels = 5, 9, 16
    positions = height * width
    # The block of the latter has query, key and value of half the channels, a projection back, and a norm.
    projections, attention, backend, operator = {
        "rcca": (
            2 * positions * channels * (channels + 2 * 2),
            2 * positions * (height + width) * (channels + 2),
            "compiled",
            "ccnet_d2::criss_cross_forward",
        ),
        "nl": (
            positions * 4 * channels * 8,
            positions * positions * 2 * 8,
            "sdpa",
            "aten::scaled_dot_product_attention",
        ),
    }[module]

    def count(backend):
        net = nn.ModuleDict({"block": nn.Sequential(nn.Identity())})
        add_rcca(net, "block.0", before=None, channels=channels, module=module, backend=backend)
        analysis = FlopCountAnalysis(net["block"], torch.randn(1, channels, height, width))
        analysis.unsupported_ops_warnings(False)
        return analysis.total() - analysis.by_operator()["batch_norm"], set(analysis.unsupported_ops())

    assert count("matmul")[0] == projections + attention
    if module == "nl" or backend in BACKENDS:
        total, unsupported = count(backend)
        assert total == projections and operator in unsupported


def test_fused_attention_of_the_cpu_is_counted():
    query, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 11, 8)
    flops = count_flops(F.scaled_dot_product_attention, query, value, value)["Global"]
    assert flops == 2 * 2 * 3 * 7 * 11 * (8 + 8)
