"""Data sets that the project draws itself: written whole, left alone where they are, and nobody else's replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccnet_d2.atomic_folder import replace_folder
from ccnet_d2.data.datasets.paths import dataset_root
from ccnet_d2.data.errors import DatasetError

__all__ = ["drawn_set_folder", "read_manifest", "write_drawn_set"]


def drawn_set_folder(root: str | os.PathLike[str] | None, name: str) -> str:
    """The absolute path of `root`, or of the folder `name` beside the other data sets if it is None."""
    return os.path.abspath(os.path.expanduser(os.path.join(dataset_root(), name) if root is None else root))


def read_manifest(path: str | os.PathLike[str], generator: str) -> dict[str, Any] | None:
    """What the manifest at `path` says, `None` if there is none that can be read and names this generator."""
    try:
        with open(path, encoding="utf-8") as stream:
            manifest = json.load(stream)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("generator") == generator else None


def write_drawn_set(
    root: str,
    title: str,
    write: Callable[[Path], None],
    *,
    is_there: Callable[[], bool],
    is_ours: Callable[[], bool],
    article: str = "the",
) -> bool:
    """Write a set beside `root` and move it there whole, or leave it alone if it is there.

    Args:
        root: its folder.
        title: what it is called.
        write: writes its files into the empty folder that it gets.
        is_there: whether `root` holds this very set.
        is_ours: whether `root` holds a set of this kind, which may be replaced.
        article: that stands before the title of any such set.

    Returns:
        Whether files were written.

    Raises:
        DatasetError: `root` holds something else, or cannot be written.
    """
    try:
        if is_there():
            return False
        if not is_ours() and os.path.lexists(root) and (not os.path.isdir(root) or os.listdir(root)):
            raise DatasetError(
                f"'{root}' holds something other than {article} {title}; remove it or choose another folder."
            )
        return replace_folder(root, write, is_there)
    except OSError as error:
        raise DatasetError(f"Cannot write the {title} to '{root}': {error.strerror or error}.") from error
