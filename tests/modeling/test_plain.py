"""The small backbone of the synthetic set: what it announces, and how far it sees."""

import pytest
import torch

from ccnet_d2.modeling import PlainConvNet


@pytest.mark.parametrize(
    ("options", "channels", "stride"),
    [({}, 64, 2), ({"channels": (4, 6, 8), "strides": (2, 1, 2), "in_channels": 5}, 8, 4)],
)
def test_shape_is_as_announced(options, channels, stride):
    net = PlainConvNet(**options)
    (spec,) = net.output_shape().values()
    assert (spec.channels, spec.stride) == (channels, stride)
    x = torch.randn(2, options.get("in_channels", 3), 16, 24)
    assert net(x)["conv"].shape == (2, channels, 16 // stride, 24 // stride)


def test_a_pixel_sees_five_by_five_and_nothing_beyond():
    net = PlainConvNet(norm="").double()
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.1)  # no ReLU cuts a gradient off
    x = torch.zeros(1, 3, 16, 20, dtype=torch.float64, requires_grad=True)
    net(x)["conv"][0, 0, 4, 5].backward()
    rows, columns = x.grad[0].sum(0).nonzero().unbind(1)
    assert (rows.unique().tolist(), columns.unique().tolist()) == (list(range(6, 11)), list(range(8, 13)))
    assert len(rows) == 25


def test_channels_and_strides_are_of_the_same_convolutions():
    with pytest.raises(ValueError, match=r"channels \[8, 8\] and strides \[1\] must name the same"):
        PlainConvNet(channels=(8, 8), strides=(1,))
