"""Loads the compiled libraries, `_C_cpu` and `_C_cuda`, and keeps the reason for each that is missing."""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_LEAST_TORCH = (2, 10)  # the first whose stable ABI has what the libraries use


def load(name: str, required: str | None = None, operators: Iterable[str] = ()) -> str | None:
    """Load the shared library `name` beside this file.

    Args:
        name: the library's name up to its first dot, e.g. "_C_cpu".
        required: why the library cannot be loaded whatever its state (a library it needs is missing), if so.
        operators: names of those that it has to register; one of older sources may lack some.

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
        return _why_not_built(name)
    # An in-place build beside an older one: the newest is the one that was meant.
    newest = max(found, key=lambda path: path.stat().st_mtime)
    try:
        if _is_cut_short(newest):
            return f"{newest} is cut short, as by an interrupted installation or a full disk: build it again."
        torch.ops.load_library(os.fspath(newest))
    except OSError as error:
        # torch names the file alone, what the system said of it is the cause.
        reason = error.__cause__ or error
        return f"{newest} cannot be loaded ({reason}); build it again for this torch, {torch.__version__}."
    missing = [operator for operator in operators if not hasattr(torch.ops.ccnet_d2, operator)]
    if missing:
        return f"{newest} is of other sources than this package, it has no operator {missing[0]}: build it again."
    return None


def _is_cut_short(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section headers, its last part, do: loading it may be a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False
    (start,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return bool(size < start + entry_size * entries)


def _why_not_built(name: str) -> str:
    """What the build wrote down (setup.py), where there was one."""
    note = _FOLDER / f"{name}.not_built"
    try:
        reason, *details = note.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, ValueError):
        return (
            f"the extension {name} is not built; with torch installed and a C++ compiler at hand, "
            "`pip install --no-build-isolation .` builds it."
        )
    more = f" (all of it is in {note})" if details else ""
    return f"the extension {name} was not built when the package was installed: {reason.rstrip('.:')}{more}."
