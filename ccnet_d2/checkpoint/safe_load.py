"""Reading checkpoint files as data: nothing in them is executed, and damage is noticed."""

import logging
import pickle
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccnet_d2.errors import UserError

logger = logging.getLogger(__name__)

_ZIP_MAGIC = b"PK\x03\x04"

# Records that programs have beside their weights; those of torch.export in its present and in its earlier format.
_PROGRAMS = {
    "constants.pkl": "TorchScript",
    "archive_format": "torch.export",
    "serialized_exported_program.json": "torch.export",
}

_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation", "(1)", "(2)")
_ASKED_FOR = re.compile(r"(?:nsupported GLOBAL|GLOBAL) ([\w.]+)")

# What the pickles of Detectron2's model zoo hold: dicts of numpy arrays.
_PICKLE_GLOBALS = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}


class CheckpointError(UserError):
    """A checkpoint cannot be read or written, or does not fit the model."""


class _WantsCode(pickle.UnpicklingError):
    """A file asks for an object that is not needed to hold weights."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 2 pickles hold bytes; the real `codecs.encode` would look for any module named in the file."""
    if encoding not in ("latin1", "latin-1"):
        raise _WantsCode(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


def _array(
    buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any, axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """How pickles of protocol 5 hold arrays: numpy's private `_frombuffer`, whose module differs between versions."""
    flat = np.frombuffer(buffer, dtype)
    return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _array
        if (module, name) not in _PICKLE_GLOBALS:
            raise _WantsCode(f"it asks for {module}.{name}, which is not needed to hold weights")
        return super().find_class(module, name)


def load_file(path: str | Path, *, allow_pickle: bool = False) -> Any:
    """The contents of a `.pth`, `.pt`, `.pyth` (torch) or `.pkl` (pickled numpy arrays) file, tensors on the CPU.

    The checksums of torch's files, which `torch.load` ignores, are compared before anything is used.

    Args:
        path: a local file.
        allow_pickle: run the code of a file that cannot be read without it, and log why. Anything can be in there:
            only for files that you or somebody you trust wrote.

    Raises:
        CheckpointError: the file is missing, unreadable, empty or damaged, or wants code to run.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"Checkpoint {path} does not exist{' as a file' if path.exists() else ''}.")
        with path.open("rb") as file:
            start = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error.strerror or error}.") from error
    if not start:
        raise CheckpointError(f"Checkpoint {path} is empty.")
    is_zip = start == _ZIP_MAGIC
    if is_zip:
        check_archive(path)
    is_plain_pickle = path.suffix == ".pkl" and not is_zip
    try:
        if is_plain_pickle:
            with path.open("rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        if tarfile.is_tarfile(path):
            # Torch's format before 2017. Versions of torch up to 2.5 run code from it even when told not to.
            raise CheckpointError(
                f"Checkpoint {path} is a tar archive, which is not read here; load it with the torch that wrote it "
                "and save it again."
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # the documentation of pickle: damaged data can raise any exception
        reason = _reason(error)
        if _wants_code(error):
            if allow_pickle:
                logger.warning(
                    "Checkpoint %s cannot be read as plain weights (%s): running the code in it, as allow_pickle says.",
                    path,
                    reason,
                )
                return _load_running_code(path, is_plain_pickle)
            raise CheckpointError(
                f"Checkpoint {path} cannot be read as weights: it holds objects that would run code when loaded "
                f"({reason}); if you trust its author, train.allow_pickle=True loads it all the same."
            ) from error
        raise CheckpointError(
            f"Checkpoint {path} cannot be read as weights: it is damaged or no checkpoint ({reason})."
        ) from error


def check_archive(path: str | Path) -> None:
    """Compare the checksum of every record of a zip archive as `torch.save` writes it.

    Raises:
        CheckpointError: the archive is cut short, a record is damaged, it holds a program, or what `torch.save` never
            writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
            kind = next((kind for record, kind in _PROGRAMS.items() if record in names), None)
            if kind is not None:
                raise CheckpointError(
                    f"Checkpoint {path} is a program of {kind}, not a state dict; name the checkpoint that it was made "
                    "from."
                )
            for record in archive.infolist():
                # A few bytes can unpack to terabytes; torch stores its records as they are.
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"Checkpoint {path} holds a compressed record, {record.filename}; torch.save writes none."
                    )
            if (name := archive.testzip()) is not None:
                raise CheckpointError(f"Checkpoint {path} is damaged: the checksum of {name} is wrong.")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, too, raises errors of many kinds for damaged archives
        raise CheckpointError(
            f"Checkpoint {path} cannot be read as weights: the file is damaged or cut short ({_reason(error)})."
        ) from error


def check_weights(weights: Any, path: str | Path) -> None:
    """Check that `weights` is a state dict: names and dense arrays of numbers.

    Raises:
        CheckpointError: it is not; the message names `path` and the entry at fault.
    """
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"Checkpoint {path} holds a {type(weights).__name__} where a state dict is expected."
        )
    if not weights:
        raise CheckpointError(f"Checkpoint {path} holds no weights.")
    nested = next((name for name, value in weights.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise CheckpointError(
            f"Checkpoint {path} holds not weights but a {type(weights[nested]).__name__} at {nested!r}: one of another "
            "code base has to be converted first, with projects/CCNet/tools/convert_checkpoint.py."
        )
    for name, value in weights.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"Checkpoint {path} has an entry named {name!r}, which is no name of a weight."
            )
        if isinstance(value, torch.Tensor):
            fine = is_dense(value)
        else:
            fine = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        if not fine:
            raise CheckpointError(
                f"Checkpoint {path} holds {type(value).__name__} at {name!r}, where an array of numbers is expected."
            )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds a number for each of its elements, as weights do."""
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def _load_running_code(path: Path, is_plain_pickle: bool) -> Any:
    try:
        if is_plain_pickle:
            return pickle.loads(path.read_bytes(), encoding="latin1")
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # of the code in the file
        raise CheckpointError(
            f"Checkpoint {path} cannot be read, not even by running its code ({_reason(error)})."
        ) from error


def _wants_code(error: Exception) -> bool:
    return isinstance(error, _WantsCode) or (
        isinstance(error, pickle.UnpicklingError) and _ASKED_FOR.search(str(error)) is not None
    )


def _reason(error: Exception) -> str:
    """The first telling words of an error's message, around which torch puts advice on its own arguments."""
    message = str(error)
    if asked := _ASKED_FOR.search(message):
        return f"it asks for {asked[1]}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_ADVICE)]
    return (telling[0] if telling else type(error).__name__).rstrip(".:")[:200]
