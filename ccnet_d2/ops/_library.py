"""Loads the compiled libraries, `_C_cpu` and `_C_cuda`, and keeps the reason for each that is missing."""

import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_LEAST_TORCH = (2, 10)  # the first whose stable ABI has what the libraries use


def load(name: str, required: str | None = None) -> str | None:
    """Load the shared library `name` beside this file.

    Args:
        name: the library's name up to its first dot, e.g. "_C_cpu".
        required: why the library cannot be loaded whatever its state (a library it needs is missing), if so.

    Returns:
        None, or as one sentence why the library is not there.
    """
    if required is not None:
        return required
    release = torch.__version__.split("+")[0].split(".")
    if tuple(int(part) for part in release[:2]) < _LEAST_TORCH:
        return f"the compiled operator needs torch 2.10 or newer, this is torch {torch.__version__}."
    found = [p for p in sorted(_FOLDER.glob(f"{name}.*")) if p.suffix in (".so", ".pyd", ".dylib")]
    if not found:
        return (
            f"the extension {name} is not built; with torch installed and a C++ compiler at hand, "
            "`pip install --no-build-isolation .` builds it, or says why it does not."
        )
    # An in-place build beside an older one: the newest is the one that was meant.
    newest = max(found, key=lambda path: path.stat().st_mtime)
    try:
        torch.ops.load_library(os.fspath(newest))
    except OSError as error:
        return f"{newest} cannot be loaded ({error}); build it again for this torch, {torch.__version__}."
    return None
