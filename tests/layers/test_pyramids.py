"""PSP and ASPP against cell-by-cell and tap-by-tap sums."""

import math

import pytest
import torch

from ccnet_d2.layers.aspp import ASPP
from ccnet_d2.layers.psp import PSP


def average_cells(x, bins):
    height, width = x.shape[-2:]
    out = x.new_zeros(*x.shape[:2], bins, bins)
    for i in range(bins):
        for j in range(bins):
            rows = slice(i * height // bins, math.ceil((i + 1) * height / bins))
            columns = slice(j * width // bins, math.ceil((j + 1) * width / bins))
            out[:, :, i, j] = x[:, :, rows, columns].mean(dim=(2, 3))
    return out


def enlarge(x, size, align_corners):
    """Bilinear, one output pixel at a time."""
    out = x.new_zeros(*x.shape[:2], *size)

    def place(i, length, out_length):
        if align_corners:
            return i * (length - 1) / max(out_length - 1, 1)
        return max((i + 0.5) * length / out_length - 0.5, 0.0)

    for i in range(size[0]):
        for j in range(size[1]):
            y, z = place(i, x.shape[2], size[0]), place(j, x.shape[3], size[1])
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, x.shape[2] - 1), min(z0 + 1, x.shape[3] - 1)
            top = (1 - (z - z0)) * x[:, :, y0, z0] + (z - z0) * x[:, :, y0, z1]
            bottom = (1 - (z - z0)) * x[:, :, y1, z0] + (z - z0) * x[:, :, y1, z1]
            out[:, :, i, j] = (1 - (y - y0)) * top + (y - y0) * bottom
    return out


def convolve(block, x, step=1):
    """Convolution as sums over shifted, zero-padded maps, then batch norm by its formula, then ReLU."""
    conv = block.conv
    k = conv.kernel_size[0]
    pad = step * (k // 2)
    padded = torch.nn.functional.pad(x, (pad,) * 4)
    out = x.new_zeros(x.shape[0], conv.out_channels, *x.shape[-2:])
    for i in range(k):
        for j in range(k):
            window = padded[:, :, i * step : i * step + x.shape[2], j * step : j * step + x.shape[3]]
            out += torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], window)
    norm = block.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return ((out - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).clamp(
        min=0
    )


def randomised(module):
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else torch.randn(tensor.shape))
    return module.double().eval()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(7, 5), (3, 8), (1, 1)])
def test_psp_against_cells(align_corners, size):
    module = randomised(PSP(4, 3, bins=(1, 2, 3, 6), align_corners=align_corners))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    maps = [x]
    for bins, level in zip((1, 2, 3, 6), module.levels, strict=True):
        maps.append(enlarge(convolve(level, average_cells(x, bins)), size, align_corners))
    torch.testing.assert_close(module(x), convolve(module.fuse, torch.cat(maps, dim=1)))


@pytest.mark.parametrize("size", [(7, 6), (1, 3)])
def test_aspp_against_taps(size):
    module = randomised(ASPP(4, 3, dilations=(1, 2, 5), branch_channels=2))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    maps = [convolve(module.pointwise, x)]
    maps += [convolve(branch, x, step) for branch, step in zip(module.dilated, (1, 2, 5), strict=True)]
    maps.append(convolve(module.image, x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *size))
    torch.testing.assert_close(module(x), convolve(module.fuse, torch.cat(maps, dim=1)))


def test_aspp_looks_12_24_and_36_pixels_far():
    module = ASPP(1, norm="", activation="").double()
    torch.nn.init.zeros_(module.image.conv.weight)
    x = torch.zeros(1, 1, 81, 81, dtype=torch.float64, requires_grad=True)
    module(x)[0, 0, 40, 40].backward()
    seen = [[i - 40, j - 40] for i, j in x.grad[0, 0].nonzero().tolist()]
    assert seen == sorted(
        [step * i, step * j]
        for step in (12, 24, 36)
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        if i or j or step == 12
    )


def test_one_image_cannot_train_batch_norm_over_a_pooled_cell():
    x = torch.randn(1, 4, 6, 6)
    for module in (PSP(4), ASPP(4)):
        with pytest.raises(ValueError, match="two images or more per device"):
            module.train()(x)
    assert PSP(4, norm="GN").train()(x).shape == x.shape


def test_errors():
    with pytest.raises(ValueError, match="bins must be one or more numbers"):
        PSP(4, bins=())
    with pytest.raises(ValueError, match="dilations and branch_channels must be at least 1"):
        ASPP(4, dilations=(0, 1))
    with pytest.raises(ValueError, match="out_channels must be at least 1, got 0"):
        PSP(4, 0)
    with pytest.raises(ValueError, match=r"^channels must be at least 1, got 0"):
        PSP(0, 4)
