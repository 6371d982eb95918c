"""Tracing a network with sizes left open."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from ccnet_d2.layers.cell_average import average_by_products

from .network import ExportedNetwork, ExportError

__all__ = ["INPUT", "LEAST_SIDE", "MOST_SIDE", "OUTPUT", "trace"]

INPUT, OUTPUT = "images", "logits"
LEAST_SIDE = 32
"""Smallest height and width of the images that an exported file takes."""
MOST_SIDE = 2**16
"""Largest height and width."""

# Neither equal sides nor multiples of a stride: what holds for them alone would show as a violated constraint.
_EXAMPLE = (2, 3, 106, 138)


def trace(model: nn.Module) -> ExportedProgram:
    """The model as a program from images (B, 3, H, W) to logits (B, K, H, W), for any B and any H, W of 32 to 65536.

    Raises:
        ExportError: the model is of a form that is not exported (see `ExportedNetwork`), or its arithmetic depends
            on the image's size.
    """
    network = ExportedNetwork(model).eval()
    sizes = {
        0: Dim("batch", min=1),
        2: Dim("height", min=LEAST_SIDE, max=MOST_SIDE),
        3: Dim("width", min=LEAST_SIDE, max=MOST_SIDE),
    }
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(network, (torch.zeros(_EXAMPLE),), dynamic_shapes=(sizes,))
            if any(node.target in _DECOMPOSITIONS for node in program.graph.nodes):
                program = program.run_decompositions(_DECOMPOSITIONS)
    except (torch._dynamo.exc.UserError, RuntimeError) as error:
        head = getattr(network.sem_seg_head, "context", network.sem_seg_head)
        raise ExportError(
            f"{type(model).__name__} with {type(head).__name__} does not export: its arithmetic depends on the "
            f"image's size ({_reason(error)})."
        ) from error
    _forget_this_machine(program)
    return program


def _forget_this_machine(program: ExportedProgram) -> None:
    """Drop where in which files each operator was traced, also of those in graphs within the graph (autocast's)."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own parts, and without the graph it prints where tracing fails."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


# torch's own forms of these fix the sizes they were traced with.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.adaptive_avg_pool2d.default: average_by_products,
}


def _reason(error: Exception) -> str:
    """The line of torch's message that says which condition on the sizes was met."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    conditions = [line for line in lines if "generated guard" in line]
    return (conditions or lines or [type(error).__name__])[0].rstrip(".")
