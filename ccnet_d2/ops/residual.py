"""The layer's last step, `x + gamma * attended`, between memory layouts.

The attention's output is channels-last in memory, and x mostly is not: added up by PyTorch, one of the two is read
against the grain. The compiled libraries do it in one blocked pass, and write the sum in the layout that is wanted
next; without them PyTorch does.
"""

from typing import Any

import torch
from torch import Tensor, library

from . import compiled
from .layout import has_even_rows, is_dense, to_channels_last

_HALF = (torch.float16, torch.bfloat16)


def gated_residual(
    attended: Tensor, gamma: Tensor, x: Tensor, *, channels_last: bool | None = None
) -> Tensor:
    """`x + gamma * attended`.

    Args:
        attended: (B, C, *S).
        gamma: one number, (1,).
        x: (B, C, *S).
        channels_last: how the result is to lie in memory, channels-last or NCHW; like x if None.

    Returns:
        (B, C, *S).
    """
    if not (_runs_compiled(attended, gamma, x) and is_dense(x)):
        out = gamma.to(attended.dtype) * attended + x
        if channels_last is None:
            return out
        return to_channels_last(out) if channels_last else out.contiguous()
    if channels_last is None:
        channels_last = not x.is_contiguous()
    out = torch.ops.ccnet_d2.gated_residual_forward(attended, gamma.to(_computed(x)), x, channels_last)
    return out


def gated_residual_into(attended: Tensor, gamma: Tensor, x: Tensor, out: Tensor) -> None:
    """`gated_residual`, written to `out`.

    Args:
        attended: (B, c, *S).
        gamma: (1,).
        x: (B, c, *S), all or some channels of a map that is NCHW or channels-last without gaps.
        out: the same of another one, of x's dtype.
    """
    if _runs_compiled(attended, gamma, x):
        torch.ops.ccnet_d2.gated_residual_forward_into(attended, gamma.to(_computed(x)), x, out)
    else:
        torch.addcmul(x, gamma.to(x.dtype), attended, out=out)


def residual_gradients(grad: Tensor, attended: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gated_residual` other than that of x, which is `grad` itself.

    Args:
        grad: (B, c, *S), of the result: all or some channels of a map that is NCHW or channels-last without gaps.
        attended: (B, c, *S).
        gamma: (1,).

    Returns:
        Those of attended and gamma, of their shapes and dtypes.
    """
    if not _runs_compiled(attended, gamma, grad):
        product = grad * attended
        total = product.sum(dtype=torch.promote_types(product.dtype, torch.float32))
        return (gamma.to(attended.dtype) * grad).to(attended.dtype), total.reshape(gamma.shape).to(
            gamma.dtype
        )
    grad_attended, grad_gamma = torch.ops.ccnet_d2.gated_residual_backward(
        grad, attended, gamma.to(_computed(grad))
    )
    return grad_attended, grad_gamma.reshape(gamma.shape).to(gamma.dtype)


def _runs_compiled(attended: Tensor, gamma: Tensor, x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu"
    return (
        compiled.supports(x, attended, gamma) is None
        and attended.shape == x.shape
        and (has_even_rows(attended) or (on_cpu and is_dense(attended)))
        and (attended.dtype == x.dtype or (on_cpu and x.dtype == torch.float32 and attended.dtype in _HALF))
    )


def _computed(x: Tensor) -> torch.dtype:
    """The dtype that gamma is read in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(attended: Tensor, gamma: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    return compiled.empty_channels_last(x) if channels_last else x.new_empty(x.shape)


def _forward_into_fake(attended: Tensor, gamma: Tensor, x: Tensor, out: Tensor) -> None:
    return None


def _backward_fake(grad: Tensor, attended: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return compiled.empty_channels_last(attended), torch.empty_like(gamma)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
    attended, gamma = ctx.saved_tensors
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        return None, None, grad, None
    if not is_dense(grad):
        grad = grad.contiguous()
    return *residual_gradients(grad, attended, gamma), grad, None


if compiled.is_available():
    library.register_fake("ccnet_d2::gated_residual_forward", _forward_fake)
    library.register_fake("ccnet_d2::gated_residual_forward_into", _forward_into_fake)
    library.register_fake("ccnet_d2::gated_residual_backward", _backward_fake)
    library.register_autograd("ccnet_d2::gated_residual_forward", _differentiate, setup_context=_save)
    library.register_autograd("ccnet_d2::gated_residual_backward", compiled.refuse_second_derivative)
