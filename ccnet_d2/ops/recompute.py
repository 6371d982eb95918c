"""One loop of the criss-cross layer that keeps nothing but its input for the backward pass.

The backward pass computes query and key again, and then the value and the attended map in chunks of channels: given
query and key, attention is linear in the value, so that a chunk is projected, attended and differentiated without the
others. Beside maps that are there anyhow (the input, the gradients of output and input) it holds query, key, the
gradient of the projection and three maps of one chunk. The price is one more projection, one more attention, and the
energies once for each chunk.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import compiled
from .autocast import autocast_disabled, compute_dtype, refuse_mixed_dtypes
from .backends import automatic_backend_on, require_compiled, select_backend
from .layout import is_dense, on_huge_pages
from .loop import loop_without_gradients, projection_gradients, refusing_second_derivatives
from .packed import split
from .projection import project
from .residual import gated_residual, residual_gradients
from .transforms import is_transformed, refuse_batches

_CHUNK_MULTIPLE = 16  # channels; fewer do not fill the vectors of the kernels

Pullback = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def recomputed_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    key_channels: int,
    *,
    chunks: int,
    backend: str = "auto",
) -> Tensor:
    """`x + gamma * attention(q, k, v)`, where (q, k, v) is the projection of x.

    Args:
        x: (B, C, *S).
        weight: (2C' + C, C), rows of query, key and value one after the other.
        bias: (2C' + C,).
        gamma: one number, (1,).
        key_channels: C'.
        chunks: how many chunks the backward pass works on the C channels in, at most; each has a multiple of 16.
        backend: see `ccnet_d2.ops.criss_cross_attention`.

    Returns:
        (B, C, *S), of x's dtype. Inside autocast the projection and the attention run in its
        dtype, and their gradients too.

    Raises:
        RuntimeError: a second or forward-mode derivative or a transform of torch.func is asked for, or the named
            backend cannot run here.
        ValueError: dtypes do not fit together, or the backend is unknown.
    """
    if is_transformed(x, weight, bias, gamma):
        raise RuntimeError(
            "A layer with recompute has no forward-mode derivative and follows no transform of torch.func: "
            "use recompute=False there."
        )
    dtype = compute_dtype(x)
    if backend == "auto":
        backend = automatic_backend_on(x.device.type, dtype)
    if backend == "compiled":
        require_compiled(x.device.type, dtype)
    refuse_mixed_dtypes(x, weight)
    out: Tensor = _RecomputedLoop.apply(x, weight, bias, gamma, key_channels, chunks, backend, dtype)
    return out


class _RecomputedLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor,
        key_channels: int,
        chunks: int,
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gamma)
        ctx.key_channels, ctx.chunks, ctx.backend, ctx.dtype = key_channels, chunks, backend, dtype
        if backend == "compiled":
            return loop_without_gradients(x, weight, bias, gamma, key_channels, dtype)
        parts = split(project(x.to(dtype), weight.to(dtype), bias.to(dtype)), key_channels)
        return gated_residual(select_backend(backend, *parts)(*parts), gamma, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batches(grad)
        # Here too the dtype is the forward pass's, whatever autocast says where the backward pass runs.
        with autocast_disabled(grad.device):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, gamma = ctx.saved_tensors
    need_x, need_weight, need_bias, need_gamma, *_ = ctx.needs_input_grad
    if not is_dense(grad):
        grad = grad.contiguous()  # so that its chunks are read in place
    x_low, w, b = x.to(ctx.dtype), weight.to(ctx.dtype), bias.to(ctx.dtype)
    grads = None
    if need_x or need_weight or need_bias:
        grads = on_huge_pages(x_low.new_empty((x.shape[0], *x.shape[2:], w.shape[0]))).movedim(-1, 1)
    grad_gamma = _attention_gradients(ctx, grad, x_low, w, b, gamma, grads)
    grad_x = grad_weight = grad_bias = None
    if grads is not None:
        grad_x, grad_weight, grad_bias = projection_gradients(
            (need_x, need_weight, need_bias), grad, grads, x_low, weight, bias.dtype
        )
    result = (grad_x, grad_weight, grad_bias, grad_gamma if need_gamma else None)
    return *refusing_second_derivatives(result, (grad, x, weight, bias, gamma)), *(None,) * 4


def _attention_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, grads: Tensor | None
) -> Tensor:
    """The gradient of gamma; that of the projection, (B, 2C' + C, *S), goes into `grads` unless it is None."""
    query_and_key = slice(0, 2 * ctx.key_channels)
    query, key = project(x, weight[query_and_key], bias[query_and_key]).chunk(2, dim=1)
    # Sums over the chunks, in fp32 at least.
    grad_gamma = torch.zeros_like(gamma, dtype=torch.promote_types(gamma.dtype, torch.float32))
    total = None
    if grads is not None:
        total_dtype = torch.promote_types(grads.dtype, torch.float32)
        total = grads[:, query_and_key]
        total = (total if total.dtype == total_dtype else torch.empty_like(total, dtype=total_dtype)).zero_()
    for channels, rows in _chunks(x.shape[1], ctx.key_channels, ctx.chunks):
        attended, pullback = _attend(query, key, project(x, weight[rows], bias[rows]), ctx.backend)
        grad_attended, grad_of_chunk = residual_gradients(grad[:, channels], attended, gamma)
        grad_gamma += grad_of_chunk
        if grads is not None and total is not None:
            grad_query, grad_key = pullback(grad_attended, grads[:, rows])
            total[:, : ctx.key_channels].add_(grad_query)
            total[:, ctx.key_channels :].add_(grad_key)
            del grad_query, grad_key
        del attended, pullback, grad_attended  # before the next chunk's are made
    if grads is not None and total is not None and total.dtype != grads.dtype:
        grads[:, query_and_key].copy_(total)
    return grad_gamma.to(gamma.dtype)


def _chunks(channels: int, key_channels: int, count: int) -> Iterator[tuple[slice, slice]]:
    """For each chunk its channels in the map, and its rows in the projection's weight."""
    size = -(-channels // count)
    size = -(-size // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
    for first in range(0, channels, size):
        last = min(first + size, channels)
        yield slice(first, last), slice(2 * key_channels + first, 2 * key_channels + last)


def _attend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Pullback]:
    """The attended map, and what takes its gradient to those of query and key and writes that of value."""
    if backend == "compiled":
        return compiled.attention_with_pullback(query, key, value)
    attend = select_backend(backend, query, key, value)
    out, vjp = torch.func.vjp(attend, query, key, value)[:2]

    def pullback(grad: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor]:
        grad_query, grad_key, grad_of_value = vjp(grad)
        grad_value.copy_(grad_of_value)
        return grad_query, grad_key

    return out, pullback
