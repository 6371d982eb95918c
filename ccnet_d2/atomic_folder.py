"""Folders that are either whole or not there, whatever stops the process and however many write them at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["replace_folder", "scratch_beside"]

_LOCK = "ccnet_d2.lock"
"""In a scratch folder: locked as long as the process lives that made the folder."""


@contextlib.contextmanager
def scratch_beside(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder of this process's own, beside `folder` and so on the same disk; it goes at the end.

    What processes that were killed left of theirs goes, too.

    Args:
        folder: need not exist; what it lies in is made.

    Raises:
        OSError: there can be none.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    for lock in folder.parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
        if _is_free(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with (scratch / "unlocked").open("wb") as file:
            # Where the file system has no locks it does not get its name, and nobody takes the folder for left.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                os.rename(file.name, scratch / _LOCK)
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_free(lock: Path) -> bool:
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is not, or is another user's, or has gone
        return False
    return True


def replace_folder(
    folder: str | os.PathLike[str], write: Callable[[Path], None], unless: Callable[[], bool] = lambda: False
) -> bool:
    """Make a folder or make it anew: it is written beside its place, and moved there when it is whole.

    Args:
        folder: what to make; what is there is replaced. A link stands for what it leads to.
        write: writes the files into the empty folder that it gets.
        unless: whether the same is there by now, of another process; it stays.

    Returns:
        Whether it was put there.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    folder = Path(folder).resolve()
    with scratch_beside(folder) as scratch:
        new = scratch / "new"  # with the usual rights, where the scratch folder is this user's alone
        new.mkdir()
        write(new)
        for turn in itertools.count():
            old = scratch / f"old{turn}"
            with contextlib.suppress(FileNotFoundError):  # none so far, or another process is replacing it
                os.rename(folder, old)
            try:
                os.rename(new, folder)
                break
            except OSError as error:
                if unless():
                    return False
                # Another process was quicker, and what it put there is replaced in its turn, or it is an error.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    if os.path.lexists(old) and not os.path.lexists(folder):
                        os.rename(old, folder)
                    raise
    return True
