"""Errors of the data sets, each a sentence for the user."""

from __future__ import annotations

import os
import re

from ccnet_d2.errors import UserError

__all__ = ["DatasetError", "SampleError"]

_WORKER_PREFIX = re.compile(r"Caught \w+ in DataLoader worker process")


def _own_sentence(message: str) -> str:
    """The sentence inside the traceback that a loader worker sends to the main process."""
    if _WORKER_PREFIX.match(message):
        return message.rstrip().rpartition("\n")[2].partition(": ")[2]
    return message


class DatasetError(UserError):
    """A data set is missing, incomplete or wrongly described; the message says which and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(_own_sentence(message))


class SampleError(DatasetError):
    """One image or label file cannot be used.

    Args:
        message: one sentence; the first thing it quotes is the file.
        path: the file at fault; default: the one that `message` quotes first, which is how the attribute
            survives the way from a loader worker, where PyTorch rebuilds exceptions from their message alone.

    Attributes:
        path: the file at fault, so that a caller can list, skip or replace it.
    """

    def __init__(self, message: str, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        # Up to a quote that ends a word, so that an apostrophe inside the name is part of it.
        quoted = re.search(r"'(.+?)'(?!\w)", str(self))
        self.path = os.fspath(path) if path is not None else (quoted.group(1) if quoted else "")

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (str(self), self.path)
