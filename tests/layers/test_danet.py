import torch

from ccnet_d2.layers.danet import ChannelAttention, DANet


def channels_by_loops(x):
    out = torch.zeros_like(x)
    channels = x.shape[1]
    for b in range(x.shape[0]):
        for i in range(channels):
            energy = torch.stack([(x[b, i] * x[b, j]).sum() for j in range(channels)])
            weight = torch.exp(-(energy - energy.min()))
            out[b, i] = sum(w * x[b, j] for j, w in enumerate(weight / weight.sum()))
    return out


def test_channel_attention_against_loops():
    torch.manual_seed(0)
    layer = ChannelAttention(5).double()
    layer.gamma.data.fill_(0.3)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x + 0.3 * channels_by_loops(x))


def test_channel_attention_gradients():
    torch.manual_seed(0)
    layer = ChannelAttention(3).double()
    layer.gamma.data.fill_(0.8)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_large_maps_in_half_precision_stay_finite():
    layer = ChannelAttention(4)
    layer.gamma.data.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.float16):
        out = layer((30 * torch.randn(1, 4, 40, 40)).half())
    assert torch.isfinite(out).all()


def test_danet_is_the_sum_of_its_two_branches():
    torch.manual_seed(0)
    module = DANet(6, 8, reduction=4, norm="", activation="").double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 6, 4, 3, dtype=torch.float64)

    def conv(block, y):
        return torch.nn.functional.conv2d(y, block.conv.weight, block.conv.bias, padding=1)

    before, attention, after = module.position
    y = conv(before, x)
    qkv = (
        torch.einsum("oc,bchw->bohw", attention.qkv.weight[:, :, 0, 0], y) + attention.qkv.bias[:, None, None]
    )
    qkv = qkv.flatten(2)
    weight = torch.einsum("bci,bcj->bij", qkv[:, :2], qkv[:, 2:4]).softmax(2)
    y = y + attention.gamma * torch.einsum("bij,bcj->bci", weight, qkv[:, 4:]).reshape(y.shape)
    expected = conv(after, y)
    before, attention, after = module.channel
    y = conv(before, x)
    expected = expected + conv(after, y + attention.gamma * channels_by_loops(y))
    torch.testing.assert_close(module(x), expected)
