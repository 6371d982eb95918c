"""Ways to differentiate and to record that torch's custom operators or functions written in Python do not follow."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` (grad, vmap, jvp, ...) works on them.

    An operator whose gradient is written in Python would lose forward-mode tangents without an error there, and end
    in one about `torch.autograd.Function` in most transforms; PyTorch's own operations follow all of them.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:  # the rule, and this is asked in every call
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_traced() -> bool:
    """Whether `torch.jit.trace` records what runs; it cannot hold a function written in Python."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return traced


def refuse_batches(grad: Tensor) -> None:
    """Raises a RuntimeError for a batch of gradients: `is_grads_batched` of `torch.autograd.grad`, and what uses it."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            "The criss-cross layer takes one gradient at a time (is_grads_batched=False; jacobian and hessian with "
            "vectorize=False): use backend='matmul' and recompute=False for batches of them."
        )
