"""The compiled criss-cross op: the only module that uses the binaries, and that says why they are missing.

The libraries register two operators, `ccnet_d2::criss_cross_forward` and `ccnet_d2::criss_cross_backward`, for CPU
(`_C_cpu`, which also holds their schemas) and for CUDA (`_C_cuda`). What torch needs to know of them besides their
kernels (shapes without data, gradients, FLOPs) is registered here, in Python.

Nothing of size N x (H+W) is kept for the backward pass, which recomputes the attention weights from query, key and
the log-sum-exp of each position's energies. Results are bitwise equal between runs and do not depend on the number of
threads. Outputs are channels-last in memory whatever the inputs are, since the kernels work on channels-last lines.
On CPU, weights below 1e-24 of a line's largest are 0 in precisions below fp64: subnormal numbers are slow there.
Autocast does not touch the op: like the other backends it returns the dtype it is given.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, library

from . import _library
from .transforms import is_transformed

Device = torch.device | str  # "cuda" is the current GPU; those of one machine may differ

_DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

_LEAST_CAPABILITY = 8  # of a GPU, its first number
_FP32_CAPABILITY = (9, 0)

_OPERATORS = (
    "cpu_instruction_set",
    "criss_cross_backward",
    "criss_cross_backward_into",
    "criss_cross_forward",
    "criss_cross_forward_into",
    "criss_cross_packed_backward",
    "criss_cross_packed_forward",
    "gated_residual_backward",
    "gated_residual_forward",
    "gated_residual_forward_into",
    "has_fp32_products",
    "projection_forward",
    "projection_forward_into",
    "projection_input_gradient",
    "projection_input_gradient_into",
    "projection_weight_gradient",
    "to_channels_last",
    "use_huge_pages",
)

_CPU_REASON = _library.load("_C_cpu", operators=_OPERATORS)
_CUDA_REASON = _library.load(
    "_C_cuda",
    required=None
    if _CPU_REASON is None
    else "the CUDA extension needs the CPU one, which defines the operators: " + _CPU_REASON,
)


def is_available() -> bool:
    """Whether the compiled operator runs here, on CPU at least."""
    return _CPU_REASON is None


def unavailable_reason(device: Device = "cpu") -> str | None:
    """Why the compiled operator does not run on this device, as one sentence; None where it does."""
    kind = torch.device(device).type
    if kind == "cpu":
        return _CPU_REASON
    if kind == "cuda":
        return _CUDA_REASON if _CUDA_REASON is not None else _old_gpu_reason(device)
    return f"the compiled operator runs on CPU and CUDA, not on {kind!r}."


def _old_gpu_reason(device: Device) -> str | None:
    """Why the kernels do not run on this GPU; None as well where none is known.

    An old GPU that a compiled graph runs on is named by the operator then.
    """
    gpu = _gpu(device)
    if gpu is None or gpu.major >= _LEAST_CAPABILITY:
        return None
    return (
        f"the CUDA extension needs a GPU of compute capability {_LEAST_CAPABILITY}.0 or later, "
        f"the {gpu.name} has {gpu.major}.{gpu.minor}."
    )


def pays_in_fp32_on_gpu(device: Device) -> bool:
    """Whether the fp32 kernels are at least as fast as batched products on this GPU; False where none is known.

    They were found to be so on GPUs of compute capability 9.0, and need half the memory. Where TF32 products are
    allowed they were not compared: whoever allows them wants less exact and faster ones.
    """
    gpu = _gpu(device)
    if gpu is None or (gpu.major, gpu.minor) != _FP32_CAPABILITY:
        return False
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision != "tf32"


def _gpu(device: Device) -> Any:
    """The properties of this GPU; None where none is in use yet, and while torch.compile traces, which would follow
    this."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.get_device_properties(device)


def instruction_set(dtype: torch.dtype) -> str | None:
    """The CPU kernels chosen for inputs of `dtype` ("portable", "avx2", "avx512", "avx512_bf16",
    "amx"); None without a library."""
    if _CPU_REASON is not None:
        return None
    name: str = torch.ops.ccnet_d2.cpu_instruction_set(str(dtype).removeprefix("torch."))
    return name


def unsupported_reason(device: Device, dtype: torch.dtype) -> str | None:
    """Why the compiled operator does not run on this device in this dtype; None where it does."""
    reason, kind = unavailable_reason(device), torch.device(device).type
    if reason is None and dtype not in _DTYPES[kind]:
        reason = f"the compiled operator has no {dtype} kernel on {kind}."
    return reason


def supports(*inputs: Tensor) -> str | None:
    """Why the compiled operator does not run for these inputs, as one sentence; None where it does."""
    reason = unsupported_reason(inputs[0].device, inputs[0].dtype)
    if reason is None and is_transformed(*inputs):
        reason = (
            "the compiled operator has no forward-mode derivative and follows no transform of torch.func: "
            "use backend='matmul' there."
        )
    return reason


def runs_on_cpu(*inputs: Tensor) -> bool:
    """Whether these are inputs that the CPU library's operators run for."""
    return inputs[0].device.type == "cpu" and supports(*inputs) is None


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See `ccnet_d2.ops.criss_cross_attention`; the output is channels-last in memory.

    Raises:
        RuntimeError: the library is missing, the inputs do not fit together, or a second or forward-mode derivative or
            a transform of torch.func is asked for.
    """
    refuse_unsupported(query, key, value)
    # Copied here and not by the operators, NCHW inputs are copied once for both passes.
    inputs = (
        x if x.dim() < 3 or x.stride(1) == 1 or x.shape[1] == 1 else channels_last_copy(x)
        for x in (query, key, value)
    )
    out: Tensor = torch.ops.ccnet_d2.criss_cross_forward(*inputs)[0]
    return out


def channels_last_copy(x: Tensor) -> Tensor:
    """(B, C, *S) channels-last in memory; differentiable."""
    if supports(x) is None and (x.device.type == "cpu" or x.is_contiguous()):
        copy: Tensor = torch.ops.ccnet_d2.to_channels_last(x)
        return copy
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def refuse_unsupported(*inputs: Tensor) -> None:
    """Raises a RuntimeError where the compiled operator does not run for these inputs."""
    reason = supports(*inputs)
    if reason is not None:
        raise RuntimeError(reason)


def attention_with_pullback(
    query: Tensor, key: Tensor, value: Tensor, room: Tensor
) -> tuple[Tensor, Callable[[Tensor, Tensor, bool], None]]:
    """The attended map, and a function that takes its gradient to those of query, key and value.

    Args:
        query: (B, C', *S).
        key: (B, C', *S).
        value: (B, C, *S).
        room: where the gradient of value is written, and on CPU the map before: (B, C, *S), all or some channels of a
            channels-last tensor.

    Returns:
        The map, and the function: of its gradient, of where the gradients of query and key go, one after the other in
        (B, 2C', *S), some channels of a channels-last tensor, and of whether they are added to what is there.
    """
    if reuses_memory(room):
        out, lse = room, torch.ops.ccnet_d2.criss_cross_forward_into(query, key, value, room)
    else:
        out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)

    def pullback(grad: Tensor, total: Tensor, accumulate: bool) -> None:
        refuse_unsupported(grad)
        # Sums in a wider dtype are not the kernels' to write.
        wider = total.dtype != query.dtype
        part = empty_channels_last(total, query.dtype) if wider else total
        grad_query, grad_key = part.chunk(2, dim=1)
        torch.ops.ccnet_d2.criss_cross_backward_into(
            grad, query, key, value, out, lse, grad_query, grad_key, room, accumulate and not wider
        )
        if wider:
            write_or_add(total, part, accumulate)

    return out, pullback


def reuses_memory(x: Tensor) -> bool:
    """Whether operators here may be given one piece of memory of x for two uses, one after the other.

    The CUDA kernels write to memory of their own, and a graph would not see what comes first.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def write_or_add(total: Tensor, part: Tensor, accumulate: bool) -> None:
    """Add `part` to `total`, or have it replace what is there."""
    if accumulate:
        total.add_(part)
    else:
        total.copy_(part)


def backward_and_copy(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    accumulate: bool,
) -> None:
    """`criss_cross_backward_into` where the kernels write the gradients to memory of their own."""
    grads = torch.ops.ccnet_d2.criss_cross_backward(grad_out, query, key, value, out, lse)
    write_or_add(grad_query, grads[0], accumulate)
    write_or_add(grad_key, grads[1], accumulate)
    grad_value.copy_(grads[2])


def empty_channels_last(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor of this shape, channels-last in memory, and of this dtype unless another is given."""
    batch, channels, *spatial = like.shape
    return like.new_empty((batch, *spatial, channels), dtype=dtype).movedim(-1, 1)


def empty_statistic(like: Tensor) -> Tensor:
    """A new (B, *S) tensor for the log-sum-exp: fp32, or fp64 where `like`, (B, c, *S), is."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((like.shape[0], *like.shape[2:]), dtype=dtype)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return empty_channels_last(value), empty_statistic(query)


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_channels_last(query), empty_channels_last(key), empty_channels_last(value)


def _forward_into_fake(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
    return empty_statistic(query)


def _backward_into_fake(*arguments: Tensor | bool) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    refuse_unsupported(grad_out)
    query, key, value, out, lse = ctx.saved_tensors
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.ccnet_d2.criss_cross_backward(
        grad_out, query, key, value, out, lse
    )
    return grads


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The gradient of a gradient: an error that says what to do."""
    raise RuntimeError(
        "The compiled criss-cross attention has no second derivative, nor has a layer with recompute: "
        "use backend='matmul' and recompute=False where gradients of gradients are needed."
    )


def forward_flops(query: torch.Size, key_channels: int, channels: int) -> int:
    """Floating-point operations of the forward pass for a query, or any tensor of its batch and sizes."""
    return 2 * _query_key_pairs(query) * (key_channels + channels)


def backward_flops(query: torch.Size, key_channels: int, channels: int) -> int:
    """The same of the backward pass, which computes the energies again."""
    return 2 * _query_key_pairs(query) * (3 * key_channels + 2 * channels)


def _query_key_pairs(query: torch.Size) -> int:
    """B * N * (sum of the line lengths): the masked pairs are multiplied too."""
    return query[0] * prod(query[2:]) * sum(query[2:])


def _forward_formula(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return forward_flops(query, query[1], value[1])


def _backward_formula(
    grad_out: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return backward_flops(query, query[1], value[1])


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    forward = "ccnet_d2::criss_cross_forward"
    backward = "ccnet_d2::criss_cross_backward"
    library.register_fake(forward, _forward_fake)
    library.register_fake(backward, _backward_fake)
    library.register_fake(f"{forward}_into", _forward_into_fake)
    library.register_fake(f"{backward}_into", _backward_into_fake)
    library.register_kernel(f"{backward}_into", "cuda", backward_and_copy)
    library.register_autograd(forward, _differentiate, setup_context=_save)
    library.register_autograd(backward, refuse_second_derivative)
    library.register_fake("ccnet_d2::to_channels_last", empty_channels_last)
    library.register_autograd("ccnet_d2::to_channels_last", lambda ctx, grad: grad)
    register_flop_formula(torch.ops.ccnet_d2.criss_cross_forward)(_forward_formula)
    register_flop_formula(torch.ops.ccnet_d2.criss_cross_forward_into)(_forward_formula)
    register_flop_formula(torch.ops.ccnet_d2.criss_cross_backward)(_backward_formula)
    register_flop_formula(torch.ops.ccnet_d2.criss_cross_backward_into)(_backward_formula)


if _CPU_REASON is None:
    _register()
