"""The 1x1 convolution and its gradients against products in double precision."""

import pytest
import torch

from ccnet_d2.ops.projection import (
    add_input_gradient,
    bias_gradient,
    input_gradient,
    project,
    weight_gradient,
)

UNIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(*shape, dtype, channels_last=False):
    x = torch.randn(shape).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


# The last ones are long enough to be multiplied in runs, without and with positions left over.
@pytest.mark.parametrize("sizes", [(7,), (5, 6), (2, 3, 4), (32, 40), (37, 43), (1031,)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_values(sizes, batch, dtype, channels_last, recorded):
    torch.manual_seed(0)
    x = draw(batch, 24, *sizes, dtype=dtype, channels_last=channels_last)
    grad = draw(batch, 30, *sizes, dtype=dtype, channels_last=True)
    weight, bias = draw(30, 24, dtype=dtype), draw(30, dtype=dtype)
    total = x.flip(1) if not channels_last else x.movedim(1, -1).flip(-1).movedim(-1, 1)
    added = total.clone()

    with torch.set_grad_enabled(recorded):
        got = {
            "projected": project(x, weight, bias),
            "weight": weight_gradient(grad, x),
            "bias": bias_gradient(grad),
            "input": input_gradient(grad, weight),
        }
        add_input_gradient(added, grad, weight)

    x, grad, weight, bias = (t.double() for t in (x, grad, weight, bias))
    of_input = torch.einsum("bo...,oc->bc...", grad, weight)
    wanted = {
        "projected": torch.einsum("bc...,oc->bo...", x, weight) + bias.view(-1, *(1 for _ in sizes)),
        "weight": torch.einsum("bon,bcn->oc", grad.flatten(2), x.flatten(2)),
        "bias": grad.flatten(2).sum((0, 2)),
        "input": of_input,
    }
    for name, value in [*got.items(), ("added", added)]:
        expected = of_input + total.double() if name == "added" else wanted[name]
        assert value.dtype == dtype and value.shape == expected.shape, name
        assert (value.double() - expected).norm() <= UNIT[dtype] * expected.norm(), name
    assert got["weight"].is_contiguous()
    for name in ("projected", "input"):
        assert got[name].movedim(1, -1).is_contiguous()
