import pytest
import torch

from ccnet_d2.layers.hv_attention import HV, HVAndVH, LineAttention


def by_loops(layer, x):
    """Attention over the row ("H") or column ("V") of each pixel, one pixel at a time."""
    width = layer.key_channels
    qkv = torch.einsum("oc,bchw->bohw", layer.qkv.weight.flatten(1), x) + layer.qkv.bias[:, None, None]
    query, key, value = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                keys = key[b, :, i, :] if layer.axis == "H" else key[b, :, :, j]
                values = value[b, :, i, :] if layer.axis == "H" else value[b, :, :, j]
                out[b, :, i, j] = values @ (query[b, :, i, j] @ keys).softmax(0)
    return x + layer.gamma * out


def prepared(layer):
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.double()


@pytest.mark.parametrize("axis", ["H", "V"])
def test_line_attention_against_loops(axis):
    layer = prepared(LineAttention(8, axis, reduction=4))
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loops(layer, x))


def test_hv_is_horizontal_then_vertical_and_the_sum_has_four_layers():
    both = prepared(HVAndVH(8))
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    hv = by_loops(both.hv.second, by_loops(both.hv.first, x))
    vh = by_loops(both.vh.second, by_loops(both.vh.first, x))
    assert [both.hv.first.axis, both.hv.second.axis, both.vh.first.axis, both.vh.second.axis] == list("HVVH")
    torch.testing.assert_close(both.hv(x), hv)
    torch.testing.assert_close(both(x), hv + vh)
    assert not torch.allclose(hv, vh)


def test_information_reaches_the_whole_map_after_both_only():
    for order in ("HV", "VH"):
        layer = prepared(HV(8, order=order))
        x = torch.randn(1, 8, 4, 5, dtype=torch.float64, requires_grad=True)
        (one,) = torch.autograd.grad(layer.first(x)[0, :, 1, 2].sum(), x)
        reached = one[0].abs().sum(0) > 0
        assert reached.sum() == (5 if order == "HV" else 4)
        (two,) = torch.autograd.grad(layer(x)[0, :, 1, 2].sum(), x)
        assert (two[0].abs().sum(0) > 0).all()


def test_gradcheck():
    layer = prepared(HV(2, reduction=2))
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_errors():
    with pytest.raises(ValueError, match="axis must be 'H'"):
        LineAttention(8, "W")
    with pytest.raises(ValueError, match="order='HH' is not one of 'HV', 'VH'"):
        HV(8, order="HH")
