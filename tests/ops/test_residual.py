"""x + gamma * attended between memory layouts, against PyTorch's own operators."""

import pytest
import torch

from ccnet_d2.ops import compiled
from ccnet_d2.ops.residual import gated_residual, gated_residual_into, residual_gradients

if not compiled.is_available():
    pytest.skip(str(compiled.unavailable_reason()), allow_module_level=True)

# Channels and positions that fill tiles of 64, leave remainders of squares of 4, and are fewer than 4.
SHAPES = [(2, 64, 8, 8), (1, 67, 9, 15), (2, 130, 3, 43), (1, 3, 1, 2), (3, 5, 70), (1, 9, 2, 3, 7)]
# More than 8 MiB of fp32, in whole cache lines whatever the layout: such results are written past the caches.
LARGE = (2, 272, 65, 80)
# The computation is in fp32 (fp64 for fp64), so that only the result's own rounding remains.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(shape, dtype, *, channels_last):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("attended_last", [True, False])
@pytest.mark.parametrize("x_last", [True, False])
@pytest.mark.parametrize("out_last", [True, False, None])
def test_values_and_gradients(shape, dtype, attended_last, x_last, out_last):
    check_values_and_gradients(shape, dtype, attended_last, x_last, out_last)


@pytest.mark.parametrize("best", ["amx", "avx2", "portable"])
@pytest.mark.parametrize("x_last", [True, False])
@pytest.mark.parametrize("out_last", [True, False])
def test_large_results(best, x_last, out_last, monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", best)
    check_values_and_gradients(LARGE, torch.float32, True, x_last, out_last)


def check_values_and_gradients(shape, dtype, attended_last, x_last, out_last):
    torch.manual_seed(0)
    attended = draw(shape, dtype, channels_last=attended_last).requires_grad_()
    x = draw(shape, dtype, channels_last=x_last).requires_grad_()
    gamma = torch.tensor([0.75], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    gamma.requires_grad_()
    grad = draw(shape, dtype, channels_last=x_last)

    out = gated_residual(attended, gamma, x, channels_last=out_last)
    grads = torch.autograd.grad(out, (attended, gamma, x), grad)

    wanted = x.double() + 0.75 * attended.double()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads[0].double(), 0.75 * grad.double(), rtol=tolerance, atol=tolerance)
    total = (grad.double() * attended.double()).sum().reshape(1)
    torch.testing.assert_close(grads[1].double(), total, rtol=1e-5, atol=1e-4)
    assert torch.equal(grads[2], grad)
    like = x if out_last is None else draw(shape, dtype, channels_last=out_last)
    assert out.dtype == dtype and out.stride() == like.stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [*((d, d) for d in TOLERANCE), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("x_last", [True, False])
@pytest.mark.parametrize("out_last", [True, False])
@pytest.mark.parametrize("library", [True, False])
def test_some_channels_of_maps(shape, dtypes, x_last, out_last, library):
    """Forward into, and backward from, the middle of larger maps; `library` or PyTorch's operators."""
    torch.manual_seed(0)
    low, dtype = dtypes
    batch, channels, *sizes = shape
    larger, middle = (batch, channels + 5, *sizes), slice(3, 3 + channels)
    x = draw(larger, dtype, channels_last=x_last)
    room = draw(larger, dtype, channels_last=out_last)
    attended = draw(larger, low, channels_last=True)[:, middle]
    gamma = torch.tensor([0.75], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = room.clone()
    wanted[:, middle] = gated_residual(attended.contiguous(), gamma, x[:, middle].contiguous())
    given = attended if library else attended.repeat_interleave(2, dim=1)[:, ::2]
    gated_residual_into(given, gamma, x[:, middle], room[:, middle])
    tolerance = 0 if library else TOLERANCE[dtype]
    torch.testing.assert_close(room[:, middle], wanted[:, middle], rtol=tolerance, atol=tolerance)
    assert torch.equal(room[:, :3], wanted[:, :3])
    assert torch.equal(room[:, 3 + channels :], wanted[:, 3 + channels :])

    got = residual_gradients(x[:, middle], attended, gamma)
    expected = residual_gradients(x[:, middle].contiguous(), attended.contiguous(), gamma)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-4)


def test_results_that_do_not_fit_are_named():
    attended, x = (draw((2, 8, 5, 6), torch.float32, channels_last=last) for last in (True, False))
    for out, message in (
        (x.double(), "the result must have the dtype of x"),
        (x[:, 1:], "must have one shape"),
        (torch.empty(2, 16, 5, 12)[:, ::2, :, ::2], "the result must be dense over channels or positions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.ccnet_d2.gated_residual_forward_into(attended, torch.tensor([0.75]), x, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_last", [True, False])
@pytest.mark.parametrize("out_last", [True, False])
def test_half_precision_attention_beside_fp32(dtype, x_last, out_last):
    attended = draw((2, 70, 9, 11), dtype, channels_last=True)
    x = draw((2, 70, 9, 11), torch.float32, channels_last=x_last)
    out = gated_residual(attended, torch.tensor([0.5]), x, channels_last=out_last)
    torch.testing.assert_close(out, x + 0.5 * attended.float(), rtol=1e-6, atol=1e-6)


def test_bf16_is_rounded_as_pytorch_rounds():
    """Ties, the largest numbers, infinities and NaN, in places of a square and of a remainder."""
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.38e38, -3.38e38, 0.0, -0.0])
    ties = torch.arange(1.0, 258.0) / 256  # with a half added: the last bit decides between two neighbours
    values = torch.cat([special, ties]).to(torch.bfloat16)
    x = values.repeat(18)[: 18 * 261].reshape(1, 18, 9, 29).contiguous()
    attended = x.flip(1).movedim(1, -1).contiguous().movedim(-1, 1)
    gamma = torch.tensor([2.0**-8])
    wanted = (x.float() + gamma * attended.float()).to(torch.bfloat16)
    for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        for out_last in (True, False):
            out = gated_residual(attended, gamma, layout, channels_last=out_last)
            torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("out_last", [True, False])
def test_layout_where_the_library_does_not_go(out_last):
    attended = draw((2, 8, 6, 5), torch.float32, channels_last=True).transpose(2, 3)
    x = draw((2, 8, 5, 6), torch.float32, channels_last=True).requires_grad_()
    out = gated_residual(attended, torch.tensor([0.75]), x, channels_last=out_last)
    torch.testing.assert_close(out, x + 0.75 * attended)
    assert out.stride() == draw(x.shape, x.dtype, channels_last=out_last).stride()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("x_last", [True, False])
def test_gradients_by_pytorch_where_the_library_does_not_go(dtype, x_last):
    """On GPUs, and here for an attended map that is neither NCHW nor channels-last."""
    torch.manual_seed(0)
    grad = draw((2, 8, 5, 6), dtype, channels_last=x_last)
    attended = draw((2, 8, 6, 5), dtype, channels_last=True).transpose(2, 3)
    gamma = torch.tensor([0.75], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    got = residual_gradients(grad, attended, gamma)
    wanted = residual_gradients(grad, attended.contiguous(), gamma)
    torch.testing.assert_close(got[0], wanted[0])
    tolerance = 8 * TOLERANCE[dtype]  # the products are rounded
    torch.testing.assert_close(got[1], wanted[1], rtol=tolerance, atol=tolerance * len(grad.flatten()) ** 0.5)
    assert got[0].dtype == dtype and got[1].dtype == gamma.dtype


def test_gamma_s_gradient_is_summed_in_fp32_by_pytorch():
    """A sum beyond what fp16 holds."""
    x = torch.full((2, 8, 5, 6), 32.0, dtype=torch.float16)
    attended = draw((2, 8, 6, 5), torch.float16, channels_last=True).transpose(2, 3).copy_(x)
    assert residual_gradients(x, attended, torch.tensor([0.5]))[1].tolist() == [32.0 * 32 * x.numel()]


@pytest.mark.parametrize("trained", ["attended", "gamma"])
def test_what_is_frozen_takes_no_other_gradient_along(trained):
    torch.manual_seed(0)
    shape = (2, 8, 5, 6)
    inputs = {
        "attended": draw(shape, torch.float32, channels_last=True),
        "gamma": torch.tensor([0.75]),
        "x": draw(shape, torch.float32, channels_last=False),
    }
    grad = draw(shape, torch.float32, channels_last=False)
    inputs[trained].requires_grad_()
    (got,) = torch.autograd.grad(gated_residual(**inputs), inputs[trained], grad)
    wanted = {"attended": 0.75 * grad, "gamma": (grad * inputs["attended"].detach()).sum().reshape(1)}
    torch.testing.assert_close(got, wanted[trained])


def test_second_derivative_is_refused():
    attended, x = (draw((2, 8, 5, 6), torch.float32, channels_last=last) for last in (True, False))
    attended.requires_grad_()
    out = gated_residual(attended, torch.tensor([0.75], requires_grad=True), x)
    (grad,) = torch.autograd.grad(out.square().sum(), attended, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
