"""Reading checkpoint files as data: nothing in them is executed."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ccnet_d2.errors import UserError

# What the pickles of Detectron2's model zoo hold: dicts of numpy arrays.
_PICKLE_GLOBALS = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not needed to hold weights")
        return super().find_class(module, name)


def load_file(path: str | Path) -> Any:
    """The contents of a `.pth`, `.pt`, `.pyth` (torch) or `.pkl` (pickled numpy arrays) file, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, empty or damaged, or wants code to run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {path} does not exist.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"Checkpoint {path} is empty.")
    try:
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        EOFError,
        RuntimeError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"Checkpoint {path} cannot be read as weights: it is damaged, or holds objects that would run code "
            f"when loaded ({reason})."
        ) from error
