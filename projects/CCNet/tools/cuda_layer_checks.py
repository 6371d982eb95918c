"""What check_cuda_op.py asks of the layer's other kernels.

The operator on one tensor that holds query, key and value, the gated residual between memory layouts, copies to
channels-last memory, and a loop of all of them.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccnet_d2.ops import reference
from ccnet_d2.ops.loop import criss_cross_loop
from cuda_op_cases import Case, make_inputs
from cuda_op_checks import CPU, FACTOR, HALF_LEAST, MASK_POSITIONS, TOLERANCE, CheckFailed, relative_error

GAMMA = 0.625
ROUNDINGS = 1.01  # half a unit in the last place, and what the reference itself may be off by
SUM_TOLERANCE = 1e-6  # of the sum of magnitudes
LOOP_NAMES = (
    "output",
    "gradient of x",
    "gradient of the weight",
    "gradient of the bias",
    "gradient of gamma",
)
LOOP_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_layer_steps(case: Case, device: torch.device) -> None:
    """Raises CheckFailed where something is wrong. Inputs are drawn and results compared on the CPU."""
    query, key, value, grad = (x.movedim(1, -1) for x in make_inputs(case, CPU))
    packed = torch.cat([query, key, value], dim=-1).to(device).movedim(-1, 1)
    grad = grad.contiguous().to(device).movedim(-1, 1)
    attended = _check_packed(case, packed, grad)
    _check_residual(attended, grad)
    if case.logit_scale < 1e4:
        _check_loop(case, grad)


def _check_loop(case: Case, last: Tensor) -> None:
    """Projection, attention and residual as one, NCHW in and out, against float64."""
    key_channels, channels, device = case.key_channels, case.channels, last.device
    generator = torch.Generator().manual_seed(case.seed)
    weight, bias = (
        torch.randn(2 * key_channels + channels, *columns, generator=generator)
        for columns in ((channels,), ())
    )
    weight /= channels**0.5
    for rows in (weight, bias):  # energies of a deviation of 1
        rows[: 2 * key_channels] *= key_channels**-0.25
    x = last.cpu().contiguous()
    drawn = [t.to(device, last.dtype) for t in (x, weight, bias, torch.tensor([GAMMA]))]
    grad = drawn[0].flip(1)
    # Small ones on the CPU, as all of the comparisons there.
    exact_on = CPU if x[:, 0].numel() <= MASK_POSITIONS else device
    inputs = [t.detach().requires_grad_() for t in drawn]
    exact = [t.to(exact_on, torch.float64).requires_grad_() for t in drawn]
    out = criss_cross_loop(*inputs, key_channels)
    if not out.is_contiguous():
        raise CheckFailed("the loop's result is not NCHW")
    projected = torch.einsum("oc,bc...->bo...", *exact[1::-1]) + exact[2].view(-1, *[1] * (x.dim() - 2))
    parts = projected.split([key_channels, key_channels, channels], dim=1)
    wanted = exact[3] * reference.criss_cross_attention(*parts) + exact[0]
    got_all = (out, *torch.autograd.grad(out, inputs, grad))
    wanted_all = (wanted, *torch.autograd.grad(wanted, exact, grad.to(wanted)))
    for name, got, expected in zip(LOOP_NAMES, got_all, wanted_all, strict=True):
        error, limit = (
            relative_error(got.detach().to(exact_on), expected.detach()),
            LOOP_TOLERANCE[last.dtype],
        )
        if not error <= limit:
            raise CheckFailed(f"the loop's {name} is off by {error:.2e}, {limit:.2e} is allowed")


def _check_packed(case: Case, packed: Tensor, grad: Tensor) -> Tensor:
    """Against the operator on three tensors; the attended map."""
    kernels, key_channels = torch.ops.ccnet_d2, case.key_channels
    parts = packed.split([key_channels, key_channels, case.channels], dim=1)
    out, lse = kernels.criss_cross_packed_forward(packed, key_channels)
    wanted, wanted_lse = kernels.criss_cross_forward(*parts)
    if not (torch.equal(out.cpu(), wanted.cpu()) and torch.equal(lse.cpu(), wanted_lse.cpu())):
        raise CheckFailed("the forward pass of one tensor differs from that of its parts")
    got = kernels.criss_cross_packed_backward(grad, packed, key_channels, out, lse).cpu()
    # Written elsewhere, the parts' gradients may have come from other kernels.
    grads = [x.cpu() for x in kernels.criss_cross_backward(grad, *parts, out, lse)]
    for name, part, expected in zip(
        ("grad_query", "grad_key", "grad_value"),
        got.split([x.shape[1] for x in grads], dim=1),
        grads,
        strict=True,
    ):
        error = relative_error(part, expected.double())
        limit = FACTOR[name] * HALF_LEAST.get(part.dtype, TOLERANCE[name])
        if not (error <= limit or case.logit_scale >= 1e4) or not part.isfinite().all():
            raise CheckFailed(f"{name} of one tensor is off by {error:.2e}, {limit:.2e} is allowed")
    return out


def _check_residual(attended: Tensor, last: Tensor) -> None:
    """Between all layouts, against float64."""
    kernels = torch.ops.ccnet_d2
    gamma = torch.full((1,), GAMMA, device=attended.device)
    exact, exact_last = attended.cpu().double(), last.cpu().double()
    for x in (last, last.cpu().contiguous().to(last.device)):
        for channels_last in (True, False):
            out = kernels.gated_residual_forward(attended, gamma, x, channels_last)
            if not (out.movedim(1, -1) if channels_last else out).is_contiguous():
                raise CheckFailed("the residual's result is not laid out as asked for")
            _check_rounded("the residual", out, exact_last + GAMMA * exact)
        grad_attended, grad_gamma = kernels.gated_residual_backward(x, attended, gamma)
        _check_rounded("the residual's gradient", grad_attended, GAMMA * exact_last)
        products = exact_last * exact
        error = (grad_gamma.cpu().double() - products.sum()).abs()
        if not error <= SUM_TOLERANCE * products.abs().sum():
            raise CheckFailed(f"gamma's gradient is off by {float(error):.2e}")
        copy = kernels.to_channels_last(x)
        if not (copy.movedim(1, -1).is_contiguous() and torch.equal(copy.cpu(), last.cpu())):
            raise CheckFailed("a channels-last copy differs")


def _check_rounded(name: str, got: Tensor, exact: Tensor) -> None:
    """Each number must be what float64 gives, rounded once."""
    info = torch.finfo(got.dtype)
    allowed = ROUNDINGS * info.eps / 2 * exact.abs().clamp_min(info.tiny)
    if not ((got.cpu().double() - exact).abs() <= allowed).all():
        raise CheckFailed(f"{name} is off by more than a rounding")
