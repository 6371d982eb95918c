import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ccnet_d2.layers.non_local import NonLocal, attention_matmul, attention_sdpa


def by_loops(query, key, value):
    """softmax over all keys, one query at a time, in Python floats."""
    query, key, value = query.detach(), key.detach(), value.detach()
    out = torch.zeros(value.shape[0], value.shape[1], query.shape[2], dtype=torch.float64)
    for b in range(query.shape[0]):
        for i in range(query.shape[2]):
            energy = [
                sum(float(query[b, c, i]) * float(key[b, c, j]) for c in range(query.shape[1]))
                for j in range(key.shape[2])
            ]
            top = max(energy)
            weight = [math.exp(e - top) for e in energy]
            for j, w in enumerate(weight):
                out[b, :, i] += w / sum(weight) * value[b, :, j].double()
    return out


@pytest.mark.parametrize("attention", [attention_matmul, attention_sdpa])
@pytest.mark.parametrize(("width", "channels"), [(2, 16), (3, 8), (8, 5), (1, 4)])
def test_attention_against_loops(attention, width, channels):
    torch.manual_seed(0)
    query = 2 * torch.randn(2, width, 7, dtype=torch.float64)
    key = torch.randn(2, width, 6, dtype=torch.float64)
    value = torch.randn(2, channels, 6, dtype=torch.float64)
    torch.testing.assert_close(attention(query, key, value), by_loops(query, key, value))


@pytest.mark.parametrize("attention", [attention_matmul, attention_sdpa])
def test_gradients(attention):
    torch.manual_seed(0)
    tensors = [torch.randn(1, c, 5, dtype=torch.float64, requires_grad=True) for c in (2, 2, 5)]
    assert torch.autograd.gradcheck(attention, tensors)


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("spatial", [(6,), (3, 4), (2, 3, 2)])
def test_layer_is_the_recurrence_of_its_equation(backend, spatial):
    torch.manual_seed(0)
    layer = NonLocal(16, recurrence=2, spatial_dims=len(spatial), backend=backend).double()
    layer.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, *spatial, dtype=torch.float64)
    expected = x.flatten(2)
    for _ in range(2):
        qkv = torch.einsum("oc,bcn->bon", layer.qkv.weight.flatten(1), expected) + layer.qkv.bias[:, None]
        out = by_loops(qkv[:, :2], qkv[:, 2:4], qkv[:, 4:])
        expected = expected + 0.7 * out
    torch.testing.assert_close(layer(x).flatten(2), expected)


def test_recurrence_shares_weights():
    counts = [sum(p.numel() for p in NonLocal(16, recurrence=r).parameters()) for r in (1, 3)]
    assert counts[0] == counts[1] == 16 * 20 + 20 + 1


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation inside returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def largest_tensor(backend, side):
    layer = NonLocal(64, backend=backend)
    x = torch.randn(1, 64, side, side, requires_grad=True)
    with LargestTensor() as largest:
        layer(x).sum().backward()
    return largest.numel


def test_sdpa_holds_no_attention_map():
    positions = 24 * 24
    assert largest_tensor("matmul", 24) >= positions**2
    assert largest_tensor("sdpa", 24) <= positions * (64 + 16)


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_large_energies_stay_finite(backend):
    torch.manual_seed(0)
    layer = NonLocal(16, backend=backend)
    layer.gamma.data.fill_(1.0)
    x = 1e3 * torch.randn(1, 16, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        out = layer(x)
    assert torch.isfinite(out).all()
    out.float().sum().backward()
    assert torch.isfinite(layer.qkv.weight.grad).all()


def test_errors():
    for arguments, message in (
        ({"recurrence": 0}, "recurrence must be at least 1 and whole, got 0"),
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3, got 4"),
        ({"backend": "flash"}, "backend='flash' is not one of 'sdpa', 'matmul'"),
        ({"reduction": 0}, "not a positive multiple of reduction=0"),
    ):
        with pytest.raises(ValueError, match=message):
            NonLocal(16, **arguments)
    with pytest.raises(ValueError, match=r"inputs \(B, 16, T, H, W\)"):
        NonLocal(16, spatial_dims=3)(torch.randn(1, 16, 4, 4))
