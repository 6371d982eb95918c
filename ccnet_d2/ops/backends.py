"""Which implementation runs: one module a backend, each with `unsupported_reason` and `criss_cross_attention`."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import compiled, matmul, reference

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = ("compiled", "matmul", "reference")


def available_backends() -> dict[str, str | None]:
    """For each backend the reason, as one sentence, why it cannot run on this machine; None where it can."""
    return {"compiled": compiled.unavailable_reason(), "matmul": None, "reference": None}


def select_backend(name: str, query: Tensor, key: Tensor, value: Tensor) -> AttentionFunction:
    """The function that computes the op for these inputs.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the named backend does not run here or not for these inputs. Only "auto" chooses another.
    """
    if name == "auto":
        name = automatic_backend(query, key, value)
    if name == "matmul":
        return matmul.criss_cross_attention
    if name == "reference":
        return reference.criss_cross_attention
    if name == "compiled":
        require_compiled(query.device, query.dtype)
        return compiled.criss_cross_attention
    raise ValueError(f"Unknown backend {name!r}: choose 'auto', 'compiled', 'matmul' or 'reference'.")


def require_compiled(device: compiled.Device, dtype: torch.dtype) -> None:
    """Raises a RuntimeError where the compiled operator does not run on this device in this dtype."""
    reason = compiled.unsupported_reason(device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend='compiled' cannot run: {reason}")


def automatic_backend(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The name of the backend that "auto" stands for with these inputs."""
    name = automatic_backend_on(query.device, query.dtype)
    return name if name != "compiled" or compiled.supports(query, key, value) is None else "matmul"


def automatic_backend_on(device: compiled.Device, dtype: torch.dtype) -> str:
    """The name of the backend that "auto" stands for on this device in this dtype."""
    if compiled.unsupported_reason(device, dtype) is not None:
        return "matmul"
    # On GPUs the kernels are several times faster in half precision.
    on_cpu, half = torch.device(device).type == "cpu", dtype in (torch.float16, torch.bfloat16)
    return "compiled" if on_cpu or half or compiled.pays_in_fp32_on_gpu(device) else "matmul"
