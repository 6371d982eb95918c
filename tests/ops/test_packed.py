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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(sizes, dtype):
    x = draw(*sizes, dtype=dtype)
    library.opcheck(torch.ops.ccnet_d2.criss_cross_packed_forward, (x, KEY_CHANNELS))
    plain = x.detach()
    out, lse = packed.forward(plain, KEY_CHANNELS)
    library.opcheck(torch.ops.ccnet_d2.criss_cross_packed_backward, (out, plain, KEY_CHANNELS, out, lse))


# Lines of several blocks of queries, and of matrix units' length with enough channels for them, as well.
ROOMS = [*((sizes, CHANNELS) for sizes in SIZES), ((2, 421), 40), ((70, 3), 200), ((421, 2), 200)]


@pytest.fixture(params=["amx", "avx512", "portable"])
def instruction_set(request, monkeypatch):
    """At most."""
    monkeypatch.setenv("CCNET_CPU_ISA", request.param)


UNIT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def room_for(sizes, channels, dtype):
    """A map with the channels of both gradients, and some before and after them."""
    return torch.randn(2, *sizes, 3 * KEY_CHANNELS + channels).to(dtype).movedim(-1, 1)


def parts_of(sizes, channels, dtype):
    torch.manual_seed(0)
    return tuple(
        (torch.randn(2, *sizes, c) * c**-0.25).to(dtype).movedim(-1, 1)
        for c in (KEY_CHANNELS, KEY_CHANNELS, channels)
    )


@pytest.mark.parametrize(("sizes", "channels"), ROOMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_into_some_channels(sizes, channels, dtype, instruction_set):
    parts = parts_of(sizes, channels, dtype)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(*parts)
    room = room_for(sizes, channels, dtype)
    wanted = room.clone()
    wanted[:, 4 : 4 + channels] = out
    got = torch.ops.ccnet_d2.criss_cross_forward_into(*parts, room[:, 4 : 4 + channels])
    assert torch.equal(got, lse) and torch.equal(room, wanted)


@pytest.mark.parametrize(("sizes", "channels"), ROOMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("over_the_map", [False, True])
def test_gradients_into_some_channels(sizes, channels, dtype, accumulate, over_the_map, instruction_set):
    """Also where the attended map, which the gradients are computed from, lies there."""
    function = torch.ops.ccnet_d2.criss_cross_backward_into
    check_gradients_into_some_channels(function, sizes, channels, dtype, accumulate, over_the_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("over_the_map", [False, True])
def test_gradients_into_some_channels_by_copies(dtype, accumulate, over_the_map):
    """What runs on CUDA."""
    check_gradients_into_some_channels(
        compiled.backward_and_copy, (5, 6), CHANNELS, dtype, accumulate, over_the_map
    )


def check_gradients_into_some_channels(function, sizes, channels, dtype, accumulate, over_the_map):
    parts = parts_of(sizes, channels, dtype)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(*parts)
    grad = torch.randn_like(out)
    of_query, of_key, of_value = torch.ops.ccnet_d2.criss_cross_backward(grad, *parts, out, lse)
    narrow = slice(1, 1 + KEY_CHANNELS), slice(1 + KEY_CHANNELS, 1 + 2 * KEY_CHANNELS)
    wide = slice(2 + 2 * KEY_CHANNELS, 2 + 2 * KEY_CHANNELS + channels)
    room = room_for(sizes, channels, dtype)
    wanted = room.clone()
    for place, gradient in zip(narrow, (of_query, of_key), strict=True):
        wanted[:, place] = wanted[:, place] + gradient if accumulate else gradient
    wanted[:, wide] = of_value
    if over_the_map:
        room[:, wide] = out
        out = room[:, wide]
    function(grad, *parts, out, lse, *(room[:, place] for place in (*narrow, wide)), accumulate)
    if accumulate or over_the_map:  # added up in another order
        for place in narrow:
            error = (room[:, place].double() - wanted[:, place].double()).norm()
            assert error <= UNIT[dtype] * wanted[:, place].double().norm()
            room[:, place] = wanted[:, place]
    assert torch.equal(room, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_results_that_are_given(dtype):
    parts = parts_of((5, 6), CHANNELS, dtype)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(*parts)
    library.opcheck(torch.ops.ccnet_d2.criss_cross_forward_into, (*parts, torch.empty_like(out)))
    results = tuple(torch.randn_like(x) for x in parts)
    arguments = (torch.randn_like(out), *parts, out, lse, *results)
    for accumulate in (False, True):
        library.opcheck(torch.ops.ccnet_d2.criss_cross_backward_into, (*arguments, accumulate))


def test_results_that_do_not_fit_are_named():
    parts = parts_of((5, 6), CHANNELS, torch.float32)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(*parts)
    for result, message in (
        (out[:, 1:], "out must have 7 channels, got 6"),
        (out.contiguous(), "out must be channels-last in memory"),
        (out.double(), "out must have the dtype of query"),
        (out[:, :, 1:], "out must have the spatial sizes of query"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.ccnet_d2.criss_cross_forward_into(*parts, result)
    for place, name in enumerate(("grad_query", "grad_key", "grad_value")):
        results = [torch.empty_like(x) for x in parts]
        results[place] = results[place].contiguous()
        with pytest.raises(RuntimeError, match=f"{name} must be channels-last in memory"):
            torch.ops.ccnet_d2.criss_cross_backward_into(out, *parts, out, lse, *results, False)


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
        results = (torch.empty_like(x) for x in (query, key, value))
        torch.ops.ccnet_d2.criss_cross_backward_into(out, query, key, value, out, lse, *results, False)
    assert counter.get_total_flops() == 2 * pairs * (3 * 3 + 2 * 7)


@pytest.mark.parametrize("key_channels", [0, -1, 7])
def test_channels_that_do_not_fit_are_named(key_channels):
    with pytest.raises(RuntimeError, match=f"13 channels and key_channels={key_channels}"):
        packed.forward(draw(4, 5).detach(), key_channels)
