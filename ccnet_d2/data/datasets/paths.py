"""Where data sets live."""

from __future__ import annotations

import os

__all__ = ["ENV_VAR", "dataset_root"]

ENV_VAR = "DETECTRON2_DATASETS"


def dataset_root() -> str:
    """Folder of all data sets: ``$DETECTRON2_DATASETS`` with ``~`` expanded, else ``datasets``."""
    return os.path.expanduser(os.environ.get(ENV_VAR) or "datasets")
