"""The one module that asks which torch and Detectron2 run here."""

import importlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch


def has_fast_bf16() -> bool:
    """Whether bf16 products have units of their own here: a GPU with them, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    capabilities = get_capabilities() if get_capabilities else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def ddp_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `DistributedDataParallel` under the names that this torch knows."""
    options = dict(options)
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
    if "broadcast_buffers" in options and "forward_sync_buffers" in known:
        options["forward_sync_buffers"] = options.pop("broadcast_buffers")
    return options


def _import_detectron2_quietly() -> None:
    """Import the parts of Detectron2 on which newer versions of torch warn, which no user can act on."""
    with warnings.catch_warnings():
        # Deprecated, or from Python 3.14 on not supported; what Detectron2 compiles by it works.
        warnings.filterwarnings("ignore", message="`torch.jit.script` is", category=FutureWarning)
        importlib.import_module("detectron2.modeling")


_import_detectron2_quietly()
