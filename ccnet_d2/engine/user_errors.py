"""Errors that a user can put right, as one sentence instead of a traceback."""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from ccnet_d2.data.datasets.paths import ENV_VAR, dataset_root

_WORKER_MARK = "in DataLoader worker process"
_IN_AN_INTERPOLATION = re.compile(r"^\w+ raised while resolving interpolation: ")

USER_ERRORS = (ValueError, FileNotFoundError, OmegaConfBaseException)
"""What counts as a fault of the input. Every other exception is a fault of the program."""


@dataclass
class ExitStatus:
    """0 until an error was reported."""

    code: int = 0


@contextmanager
def one_sentence_errors() -> Iterator[ExitStatus]:
    """Print one of `USER_ERRORS` from within as `error: <sentence>` and set the status to 1.

    With CCNET_TRACEBACK=1 the traceback is printed as well. Every other exception passes through: it is a fault of
    the program, not of its input.
    """
    status = ExitStatus()
    try:
        yield status
    except USER_ERRORS as error:
        if os.environ.get("CCNET_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        status.code = 1


def sentence_of(error: BaseException) -> str:
    """The message of a user's error."""
    message = str(error).strip()
    if isinstance(error, FileNotFoundError) and _is_of_a_data_set(error.filename):
        # As Detectron2's loaders of COCO and others leave it.
        return (
            f"'{error.filename}' does not exist: put the data set there, or set {ENV_VAR} to the folder that holds it; "
            "projects/CCNet/datasets/README.md shows its tree."
        )
    if isinstance(error, OmegaConfBaseException):
        # A key that is not there, most often; the lines below the first tell of OmegaConf and not of the config.
        return f"{_IN_AN_INTERPOLATION.sub('', message.splitlines()[0])} (config key {error.full_key})."
    if _WORKER_MARK in message:
        # The loader puts the worker's traceback into the message; its last line is "<ErrorClass>: <sentence>".
        message = message.splitlines()[-1].partition(": ")[2]
    return message


def _is_of_a_data_set(path: object) -> bool:
    return isinstance(path, str) and Path(path).absolute().is_relative_to(Path(dataset_root()).absolute())
