"""The 1x1 convolution and its gradients in fp32 by the compiled library, on processors where PyTorch's products are
slower (docs/performance.md).

On matrix units, which multiply bf16 only: every number is split into three that add up to it, and six products of such
parts are as exact as fp32 arithmetic, in less time. Parts below the smallest bf16 number are 0, and where a result
would be Inf it is Inf or NaN. And on vector units that are not Intel's, whose library PyTorch's is: of those of 512
bits it uses half.

Bitwise equal between runs; the weight's gradient may differ in its last bits with the number of threads.

Shapes: B batch, C channels of the input, O of the output, S spatial sizes, N number of positions.
"""

import os
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from . import compiled
from .autocast import autocasts
from .layout import channel_sums, is_channels_last, is_dense
from .transforms import is_traced, is_transformed


class _Sizes(NamedTuple):
    channels: range
    positions: int  # at least


# That pay, by instruction set: with fewer or more, PyTorch's products are as fast.
_PAYING = {
    "amx": _Sizes(range(192, 1537), 256),
    "avx512": _Sizes(range(32, 4097), 256),
    "avx2": _Sizes(range(32, 1537), 1024),
}
_NONE = _Sizes(range(0), 0)
_LEAST_NUMBERS = 2**15  # positions x channels


def pays(maps: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether products of a map (B, ., *S) with the weight (O, C) run here, and faster than PyTorch's.

    False as well where a gradient of them would be recorded, but for compiled graphs.

    Args:
        maps: the map.
        weight: the weight.
        others: what else takes part (the bias).
    """
    return (
        _pays(maps, *weight.shape)
        and is_dense(maps)
        and weight.is_contiguous()
        and all(map(_is_usable, (maps, weight, *others)))
    )


def pays_for_weight(grad: Tensor, x: Tensor) -> bool:
    """The same for the gradient of the weight, from maps (B, O, *S) and (B, C, *S)."""
    return (
        _pays(x, grad.shape[1], x.shape[1])
        and is_dense(grad)
        and is_dense(x)
        and all(map(_is_usable, (grad, x)))
    )


def _pays(maps: Tensor, outputs: int, channels: int) -> bool:
    # Traced and exported graphs may run on another processor.
    if maps.device.type != "cpu" or not compiled.is_available() or is_traced():
        return False
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
        paying = _PAYING_HERE.channels  # the graph is to take any size
    else:
        paying, least = _paying(os.environ.get("CCNET_CPU_ISA"))
        positions = maps.shape[0] * prod(maps.shape[2:])
        if positions < least or positions * channels < _LEAST_NUMBERS:
            return False
    # Not `in`: of compiled graphs these may be symbols.
    return paying.start <= channels < paying.stop and outputs < paying.stop


@cache
def _paying(instruction_set: str | None) -> _Sizes:
    """The sizes that pay, if the library is told to use this instruction set at most."""
    if not torch.ops.ccnet_d2.has_fp32_products():
        return _NONE
    return _PAYING[str(compiled.instruction_set(torch.float32))]


def _is_usable(x: Tensor) -> bool:
    # Differentiable once: enough for compiled graphs, while others are promised a second derivative.
    recorded = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    return x.dtype == torch.float32 and not (recorded or autocasts(x) or is_transformed(x))


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, *S), (O, C) and (O,) -> (B, O, *S), channels-last; differentiable once."""
    out: Tensor = torch.ops.ccnet_d2.projection_forward(x, weight, bias)
    return out


def project_into(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """The same, written to `out`: (B, O, *S), all or some channels of a channels-last map."""
    torch.ops.ccnet_d2.projection_forward_into(x, weight, bias, out)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(B, O, *S) and (B, C, *S) -> (O, C)."""
    out: Tensor = torch.ops.ccnet_d2.projection_weight_gradient(grad, x)
    return out


def input_gradient(grad: Tensor, weight: Tensor, residual: Tensor | None, *, channels_last: bool) -> Tensor:
    """(B, O, *S) and (O, C) -> (B, C, *S), to which `residual` is added if given; channels-last in memory or NCHW."""
    out: Tensor = torch.ops.ccnet_d2.projection_input_gradient(grad, weight, residual, channels_last)
    return out


def input_gradient_into(grad: Tensor, weight: Tensor, residual: Tensor, out: Tensor) -> None:
    """The same with a residual, written to `out`, (B, C, *S) without gaps, which may be the residual itself."""
    torch.ops.ccnet_d2.projection_input_gradient_into(grad, weight, residual, out)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], weight.shape[0])).movedim(-1, 1)


def _weight_gradient_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1]))


def _input_gradient_fake(
    grad: Tensor, weight: Tensor, residual: Tensor | None, channels_last: bool
) -> Tensor:
    batch, _, *spatial = grad.shape
    if channels_last:
        return grad.new_empty((batch, *spatial, weight.shape[1])).movedim(-1, 1)
    return grad.new_empty((batch, weight.shape[1], *spatial))


def _into_fake(*tensors: Tensor) -> None:
    return None


def _flops(maps: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * maps[0] * prod(maps[2:]) * weight[0] * weight[1]


def _weight_gradient_flops(grad: torch.Size, x: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * prod(x[2:]) * grad[1] * x[1]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    if not is_dense(grad):
        grad = grad.contiguous()
    return (
        input_gradient(grad, weight, None, channels_last=is_channels_last(x)) if need_x else None,
        weight_gradient(grad, x) if need_weight else None,
        channel_sums(grad) if need_bias else None,
    )


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, fake, flops in (
        ("projection_forward", _forward_fake, _flops),
        ("projection_forward_into", _into_fake, _flops),
        ("projection_weight_gradient", _weight_gradient_fake, _weight_gradient_flops),
        ("projection_input_gradient", _input_gradient_fake, _flops),
        ("projection_input_gradient_into", _into_fake, _flops),
    ):
        library.register_fake(f"ccnet_d2::{name}", fake)
        register_flop_formula(getattr(torch.ops.ccnet_d2, name))(flops)
    library.register_autograd("ccnet_d2::projection_forward", _differentiate, setup_context=_save)
    for name in ("projection_weight_gradient", "projection_input_gradient"):
        library.register_autograd(f"ccnet_d2::{name}", compiled.refuse_second_derivative)


_PAYING_HERE = _NONE
if compiled.is_available():
    _register()
    _PAYING_HERE = _paying(os.environ.get("CCNET_CPU_ISA"))
