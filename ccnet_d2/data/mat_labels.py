"""Label maps out of MATLAB files, as some data sets publish them, to PNG files."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ccnet_d2.atomic_file import atomic_write_text
from ccnet_d2.atomic_folder import scratch_beside
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.image_files import write_bgr

__all__ = ["convert_labels", "read_mat_label", "write_list"]


def read_mat_label(path: str | os.PathLike[str], key: str) -> np.ndarray:
    """One label map of a `.mat` file (MATLAB 5 to 7.2).

    Args:
        path: the file.
        key: its variable.

    Returns:
        (H, W) integers as the file has them.

    Raises:
        SampleError: the file is missing or damaged, or has no such map.
        DatasetError: SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise DatasetError("Reading .mat files needs SciPy: install it with `pip install scipy`.") from error
    try:
        found = loadmat(path, variable_names=[key]).get(key)
    except zlib.error as error:
        raise SampleError(f"The file '{path}' is damaged: {error}.", path) from error
    # SciPy's reader raises these for files that it cannot make sense of.
    except (OSError, ValueError, TypeError, MatReadError, NotImplementedError, EOFError, KeyError) as error:
        raise SampleError(f"The file '{path}' cannot be read: {error}.", path) from error
    if found is None or found.ndim != 2 or not found.size or found.dtype.kind not in "ui":
        raise SampleError(f"The file '{path}' has no label map '{key}' of integers.", path)
    return np.asarray(found)


def convert_labels(
    sources: Sequence[tuple[Path, Path]],
    key: str,
    table: np.ndarray,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the label maps of `.mat` files as PNG files of other values.

    A file that is there already is kept; one is either whole or not there.

    Args:
        sources: pairs of a `.mat` file and the PNG file to write, all in one folder.
        key: the map's variable.
        table: (V,) uint8, what becomes of the values 0 to V - 1.
        progress: called with the number of files done and of all.

    Raises:
        SampleError: a file cannot be read, or holds a value outside the table.
        DatasetError: a file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        scratch = None
        for done, (source, target) in enumerate(sources, start=1):
            if not target.exists():
                label = read_mat_label(source, key)
                wrong = label[(label < 0) | (label >= len(table))]
                if wrong.size:
                    raise SampleError(
                        f"The file '{source}' holds the label {wrong[0]}, but labels are 0 to {len(table) - 1}.",
                        source,
                    )
                with _one_sentence(target):
                    scratch = scratch or stack.enter_context(scratch_beside(target.parent / "part"))
                    write_bgr(scratch / target.name, table[label])
                    os.replace(scratch / target.name, target)
            if progress is not None:
                progress(done, len(sources))


def write_list(path: Path, names: Sequence[str]) -> None:
    """Write names, one a line; what the file lies in is made.

    Raises:
        DatasetError: it cannot be written.
    """
    with _one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, "".join(f"{name}\n" for name in names))


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be written."""
    try:
        yield
    except OSError as error:
        raise DatasetError(f"'{path}' cannot be written: {error.strerror or error}.") from error
