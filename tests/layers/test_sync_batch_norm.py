"""Batch norm over processes as a function of one; with several it is tested by those of `engine`."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ccnet_d2.layers.sync_batch_norm import _Normalize


@pytest.fixture
def alone(monkeypatch):
    """The sums of all processes are this one's."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: None)


def draw():
    torch.manual_seed(0)
    return [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 4, 5), (4,), (4,))]


def test_alone_it_is_batch_norm(alone):
    x, weight, bias = inputs = draw()
    out, grad = _Normalize.apply(*inputs, 1e-5, None)[0], torch.randn(3, 4, 5, dtype=torch.float64)
    wanted = F.batch_norm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(out, wanted)
    got = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, inputs, grad))


def test_a_second_derivative_is_refused(alone):
    inputs = draw()
    out = _Normalize.apply(*inputs, 1e-5, None)[0]
    (grad,) = torch.autograd.grad(out.pow(3).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
