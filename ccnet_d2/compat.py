"""The one module that asks which torch and Detectron2 run here."""

import importlib
import warnings

import torch


def has_fast_bf16() -> bool:
    """Whether bf16 matrix products run in units of their own here: a GPU that has them, or a CPU with AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    return bool(get_capabilities and get_capabilities().get("amx_bf16"))


def _import_detectron2_quietly() -> None:
    """Import the parts of Detectron2 on which newer versions of torch warn, which no user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
        importlib.import_module("detectron2.modeling")


_import_detectron2_quietly()
