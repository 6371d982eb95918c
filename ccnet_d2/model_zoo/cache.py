"""Converted weights, kept so that they are fetched and converted once."""

import logging
import os
from pathlib import Path

from iopath.common.file_io import file_lock
from portalocker.exceptions import LockException

from ccnet_d2.checkpoint.convert import convert_file
from ccnet_d2.errors import UserError

from .download import local_or_downloaded
from .published import published

# Counts changes of the converters that change their results: weights converted before are converted anew.
_CONVERSION = 1


def cache_dir() -> Path:
    """CCNET_D2_CACHE, or ccnet_d2 in the user's cache directory.

    Raises:
        UserError: it lies in a home directory, and there is none.
    """
    chosen = os.environ.get("CCNET_D2_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ccnet_d2"
    except RuntimeError as error:  # as in containers that run as a user without an entry
        raise UserError(
            f"There is no home directory for the cache {chosen or '~/.cache/ccnet_d2'}: set CCNET_D2_CACHE to the full "
            "path of a folder."
        ) from error


def weights_file(name: str, *, classifier: bool = True) -> Path:
    """Published weights as a checkpoint for the models here: a file in the cache, made if it is not there yet.

    Args:
        name: of a run with published weights, or of ImageNet weights, see `PUBLISHED`.
        classifier: False leaves out the last layer of each head, to train on other classes.

    Returns:
        A checkpoint in Detectron2's format.

    Raises:
        UserError: there are no such weights, or they cannot be had, are not what was published, or cannot be
            converted.
    """
    entry = published(name)
    folder = cache_dir()
    digits = f"-{entry.sha256}" if entry.sha256 else ""
    variant = "" if classifier else "-without-classifier"
    path = folder / f"{entry.name.replace('/', '-')}{digits}-v{_CONVERSION}{variant}.pth"
    try:
        if path.is_file():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # Others wait: those of the same job find the file, those that want another variant of it download alone.
        with file_lock(str(folder / entry.file)):
            if path.is_file():
                return path
            source, downloaded = local_or_downloaded(entry, folder)
            try:
                conversion = convert_file(source, path, entry.layout, classifier=classifier)
            finally:
                if downloaded:
                    source.unlink()
    except LockException as error:  # on some network file systems
        raise UserError(
            f"The cache {folder} cannot be locked ({error}): set CCNET_D2_CACHE to a folder that can, such as one on a "
            "local disk."
        ) from error
    except OSError as error:
        raise UserError(
            f"The cache {folder} cannot be used ({error}): set CCNET_D2_CACHE to a folder that can."
        ) from error
    logging.getLogger(__name__).info("%s: %s", entry.file, conversion.text())
    return path
