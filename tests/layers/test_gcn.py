import pytest
import torch

from ccnet_d2.layers.gcn import GlobalConvolution


def by_taps(branch, x, tall_first):
    """Two thin convolutions as sums over shifted, zero-padded maps."""
    for convolution, tall in zip(branch, (tall_first, not tall_first), strict=True):
        k = max(convolution.kernel_size)
        half = k // 2
        height, width = x.shape[-2:]
        padded = torch.nn.functional.pad(x, (half, half, half, half))
        out = convolution.bias[None, :, None, None].expand(x.shape[0], -1, height, width).clone()
        for tap in range(k):
            y, z = (tap, half) if tall else (half, tap)
            weight = convolution.weight[:, :, tap, 0] if tall else convolution.weight[:, :, 0, tap]
            out += torch.einsum("oc,bchw->bohw", weight, padded[:, :, y : y + height, z : z + width])
        x = out
    return x


@pytest.mark.parametrize(("kernel", "mid"), [(5, None), (3, 2), (1, 7)])
def test_against_shifted_sums(kernel, mid):
    torch.manual_seed(0)
    layer = GlobalConvolution(4, kernel_size=kernel, mid_channels=mid).double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = by_taps(layer.tall_wide, x, True) + by_taps(layer.wide_tall, x, False)
    torch.testing.assert_close(layer(x), expected)


def test_receptive_field_is_the_square():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 11, 11, requires_grad=True)
    GlobalConvolution(2, kernel_size=7)(x)[0, :, 5, 5].sum().backward()
    reached = x.grad[0].abs().sum(0) > 0
    assert reached[2:9, 2:9].all() and reached.sum() == 49


def test_errors():
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 1, got 14"):
        GlobalConvolution(4, kernel_size=14)
    with pytest.raises(ValueError, match="mid_channels must be at least 1"):
        GlobalConvolution(4, mid_channels=0)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        GlobalConvolution(0)
