import pytest
import torch
from torch import nn

from ccnet_d2.layers.norm_act import ConvNormAct, build_activation, build_norm


@pytest.mark.parametrize(
    ("norm", "kind"), [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm), ("GN", nn.GroupNorm)]
)
def test_norms_by_name(norm, kind):
    layer = build_norm(norm, 48)
    assert isinstance(layer, kind)
    assert layer.weight.shape == (48,)


def test_group_norm_has_32_groups_or_the_most_that_leave_two_channels_each():
    groups = [build_norm("GN", channels).num_groups for channels in (512, 64, 48, 32, 10, 4, 3, 1)]
    assert groups == [32, 32, 16, 16, 2, 2, 1, 1]


def test_names_and_callables():
    assert build_norm("", 8) is None and build_norm(None, 8) is None
    assert build_activation("") is None and build_activation(None) is None
    assert isinstance(build_norm(nn.InstanceNorm2d, 8), nn.InstanceNorm2d)
    assert isinstance(build_activation(nn.GELU), nn.GELU)
    assert build_activation("leaky_relu")(torch.tensor([-1.0, 2.0])).tolist() == pytest.approx([-0.01, 2.0])
    assert build_activation("relu")(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="unknown norm 'bn': use 'BN', 'SyncBN', 'GN'"):
        build_norm("bn", 8)
    with pytest.raises(ValueError, match="unknown activation 'elu': use 'relu', 'leaky_relu'"):
        build_activation("elu")


def test_convolution_norm_activation_in_this_order():
    torch.manual_seed(0)
    block = ConvNormAct(3, 4, 3, dilation=2, norm="BN", activation="relu").eval()
    nn.init.normal_(block.norm.running_mean)
    x = torch.randn(1, 3, 6, 7)
    convolved = nn.functional.conv2d(x, block.conv.weight, padding=2, dilation=2)
    scale = (block.norm.running_var + block.norm.eps).rsqrt()
    expected = ((convolved - block.norm.running_mean[:, None, None]) * scale[:, None, None]).clamp(min=0)
    torch.testing.assert_close(block(x), expected)


def test_weights_start_as_those_of_the_convolutions_around():
    """He et al., by what leaves the convolution."""
    torch.manual_seed(0)
    weight = ConvNormAct(8, 256, 3).conv.weight.detach()
    assert weight.mean().abs() < 0.002
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)


def test_bias_only_without_norm():
    assert ConvNormAct(3, 4, norm="BN").conv.bias is None
    assert ConvNormAct(3, 4, norm="").conv.bias is not None
    assert ConvNormAct(3, 4, norm=lambda channels: None).conv.bias is not None


def test_one_value_per_channel_cannot_train_batch_norm():
    block = ConvNormAct(3, 4).train()
    with pytest.raises(ValueError, match="two images or more per device"):
        block(torch.randn(1, 3, 1, 1))

    # As Detectron2's synchronised batch norm: one value here, more elsewhere.
    class AcrossDevices(nn.BatchNorm2d):
        def forward(self, x):
            return x

    assert ConvNormAct(3, 4, norm=AcrossDevices).train()(torch.randn(1, 3, 1, 1)).shape == (1, 4, 1, 1)
    assert block.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 4, 1, 1)
    assert ConvNormAct(3, 4, norm="GN").train()(torch.randn(1, 3, 1, 1)).shape == (1, 4, 1, 1)
