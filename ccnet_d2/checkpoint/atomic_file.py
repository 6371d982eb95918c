"""Files that are either whole or not there, whatever stops the process or the machine."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ccnet_d2.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
"""What the name of a file ends in until it is whole; a process that is killed leaves such a file behind."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(UserError):
    """There is no room left for a file; what lay there before is as it was."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file beside its place and move it there when it is whole and on the disk.

    A reader sees the old file or the new one, and after a power cut one of the two is there: the data are synced
    before the rename, the folder after it. If writing fails, nothing is left of the new file.

    Args:
        path: the file to write or replace, in a folder that exists.

    Yields:
        A binary file to write to.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write` of a UTF-8 text."""
    with atomic_write(path) as file:
        file.write(text.encode())


def remove_temporary_files(folder: str | os.PathLike[str], pattern: str) -> None:
    """Delete what a process that was killed while writing left in `folder`.

    Args:
        folder: where `atomic_write` wrote.
        pattern: of the names of the files to be written, such as "*.pth".
    """
    for path in Path(folder).glob(pattern + TEMPORARY_SUFFIX):
        path.unlink(missing_ok=True)


@contextmanager
def disk_full_reported(
    folder: str | os.PathLike[str], advice: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Turn the errors of a full disk, an exceeded quota or file size limit into one sentence.

    Args:
        folder: where the files go; its free space is reported.
        advice: what to do, the end of the sentence, asked for when it is needed; "" if there is nothing special.

    Raises:
        DiskFullError: what is within met one of them.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter, in the wake of the former
        if errno_of(error) not in _FULL:
            raise
        free = shutil.disk_usage(folder).free / 2**20
        reason = os.strerror(errno_of(error) or 0)
        raise DiskFullError(
            f"Writing to {folder} failed: {reason} ({free:.1f} MiB are free); {advice() or 'make room and try again'}."
        ) from error


def errno_of(error: BaseException | None) -> int | None:
    """The number of the system error that `error` is or came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename stands all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
