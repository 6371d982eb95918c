"""`torch.compile` for whole models, set so that images of other sizes do not compile them anew."""

import os
import shutil
from typing import Any

from torch import nn

from ccnet_d2.errors import UserError

__all__ = ["compile_model"]

_COMPILERS = ("c++", "g++", "clang++")


def compile_model(
    model: nn.Module, *, dynamic: bool | None = True, fullgraph: bool = False, backend: str = "inductor"
) -> nn.Module:
    """Have torch.compile run the model from now on, in training and in inference.

    The model stays the same object with the same parameter names. It is compiled at its first call (once for
    training, once for inference); another number of images compiles it once more.

    Args:
        model: on its device.
        dynamic: compile for any height and width; None: for those of the first batch, and for any when others come
            (faster in training, whose crops have one size). Gradients for any size need the compiled operator
            (`backend="compiled"`, which "auto" is on CPUs where it is built): with "matmul" torch 2.14's compiler
            fails on four-axis views that it keeps for the backward pass.
        fullgraph: raise an error, rather than run a part uncompiled, where the model is not one graph; `CCNet` is.
        backend: see `torch.compile`.

    Returns:
        The model.

    Raises:
        UserError: the model is on the CPU and there is no C++ compiler, which torch needs there.
    """
    options: dict[str, Any] | None = None
    if backend == "inductor":
        first = next(model.parameters(), None)
        if first is not None and first.device.type == "cpu":
            _check_compiler()
        # Left alone, torch 2.14 binds the gradients of convolutions to the strides of the first batch (Inductor's
        # lowering of convolution_backward), and compiles again for every other size of the images.
        options = {"force_layout_optimization": True}
    model.compile(dynamic=dynamic, fullgraph=fullgraph, backend=backend, options=options)
    return model


def _check_compiler() -> None:
    named = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in (*named[:1], *_COMPILERS)):
        raise UserError(
            "torch.compile needs a C++ compiler on the CPU and there is none: install one (apt install g++), or "
            "leave train.compile=False."
        )
