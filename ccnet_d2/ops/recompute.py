"""Loops of the criss-cross layer that keep little for the backward pass: their input and the maps between them.

The backward pass computes query and key of a loop again, and then the value and the attended map in chunks of channels:
given query and key, attention is linear in the value, so that a chunk is projected, attended and differentiated without
the others. The price is one more projection, one more attention, and the energies once for each chunk.

Of two loops, the backward pass holds one map (that between them, whose place its gradient takes, and then the input's),
the gradient of the projection, query and key, and one map of a chunk (the attended map's gradient). Where memory can
have two uses, the others lie where gradients of values come later: a chunk's attended map in its own place, its value
in that of chunks after it.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import compiled
from .aligned_rows import with_aligned_rows
from .autocast import autocast_disabled, compute_dtype, refuse_mixed_dtypes
from .backends import automatic_backend_on, require_compiled, select_backend
from .chunks import backward_chunks, forward_chunks
from .layout import is_channels_last, is_dense, on_huge_pages, to_channels_second
from .loop import loop_without_gradients, projection_gradients, refusing_second_derivatives
from .packed import split
from .projection import input_gradient_into, project, project_into
from .residual import gated_residual, gated_residual_into, residual_gradients
from .transforms import is_transformed, refuse_batches

Pullback = Callable[[Tensor, Tensor, bool], None]


@dataclass(frozen=True)
class _Layer:
    """What every loop is computed with."""

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    key_channels: int
    chunks: int
    backend: str
    dtype: torch.dtype  # of the projection and the attention

    def low(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and bias in the dtype that is computed in, and x laid out for products."""
        return with_aligned_rows(x.to(self.dtype)), self.weight.to(self.dtype), self.bias.to(self.dtype)

    def query_and_key(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """Their projection."""
        rows = slice(0, 2 * self.key_channels)
        return project(x, weight[rows], bias[rows]).chunk(2, dim=1)

    def rows(self, channels: slice) -> slice:
        """Those of the projection's weight that make these channels of the value."""
        return slice(2 * self.key_channels + channels.start, 2 * self.key_channels + channels.stop)


def recomputed_loops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    key_channels: int,
    *,
    loops: int = 1,
    chunks: int,
    backend: str = "auto",
) -> Tensor:
    """`x + gamma * attention(q, k, v)`, where (q, k, v) is the projection of x, `loops` times over.

    Args:
        x: (B, C, *S).
        weight: (2C' + C, C), rows of query, key and value one after the other.
        bias: (2C' + C,).
        gamma: one number, (1,).
        key_channels: C'.
        loops: how many, each on the result of the one before.
        chunks: how many chunks the backward pass works on the C channels in, at most; the forward pass takes as many
            as it needs to hold no more than that.
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
        backend = automatic_backend_on(x.device, dtype)
    if backend == "compiled":
        require_compiled(x.device, dtype)
    refuse_mixed_dtypes(x, weight)
    settings = key_channels, chunks, backend, dtype
    if torch.compiler.is_compiling():  # a graph holds each loop as a step of its own
        for _ in range(loops):
            x = _RecomputedLoops.apply(x, weight, bias, gamma, 1, *settings)
        return x
    out: Tensor = _RecomputedLoops.apply(x, weight, bias, gamma, loops, *settings)
    return out


class _RecomputedLoops(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor,
        loops: int,
        key_channels: int,
        chunks: int,
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.settings = settings = key_channels, chunks, backend, dtype
        layer = _Layer(weight, bias, gamma, *settings)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x, weight, bias, gamma)
            return _whole_loop(x, layer)
        *between, out = _loops(x, layer, loops)
        ctx.save_for_backward(x, weight, bias, gamma, *between)
        ctx.written_over = False
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batches(grad)
        x, weight, bias, gamma, *between = ctx.saved_tensors
        layer = _Layer(weight, bias, gamma, *ctx.settings)
        # Here too the dtype is the forward pass's, whatever autocast says where the backward pass runs.
        with torch.no_grad(), autocast_disabled(grad.device):
            if between and ctx.written_over:  # by a backward pass before this one
                again = _loops(x, layer, len(between) + 1)
                between = list(islice(again, len(between)))
            elif between:
                ctx.written_over = True
                # What is written to these does not count as a change of what is saved: the mark above sees to it.
                between = [saved.data for saved in between]
            result = _gradients(grad, [x, *between], layer, ctx.needs_input_grad[:4])
        return *refusing_second_derivatives(result, (grad, x, weight, bias, gamma)), *(None,) * 5


def _whole_loop(x: Tensor, layer: _Layer) -> Tensor:
    """For graphs, which hold no chunks: what they keep and free they see to themselves."""
    if layer.backend == "compiled":
        parameters = layer.weight, layer.bias, layer.gamma
        return loop_without_gradients(x, *parameters, layer.key_channels, layer.dtype)
    parts = split(project(*layer.low(x)), layer.key_channels)
    return gated_residual(select_backend(layer.backend, *parts)(*parts), layer.gamma, x)


def _loops(x: Tensor, layer: _Layer, loops: int) -> Iterator[Tensor]:
    """The result of each loop, on CPU the last of them in memory like x."""
    ends_nchw = x.device.type == "cpu" and not is_channels_last(x)
    for loop in range(1, loops + 1):
        # Attention reads and writes channels-last maps, and on GPUs another layout is another pass.
        x = _loop(x, layer, channels_last=loop < loops or not ends_nchw)
        yield x


def _loop(x: Tensor, layer: _Layer, *, channels_last: bool) -> Tensor:
    """One loop in chunks; the result lies in memory channels-last or NCHW."""
    if not is_dense(x):
        x = x.contiguous()  # so that its chunks are read in place
    out = on_huge_pages(compiled.empty_channels_last(x) if channels_last else x.new_empty(x.shape))
    x_low, weight, bias = layer.low(x)
    query, key = layer.query_and_key(x_low, weight, bias)
    attend = select_backend(layer.backend, query, key, x_low)
    for channels in forward_chunks(x.shape[1], layer.key_channels, layer.chunks):
        rows = layer.rows(channels)
        attended = attend(query, key, project(x_low, weight[rows], bias[rows]))
        gated_residual_into(attended, layer.gamma, x[:, channels], out[:, channels])
        del attended  # before the next chunk's is made
    return out


def _gradients(
    grad: Tensor, maps: list[Tensor], layer: _Layer, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias and gamma as far as `needed`; `maps` are the inputs of the loops, first of all x."""
    need_x, need_weight, need_bias, need_gamma = needed
    if not is_dense(grad):
        grad = grad.contiguous()  # so that its chunks are read in place
    sums: list[Tensor | None] = [None, None, None]
    own = False  # whether the gradient may be written over
    while maps:
        x = maps.pop()
        room = grad if own else x if maps else None
        grad_x, *others = _loop_gradients(
            grad, x, layer, (need_x or len(maps) > 0, need_weight, need_bias), room
        )
        sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, others, strict=True)]
        if grad_x is not None:
            grad, own = grad_x, True
    if need_x and x.device.type == "cpu" and x.is_contiguous():
        grad = to_channels_second(grad)  # like x, as whoever made that reads its gradient best
    grad_weight, grad_bias, grad_gamma = sums
    return grad if need_x else None, grad_weight, grad_bias, grad_gamma if need_gamma else None


def _loop_gradients(
    grad: Tensor, x: Tensor, layer: _Layer, needed: tuple[bool, bool, bool], room: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Those of x, weight and bias as far as `needed`, and of gamma.

    That of x is written to `room`, which may be `grad` or x, if there is one.
    """
    x_low, weight, bias = layer.low(x)
    grads = on_huge_pages(x_low.new_empty((x.shape[0], *x.shape[2:], weight.shape[0]))).movedim(-1, 1)
    grad_gamma = _attention_gradients(grad, x_low, weight, bias, layer, grads, gamma_alone=not any(needed))
    if room is None or not needed[0]:
        of_projection = projection_gradients(needed, grad, grads, x_low, layer.weight, layer.bias.dtype)
        return *of_projection, grad_gamma
    _, *others = projection_gradients(
        (False, *needed[1:]), grad, grads, x_low, layer.weight, layer.bias.dtype
    )
    del x_low
    input_gradient_into(room, grad, grads, weight)
    return room, *others, grad_gamma


def _attention_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    layer: _Layer,
    grads: Tensor,
    *,
    gamma_alone: bool,
) -> Tensor:
    """The gradient of gamma; that of the projection, (B, 2C' + C, *S), goes into `grads` unless gamma's is all."""
    query, key = layer.query_and_key(x, weight, bias)
    # Sums over the chunks, in fp32 at least.
    grad_gamma = torch.zeros_like(layer.gamma, dtype=torch.promote_types(layer.gamma.dtype, torch.float32))
    narrow = grads[:, : 2 * layer.key_channels]
    total_dtype = torch.promote_types(grads.dtype, torch.float32)
    total = narrow if narrow.dtype == total_dtype else compiled.empty_channels_last(narrow, total_dtype)
    for channels in backward_chunks(x.shape[1], layer.chunks):
        rows = layer.rows(channels)
        value = _value(x, weight[rows], bias[rows], grads[:, rows.stop :], layer.backend)
        attended, pullback = _attend(query, key, value, grads[:, rows], layer.backend)
        grad_attended, grad_of_chunk = residual_gradients(grad[:, channels], attended, layer.gamma)
        grad_gamma += grad_of_chunk
        if not gamma_alone:
            pullback(grad_attended, total, channels.start > 0)
        del value, attended, pullback, grad_attended  # before the next chunk's are made
    if total is not narrow:
        narrow.copy_(total)
    return grad_gamma.to(layer.gamma.dtype)


def _value(x: Tensor, weight: Tensor, bias: Tensor, later: Tensor, backend: str) -> Tensor:
    """A chunk's value, which may lie in `later`, room of the chunks after it, if it fits there."""
    channels = weight.shape[0]
    if later.shape[1] < channels or backend != "compiled" or not compiled.reuses_memory(later):
        return project(x, weight, bias)
    value = later[:, :channels]
    project_into(value, x, weight, bias)
    return value


def _attend(query: Tensor, key: Tensor, value: Tensor, room: Tensor, backend: str) -> tuple[Tensor, Pullback]:
    """See `compiled.attention_with_pullback`."""
    if backend == "compiled":
        return compiled.attention_with_pullback(query, key, value, room)
    attend = select_backend(backend, query, key, value)
    out, vjp = torch.func.vjp(attend, query, key, value)[:2]

    def pullback(grad: Tensor, total: Tensor, accumulate: bool) -> None:
        grad_query, grad_key, grad_value = vjp(grad)
        for place, part in zip(total.chunk(2, dim=1), (grad_query, grad_key), strict=True):
            compiled.write_or_add(place, part, accumulate)
        room.copy_(grad_value)

    return out, pullback
