"""Memory of tensors whose life is known, and of real against fake ones."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ccnet_d2.analysis import LiveMemory, kept_for_backward, traced_cost
from ccnet_d2.layers import ASPP, RCCA, NonLocal

MIB = 2**20


def test_live_and_peak_follow_the_tensors():
    before = torch.zeros(MIB // 4)
    with LiveMemory() as memory:
        a = torch.zeros(MIB // 4)  # 1
        b = a + before  # 2
        view = b[10:].view(-1, 2)
        b.mul_(2)
        assert (memory.live, memory.peak) == (2 * MIB, 2 * MIB)
        c = torch.cat([a, b])  # 4
        del a
        assert (memory.live, memory.peak) == (3 * MIB, 4 * MIB)
        del b, c  # the view still holds b
        assert memory.live == MIB
        before.add_(1)
        assert memory.live == MIB
        del view
        assert (memory.live, memory.peak) == (0, 4 * MIB)
    torch.zeros(MIB)
    assert memory.peak == 4 * MIB


def test_backward_is_followed():
    x = torch.ones(MIB // 4, requires_grad=True)
    with LiveMemory() as memory:
        y = x.exp().sum()
        assert memory.live == MIB + 4  # exp keeps its result
        y.backward()
        del y
        # exp's result, the expanded gradient times it, and x.grad in its place.
        assert memory.live == MIB and 2 * MIB <= memory.peak <= 2 * MIB + 64


@pytest.mark.parametrize("fake", [False, True])
def test_what_backward_needs(fake):
    def kept() -> int:
        x = torch.ones(MIB // 4, requires_grad=True)
        weight = torch.ones(MIB // 4, requires_grad=True)

        def forward():
            y = (x * weight).exp()  # keeps x, weight; its own result
            return y.view(2, -1) * y.view(2, -1) + y.view(2, -1)  # keeps y again; sums keep nothing

        return kept_for_backward(forward, [x, weight])[0]

    if fake:
        with FakeTensorMode():
            assert kept() == MIB
    else:
        assert kept() == MIB


@pytest.mark.parametrize(
    "build",
    [
        lambda: RCCA(16, 2, backend="matmul"),
        lambda: RCCA(16, 2),
        lambda: NonLocal(16, 2, backend="matmul"),
        lambda: NonLocal(16),
        lambda: ASPP(16, norm="GN", branch_channels=16),
    ],
    ids=["rcca-matmul", "rcca", "nl-matmul", "nl", "aspp"],
)
def test_traced_is_what_really_is_allocated(build):
    """Fake tensors against a real forward and backward pass."""
    traced = traced_cost(build, (2, 16, 12, 20))
    module = build()
    x = torch.randn(2, 16, 12, 20, requires_grad=True)
    with LiveMemory() as memory:
        kept, out = kept_for_backward(lambda: module(x), [*module.parameters(), *module.buffers(), x])
        out.backward(torch.ones_like(out))
    assert (traced.kept_mb, traced.peak_mb) == pytest.approx((kept / 1e6, memory.peak / 1e6), rel=0.01)
    assert traced.parameters == sum(p.numel() for p in module.parameters())


def test_non_local_attention_keeps_its_map():
    positions, channels = 30 * 20, 16
    cost = traced_cost(lambda: NonLocal(channels, backend="matmul"), (1, channels, 30, 20))
    keys = channels // 8
    floats = (
        positions**2 + positions * (2 * keys + channels) + positions * channels
    )  # map, qkv, output times gamma
    assert cost.kept_mb == pytest.approx(4 * floats / 1e6, rel=1e-3)
    assert cost.peak_mb > cost.kept_mb


def test_buffers_and_input_do_not_count():
    cost = traced_cost(lambda: nn.BatchNorm2d(4), (2, 4, 8, 8))
    assert cost.kept_mb * 1e6 == pytest.approx(2 * 4 * 4)  # the batch's mean and deviation
