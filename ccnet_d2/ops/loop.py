"""One loop of the criss-cross layer as one step of autograd: projection, attention and gated residual.

Put together by autograd, the three would keep the same tensors for the backward pass, but the gradient of x would be a
sum of two maps made apart. Here the projection's part is added in place to a copy of the residual's. And here the
layouts in memory are chosen: the map between two loops can be channels-last, as the attention reads it, where the input
and the output of the layer are NCHW.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes.
"""

from typing import Any

import torch
from torch import Tensor

from . import compiled, fp32_products, packed
from .aligned_rows import has_aligned_rows, with_aligned_rows
from .autocast import autocast_disabled, autocasts, compute_dtype
from .backends import automatic_backend_on
from .layout import channel_sums, is_channels_last, is_dense, on_huge_pages, to_channels_last
from .projection import (
    add_input_gradient,
    better_in_fp32,
    input_gradient,
    project,
    weight_gradient,
)
from .residual import gated_residual, residual_gradients
from .transforms import is_traced, is_transformed, refuse_batches


def supports_loop(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, backend: str) -> bool:
    """Whether `criss_cross_loop` computes the loop for these tensors where this backend is asked for."""
    device = x.device
    if (
        backend not in ("auto", "compiled")
        or compiled.unavailable_reason(device) is not None
        or x.numel() == 0
    ):
        return False
    dtype = compute_dtype(x)
    return (
        compiled.unsupported_reason(device, dtype) is None
        and (backend == "compiled" or automatic_backend_on(device, dtype) == "compiled")
        and x.dtype in (dtype, torch.float32)
        and (weight.dtype == x.dtype or autocasts(x))
        and not is_transformed(x, weight, bias, gamma)
    )


def criss_cross_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    key_channels: int,
    *,
    channels_last: bool | None = None,
) -> Tensor:
    """`x + gamma * attention(q, k, v)` by the compiled operator, where (q, k, v) is the projection of x.

    Args:
        x: (B, C, *S).
        weight: (2C' + C, C), rows of query, key and value one after the other.
        bias: (2C' + C,).
        gamma: one number, (1,).
        key_channels: C'.
        channels_last: how the result is to lie in memory, channels-last or NCHW; like x if None.

    Returns:
        (B, C, *S), of x's dtype. Inside autocast the projection and the attention run in its dtype.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    tensors = (x, weight, bias, gamma)
    # In a trace the operators are differentiable one by one as well.
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not is_traced():
        out: Tensor = _Loop.apply(*tensors, key_channels, compute_dtype(x), channels_last)
        return out
    return loop_without_gradients(*tensors, key_channels, compute_dtype(x), channels_last)


def loop_without_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    key_channels: int,
    dtype: torch.dtype,
    channels_last: bool | None = None,
) -> Tensor:
    """`criss_cross_loop`, its projection and attention in `dtype`."""
    # Nothing else of it is held: the projection is freed before the result is made.
    attended, read = _attend(x, weight, bias, key_channels, dtype)[1::2]
    return _add_residual(attended, gamma, x, read, channels_last)


def _attend(
    x: Tensor, weight: Tensor, bias: Tensor, key_channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The projection, the attended map, the log-sum-exps, and x as the projection has read it."""
    read = with_aligned_rows(x.to(dtype))
    projected = project(read, weight.to(dtype), bias.to(dtype))
    attended, lse = packed.forward(projected, key_channels)
    return projected, attended, lse, read


def _add_residual(
    attended: Tensor, gamma: Tensor, x: Tensor, read: Tensor, channels_last: bool | None
) -> Tensor:
    """`gated_residual`, from a copy of x where that lies in memory as `attended` does."""
    if channels_last is None and is_dense(x):
        channels_last = not x.is_contiguous()
    return gated_residual(attended, gamma, read if read.dtype == x.dtype else x, channels_last=channels_last)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor,
        key_channels: int,
        dtype: torch.dtype,
        channels_last: bool | None,
    ) -> Tensor:
        projected, attended, lse, read = _attend(x, weight, bias, key_channels, dtype)
        ctx.save_for_backward(x, weight, gamma, projected, attended, lse)
        ctx.key_channels = key_channels
        ctx.bias_dtype = bias.dtype
        return _add_residual(attended, gamma, x, read, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batches(grad)
        saved = ctx.saved_tensors  # asked for once: whoever keeps them elsewhere may give them once
        with torch.no_grad():  # steps in place would have errors of their own for a second derivative
            grads = _gradients(ctx, saved, grad)
        x, weight, gamma, *_ = saved
        return *refusing_second_derivatives(grads, (grad, x, weight, gamma)), None, None, None


def _gradients(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias and gamma."""
    x, weight, gamma, projected, attended, lse = saved
    need_x, need_weight, need_bias, need_gamma, *_ = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = grad_gamma = None
    if not is_dense(grad):
        grad = grad.contiguous()
    grad_attended, grad_gamma = residual_gradients(grad, attended, gamma)
    if need_x or need_weight or need_bias:
        grads = packed.backward(grad_attended, projected, ctx.key_channels, attended, lse)
        del grad_attended
        needed = (need_x, need_weight, need_bias)
        # The dtype is the forward pass's, whatever autocast says where the backward pass runs.
        with autocast_disabled(grad.device):
            grad_x, grad_weight, grad_bias = projection_gradients(
                needed, grad, grads, x, weight, ctx.bias_dtype
            )
    return grad_x, grad_weight, grad_bias, grad_gamma if need_gamma else None


def projection_gradients(
    needed: tuple[bool, bool, bool],
    grad: Tensor,
    grads: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the loop's input, and of the projection's weight and bias; None for what is not needed.

    Args:
        needed: which of the three.
        grad: (B, C, *S), of the loop's result.
        grads: (B, 2C' + C, *S), of the projection.
        x: (B, C, *S).
        weight: (2C' + C, C).
        bias_dtype: that the bias has.
    """
    grad_x = grad_weight = grad_bias = None
    need_x, need_weight, need_bias = needed
    if need_weight:
        grad_weight = weight_gradient(grads, x.to(grads.dtype)).to(weight.dtype)
    if need_bias:
        grad_bias = channel_sums(grads).to(bias_dtype)
    if need_x:
        grad_x = _input_gradient(grad, grads, weight.to(grads.dtype), x)
    return grad_x, grad_weight, grad_bias


def _input_gradient(grad: Tensor, grads: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The sum of the residual's part, which is `grad`, and the projection's; on CPU laid out in memory like x."""
    if grad.dtype == grads.dtype and better_in_fp32(grad):
        return _input_gradient(grad.float(), grads.float(), weight.float(), x).to(grad.dtype)
    # Elsewhere another layout is another pass, which whoever reads the gradient may not need.
    channels_last = is_channels_last(x if x.device.type == "cpu" and is_dense(x) else grad)
    if grad.dtype == grads.dtype and fp32_products.pays(grads, weight):
        return fp32_products.input_gradient(grads, weight, grad, channels_last=channels_last)
    same_layout = is_channels_last(grad) == channels_last
    if grad.dtype == grads.dtype and (channels_last or (same_layout and has_aligned_rows(grad))):
        total = on_huge_pages(torch.empty_like(grad)).copy_(grad) if same_layout else to_channels_last(grad)
        add_input_gradient(total, grads, weight)
        return total
    one = torch.ones(1, dtype=grad.dtype, device=grad.device)
    return gated_residual(input_gradient(grads, weight), one, grad, channels_last=channels_last)


def refusing_second_derivatives(
    grads: tuple[Tensor | None, ...], sources: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients, with an error waiting for whoever differentiates them with respect to `sources`.

    What a step of autograd keeps beside its inputs carries no history: without this a second derivative would be wrong
    instead of refused.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads  # no second derivative is being prepared, and compiled graphs refuse it by themselves
    return tuple(None if grad is None else _Refuse.apply(grad, *sources) for grad in grads)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        compiled.refuse_second_derivative(ctx, *grads)
