"""The formulations of attention that benchmark_op.py compares, as calls on inputs of one size and dtype.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes, N number of positions.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attention_formulations import (
    RecurrentModule,
    TextbookModule,
    non_local_attention,
    non_local_sdpa,
    operator_attention,
    textbook_attention,
)
from ccnet_d2.layers import RCCA
from ccnet_d2.ops import BACKENDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "forward+backward")
NCHW_CORE = "compiled, NCHW"
RECOMPUTE = "compiled, recompute"


class Case:
    """One size and dtype: inputs, and calls for every candidate."""

    def __init__(self, arguments: argparse.Namespace, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        self.arguments, self.sizes, self.dtype = arguments, sizes, dtype
        self.device = torch.device(arguments.device)
        self.channels = arguments.channels
        self.key_channels = arguments.channels // arguments.reduction
        self.batch = arguments.batch

    @property
    def name(self) -> str:
        """The size, such as "97x97"."""
        return "x".join(map(str, self.sizes))

    def tensor(self, channels: int, *, scale: float = 1.0) -> Tensor:
        """Normal random numbers of a standard deviation, (B, channels, *S), NCHW in memory."""
        return (torch.randn(self.batch, channels, *self.sizes, device=self.device) * scale).to(self.dtype)

    def non_local_fits(self) -> bool:
        """Whether N x N weights, several times, stay within a quarter of the memory."""
        needed = 5 * self.batch * math.prod(self.sizes) ** 2 * self.dtype.itemsize
        if self.device.type == "cuda":
            return needed < torch.cuda.mem_get_info(self.device)[1]
        return needed < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4

    def cores(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The attention functions to compare, the textbook one first."""
        found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"textbook": textbook_attention}
        found |= {backend: operator_attention(backend) for backend in self.arguments.backends}
        if self.arguments.non_local:
            if self.non_local_fits():
                found["non-local"] = non_local_attention
            found["non-local SDPA"] = non_local_sdpa
        return found

    def modules(self) -> dict[str, nn.Module]:
        """The layers to compare, the textbook one first."""
        dims, reduction = len(self.sizes), self.arguments.reduction
        found: dict[str, nn.Module] = {
            name: TextbookModule(self.channels, reduction, dims, attention)
            for name, attention in self.cores().items()
            if name not in BACKENDS
        }
        layers = {backend: (backend, False) for backend in self.arguments.backends}
        if "compiled" in layers:
            layers[RECOMPUTE] = ("compiled", True)
        for name, (backend, recompute) in layers.items():
            layer = RCCA(self.channels, 1, dims, reduction=reduction, backend=backend, recompute=recompute)
            nn.init.ones_(layer.gamma)
            found[name] = layer
        order = [
            "textbook",
            *layers,
            *(name for name in found if name.startswith("non-local")),
        ]
        return {name: found[name].to(self.device, self.dtype) for name in order}

    def core_calls(self, *, backward: bool) -> dict[str, Callable[[], object]]:
        """A pass of each of `cores` in the layout that it is made for, and of the compiled one on NCHW inputs."""
        # At a deviation of 1 the softmax is neither flat nor a maximum.
        scale = math.sqrt(self.arguments.energy_std) * self.key_channels**-0.25
        query, key = (self.tensor(self.key_channels, scale=scale) for _ in range(2))
        tensors = (query, key, self.tensor(self.channels), self.tensor(self.channels))
        layouts = {False: tensors, True: tuple(_channels_last(x) for x in tensors)}
        calls = {}
        for name, function in self.cores().items():
            *inputs, grad = layouts[name in BACKENDS]
            calls[name] = _call(function, inputs, inputs, grad, backward=backward)
            if name == "compiled":
                *inputs, grad = tensors
                calls[NCHW_CORE] = _call(function, inputs, inputs, grad, backward=backward)
        return calls

    def loops(self) -> dict[str, nn.Module]:
        """The layers of `modules` with R loops; non-local attention, which sees everything at once, as it is."""
        recurrence, found = self.arguments.recurrence, self.modules()
        for name, module in found.items():
            if isinstance(module, RCCA):
                module.recurrence = recurrence
            elif not name.startswith("non-local"):
                found[name] = RecurrentModule(module, recurrence)
        return found

    def module_calls(
        self, modules: dict[str, nn.Module], *, backward: bool
    ) -> dict[str, Callable[[], object]]:
        """A pass of each layer on one NCHW input, with the gradients of its parameters if `backward`."""
        x, grad = self.tensor(self.channels), self.tensor(self.channels)
        return {
            name: _call(module, [x], [x, *module.parameters()], grad, backward=backward)
            for name, module in modules.items()
        }

    def steps_in_a_network(self, modules: dict[str, nn.Module]) -> dict[str, Callable[[], object]]:
        """A training step of each layer as in the middle of a network: its output is read by what comes next, and gone
        when its own backward pass begins. In a call of `module_calls` the caller holds the output to the end.
        """
        x, grad = self.tensor(self.channels).requires_grad_(), self.tensor(self.channels)

        def step(module: nn.Module) -> tuple[Tensor, ...]:
            return torch.autograd.grad(_Next.apply(module(x), grad), [x, *module.parameters()])

        return {name: functools.partial(step, module) for name, module in modules.items()}


class _Next(torch.autograd.Function):
    """What reads the output of a layer, and needs nothing of it for the gradient that it hands back."""

    @staticmethod
    def forward(ctx, out: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return out.new_zeros(())

    @staticmethod
    def backward(ctx, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def _channels_last(x: Tensor) -> Tensor:
    """The same values, the channels of a position side by side in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _call(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    wanted: list[Tensor],
    grad: Tensor,
    *,
    backward: bool,
) -> Callable[[], object]:
    for x in wanted:
        x.requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), wanted, grad)

    return forward_backward if backward else forward
