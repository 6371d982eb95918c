import math

import pytest
import torch

from ccnet_d2.layers.asymmetric_non_local import AsymmetricNonLocal


def pyramid(x, bins):
    """Averages of the cells of every level, one column each."""
    height, width = x.shape[-2:]
    columns = []
    for n in bins:
        for i in range(n):
            for j in range(n):
                rows = slice(i * height // n, math.ceil((i + 1) * height / n))
                cells = slice(j * width // n, math.ceil((j + 1) * width / n))
                columns.append(x[:, :, rows, cells].mean(dim=(2, 3)))
    return torch.stack(columns, dim=2)


def pointwise(convolution, x):
    out = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], x)
    return out if convolution.bias is None else out + convolution.bias[:, None, None]


@pytest.mark.parametrize("size", [(9, 7), (2, 3), (1, 1)])
def test_against_loops(size):
    torch.manual_seed(0)
    module = AsymmetricNonLocal(6, key_channels=4, bins=(1, 2, 3), norm="", activation="relu").double()
    torch.nn.init.normal_(module.project.weight)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    query = pointwise(module.query_key.conv, x).clamp(min=0)
    keys, values = pyramid(query, (1, 2, 3)), pyramid(pointwise(module.value, x), (1, 2, 3))
    assert keys.shape[2] == 14
    out = torch.zeros_like(query)
    for b in range(2):
        for i in range(size[0]):
            for j in range(size[1]):
                weights = torch.stack([query[b, :, i, j] @ k / math.sqrt(4) for k in keys[b].T]).softmax(0)
                out[b, :, i, j] = sum(w * v for w, v in zip(weights, values[b].T, strict=True))
    fused = pointwise(module.fuse.conv, torch.cat([pointwise(module.project, out), x], dim=1))
    torch.testing.assert_close(module(x), fused.clamp(min=0))


def test_context_starts_at_zero():
    module = AsymmetricNonLocal(8)
    assert module.project.weight.abs().max() == 0 and module.project.bias.abs().max() == 0


def test_110_keys_by_default():
    assert sum(size**2 for size in AsymmetricNonLocal(8).bins) == 110


def test_errors():
    with pytest.raises(ValueError, match="key_channels must be at least 1, got 0"):
        AsymmetricNonLocal(8, key_channels=0)
    with pytest.raises(ValueError, match="bins must be"):
        AsymmetricNonLocal(8, bins=(0, 3))
