"""The project's scripts as modules, for tests that call their main functions."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).parents[1] / "projects" / "CCNet"


def load_script(path: str | Path) -> ModuleType:
    """A script, read anew.

    Args:
        path: from `PROJECT`, such as "tools/export.py", or a whole one.
    """
    path = PROJECT / path
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module
