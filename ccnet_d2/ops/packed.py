"""The compiled criss-cross op on one tensor that holds query, key and value side by side, as one projection makes them.

Two operators, `ccnet_d2::criss_cross_packed_forward` and `ccnet_d2::criss_cross_packed_backward`. They read the parts,
and write the gradients of the parts, in place. Otherwise as in `ccnet_d2.ops.compiled`.
"""

from typing import Any

import torch
from torch import Tensor, library

from . import compiled

_Saved = tuple[Tensor, int]


def split(packed: Tensor, key_channels: int) -> tuple[Tensor, ...]:
    """(B, 2C' + C, *S) -> views query (B, C', *S), key (B, C', *S), value (B, C, *S)."""
    return packed.split([key_channels, key_channels, packed.shape[1] - 2 * key_channels], dim=1)


def forward(packed: Tensor, key_channels: int) -> tuple[Tensor, Tensor]:
    """Attention on a packed tensor.

    Args:
        packed: (B, 2C' + C, *S).
        key_channels: C'.

    Returns:
        The attended map, (B, C, *S) in channels-last memory, and the log-sum-exp of each position's energies,
        (B, *S), fp32 or fp64.
    """
    out: tuple[Tensor, Tensor] = torch.ops.ccnet_d2.criss_cross_packed_forward(packed, key_channels)
    return out


def backward(grad_out: Tensor, packed: Tensor, key_channels: int, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient of `packed`, channels-last in memory; `out` and `lse` are what `forward` gave."""
    compiled.refuse_unsupported(grad_out)
    grad: Tensor = torch.ops.ccnet_d2.criss_cross_packed_backward(grad_out, packed, key_channels, out, lse)
    return grad


def _forward_fake(packed: Tensor, key_channels: int) -> tuple[Tensor, Tensor]:
    value = split(packed, key_channels)[2]
    return compiled.empty_channels_last(value), compiled.empty_statistic(packed)


def _backward_fake(grad_out: Tensor, packed: Tensor, key_channels: int, out: Tensor, lse: Tensor) -> Tensor:
    return compiled.empty_channels_last(packed)


def _save(ctx: Any, inputs: _Saved, output: tuple[Tensor, Tensor]) -> None:
    packed, ctx.key_channels = inputs
    ctx.save_for_backward(packed, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_out is None:
        return None, None
    packed, out, lse = ctx.saved_tensors
    return backward(grad_out, packed, ctx.key_channels, out, lse), None


def _forward_flops(packed: torch.Size, key_channels: int, *args: Any, **kwargs: Any) -> int:
    return compiled.forward_flops(packed, key_channels, packed[1] - 2 * key_channels)


def _backward_flops(
    grad_out: torch.Size, packed: torch.Size, key_channels: int, *args: Any, **kwargs: Any
) -> int:
    return compiled.backward_flops(packed, key_channels, packed[1] - 2 * key_channels)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    name, backward_name = "ccnet_d2::criss_cross_packed_forward", "ccnet_d2::criss_cross_packed_backward"
    library.register_fake(name, _forward_fake)
    library.register_fake(backward_name, _backward_fake)
    library.register_autograd(name, _differentiate, setup_context=_save)
    library.register_autograd(backward_name, compiled.refuse_second_derivative)
    register_flop_formula(torch.ops.ccnet_d2.criss_cross_packed_forward)(_forward_flops)
    register_flop_formula(torch.ops.ccnet_d2.criss_cross_packed_backward)(_backward_flops)


if compiled.is_available():
    _register()
