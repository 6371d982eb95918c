"""The op on query, key and value in one tensor, against the op on three."""

import pytest
import torch
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from ccnet_d2.ops import compiled, packed

if not compiled.is_available():
    pytest.skip(str(compiled.unavailable_reason()), allow_module_level=True)

KEY_CHANNELS, CHANNELS = 3, 7
SIZES = [(7,), (5, 6), (3, 4, 5), (1, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*sizes, dtype=torch.float32, channels_last=True):
    torch.manual_seed(0)
    shape = (
        (2, *sizes, 2 * KEY_CHANNELS + CHANNELS)
        if channels_last
        else (2, 2 * KEY_CHANNELS + CHANNELS, *sizes)
    )
    x = torch.randn(shape).to(dtype)
    return (x.movedim(-1, 1) if channels_last else x).requires_grad_()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_the_op_on_three_tensors(sizes, dtype, channels_last):
    x = draw(*sizes, dtype=dtype, channels_last=channels_last)
    out, lse = packed.forward(x, KEY_CHANNELS)
    wanted, wanted_lse = torch.ops.ccnet_d2.criss_cross_forward(*packed.split(x, KEY_CHANNELS))
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    assert out.requires_grad and not lse.requires_grad
    grad = torch.randn_like(out)
    got, expected = torch.autograd.grad(out, x, grad), torch.autograd.grad(wanted, x, grad)
    assert torch.equal(got[0], expected[0])
    assert got[0].movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("sizes", SIZES)
def test_by_way_of_parts(sizes):
    """What runs on CUDA, whose kernels take three tensors."""
    x = draw(*sizes).detach()
    out, lse = packed.forward(x, KEY_CHANNELS)
    for got, wanted in zip(packed.forward_of_parts(x, KEY_CHANNELS), (out, lse), strict=True):
        assert torch.equal(got, wanted)
    grad = torch.randn_like(out)
    arguments = (grad, x, KEY_CHANNELS, out, lse)
    got, wanted = packed.backward_of_parts(*arguments), packed.backward(*arguments)
    assert torch.equal(got, wanted) and got.stride() == wanted.stride()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(sizes, dtype):
    x = draw(*sizes, dtype=dtype)
    library.opcheck(torch.ops.ccnet_d2.criss_cross_packed_forward, (x, KEY_CHANNELS))
    plain = x.detach()
    out, lse = packed.forward(plain, KEY_CHANNELS)
    library.opcheck(torch.ops.ccnet_d2.criss_cross_packed_backward, (out, plain, KEY_CHANNELS, out, lse))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_value_into_some_channels(sizes, dtype):
    query, key, value = packed.split(draw(*sizes, dtype=dtype).detach(), KEY_CHANNELS)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    inputs = (torch.randn_like(out), query, key, value, out, lse)
    wanted = torch.ops.ccnet_d2.criss_cross_backward(*inputs)
    for function in (torch.ops.ccnet_d2.criss_cross_backward_into, compiled.backward_and_copy):
        room = draw(*sizes, dtype=dtype).detach().clone()
        before = room.clone()
        grads = function(*inputs, room[:, 4 : 4 + CHANNELS])
        assert torch.equal(room[:, 4 : 4 + CHANNELS], wanted[2])
        assert torch.equal(grads[0], wanted[0]) and torch.equal(grads[1], wanted[1])
        assert torch.equal(room[:, :4], before[:, :4])
        assert torch.equal(room[:, 4 + CHANNELS :], before[:, 4 + CHANNELS :])
    library.opcheck(torch.ops.ccnet_d2.criss_cross_backward_into, (*inputs, room[:, 4 : 4 + CHANNELS]))


def test_second_derivative_is_refused():
    x = draw(4, 5)
    (grad,) = torch.autograd.grad(packed.forward(x, KEY_CHANNELS)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


def test_flops_are_counted():
    x = draw(5, 7)
    with FlopCounterMode(display=False) as counter:
        packed.forward(x, KEY_CHANNELS)[0].sum().backward()
    pairs = 2 * 5 * 7 * (5 + 7)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["ccnet_d2.criss_cross_packed_forward"] == 2 * pairs * (3 + 7)
    assert counts["ccnet_d2.criss_cross_packed_backward"] == 2 * pairs * (3 * 3 + 2 * 7)
    query, key, value = packed.split(x.detach(), KEY_CHANNELS)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    with FlopCounterMode(display=False) as counter:
        torch.ops.ccnet_d2.criss_cross_backward_into(out, query, key, value, out, lse, torch.empty_like(out))
    assert counter.get_total_flops() == 2 * pairs * (3 * 3 + 2 * 7)


@pytest.mark.parametrize("key_channels", [0, -1, 7])
def test_channels_that_do_not_fit_are_named(key_channels):
    with pytest.raises(RuntimeError, match=f"13 channels and key_channels={key_channels}"):
        packed.forward(draw(4, 5).detach(), key_channels)
