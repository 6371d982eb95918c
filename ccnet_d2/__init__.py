"""Criss-cross attention (CCNet) for Detectron2.

`import ccnet_d2` is light: subpackages are imported when first asked for. `ccnet_d2.ops`, `ccnet_d2.layers` and
`ccnet_d2.losses` need torch alone; everything else needs Detectron2.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = (
    "analysis",
    "checkpoint",
    "data",
    "engine",
    "evaluation",
    "export",
    "inference",
    "layers",
    "losses",
    "model_zoo",
    "modeling",
    "ops",
)

_FUNCTIONS = {"add_rcca": "modeling"}

__all__ = ["__version__", *_FUNCTIONS, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
