"""The cost of one module on a map of a given size."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .flops import count_flops
from .memory import LiveMemory, kept_for_backward

MEMORY = (
    "10^6 bytes that a forward pass leaves for the backward pass, in fp32, without parameters and the module's own "
    "input and output; every allocation followed, workspaces within kernels not included"
)
PEAK = (
    "10^6 bytes of new tensors that live at once at most in a forward and a backward pass, gradients included"
)


@dataclass(frozen=True)
class Cost:
    """What a module costs on one input.

    Attributes:
        gflops: 10^9 FLOPs of a forward pass, see `CONVENTION`.
        parameters: number of parameters.
        kept_mb: see `MEMORY`.
        peak_mb: see `PEAK`.
    """

    gflops: float
    parameters: int
    kept_mb: float
    peak_mb: float

    @property
    def gmacs(self) -> float:
        """10^9 multiply-adds."""
        return self.gflops / 2


def traced_cost(build: Callable[[], nn.Module], shape: Sequence[int], *, real: bool = False) -> Cost:
    """Trace a module's forward and backward pass with fake tensors: every allocation happens, no arithmetic.

    Args:
        build: makes the module, a function of one tensor, in training mode.
        shape: of the input, fp32.
        real: compute on the CPU instead, for a module whose shapes depend on the values that it sees.
    """
    with nullcontext() if real else FakeTensorMode():
        module = build().train()
        x = torch.randn(tuple(shape), requires_grad=True)
        flops = count_flops(module, x)["Global"]
        excluded = [*module.parameters(), *module.buffers(), x]
        with LiveMemory() as memory:
            kept, out = kept_for_backward(lambda: module(x), excluded)
            out.backward(torch.ones_like(out))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(flops / 1e9, parameters, kept / 1e6, memory.peak / 1e6)
