"""Files that are either whole or not there, whatever stops the process or the machine."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ccnet_d2.errors import UserError

_TEMPORARY = "{name}.{token}.tmp"
"""A file's name until it is whole, see `_end_of`; a process that is killed leaves such a file behind."""

_TOKEN_BYTES = 4

_ROOMY = 128
"""Bytes that a name may have to be followed by more; file systems allow 143 or 255."""

_ABANDONED = 3600
"""Seconds without a write after which a file that has not become whole counts as left behind."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(UserError):
    """There is no room left for a file; what lay there before is as it was."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file beside its place and move it there when it is whole and on the disk.

    A reader sees the old file or the new one, and after a power cut one of the two is there: the data are synced
    before the rename, the folder after it. If writing fails, nothing is left of the new file. Of several processes
    that write one file at once, the last to finish has it.

    Args:
        path: the file to write or replace, in a folder that exists.

    Yields:
        A binary file to write to.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        path.lstat()  # a name that is too long is so from the start, not only once everything is written
    end = _end_of(path.name)
    remove_temporary_files(path.parent, glob.escape(end), unchanged=_ABANDONED)
    # A name of its own: another process that writes the same file must not write into this one.
    temporary = path.with_name(_TEMPORARY.format(name=end, token=secrets.token_hex(_TOKEN_BYTES)))
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _end_of(name: str) -> str:
    """A name, or as much of the end of a long one as makes its temporary name no longer than itself."""
    size = len(os.fsencode(name))
    room = size - len(_TEMPORARY.format(name="", token="")) - 2 * _TOKEN_BYTES
    while size > _ROOMY and len(os.fsencode(name)) > room:
        name = name[1:]
    return name


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write` of a UTF-8 text."""
    with atomic_write(path) as file:
        file.write(text.encode())


def remove_temporary_files(folder: str | os.PathLike[str], pattern: str, unchanged: float = 0) -> None:
    """Delete what a process that was killed while writing left in `folder`.

    Args:
        folder: where `atomic_write` wrote.
        pattern: of the ends of the names of the files to be written, such as "*.pth".
        unchanged: seconds for which a file must not have been written to, if processes may be writing such files now.
    """
    names = _TEMPORARY.format(name=pattern, token="[0-9a-f]" * 2 * _TOKEN_BYTES)
    for path in Path(folder).glob(names):
        # Another process deleted it, or it is whole by now, or another user's.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if not unchanged or time.time() - path.stat().st_mtime > unchanged:
                path.unlink()


@contextlib.contextmanager
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
