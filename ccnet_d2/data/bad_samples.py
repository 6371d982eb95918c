"""What happens when a sample cannot be loaded: stop, or skip it within a budget and say so at the end."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
from PIL import Image

from ccnet_d2.choices import check_choice
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.errors import UserError
from ccnet_d2.wording import first_line

__all__ = ["ON_BAD_SAMPLE", "BadSample", "BadSamples", "load_sample"]

logger = logging.getLogger(__name__)

ON_BAD_SAMPLE = ("stop", "skip")
_MOST_NAMED = 20

# What decoders and mappers, Detectron2's too, raise for files they cannot make sense of. Anything else is a fault of
# the program and not of a file.
_FILE_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,  # Pillow's, for broken PNG files
    struct.error,
    zlib.error,
    cv2.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be loaded: the file at fault and a sentence about it."""

    path: str
    message: str


def load_sample(mapper: Callable[[Any], Any], record: Any) -> Any:
    """What `mapper` makes of a data set record.

    Raises:
        SampleError: a file of the record cannot be used, or the mapper returned None, for which Detectron2 would
            take any other sample instead without a word.
        UserError: as the mapper raised it.
    """
    name = str(record.get("file_name", "")) if isinstance(record, Mapping) else ""
    try:
        sample = mapper(record)
    except UserError:
        raise
    except _FILE_ERRORS as error:
        reason = first_line(error) or type(error).__name__
        raise SampleError(f"The sample '{name}' cannot be loaded: {reason}.", name) from error
    if sample is None:
        raise SampleError(f"The mapper returned None for the sample '{name}'.", name)
    return sample


class BadSamples:
    """The samples found bad so far, counted by file against a budget.

    Args:
        on_bad_sample: "stop" or "skip".
        budget: with "skip", how many different files may be bad before training stops all the same.

    Raises:
        UserError: a value is not one of those.
    """

    def __init__(self, on_bad_sample: str = "stop", budget: int = 100) -> None:
        check_choice("train.on_bad_sample", on_bad_sample, ON_BAD_SAMPLE)
        if budget < 0:
            raise UserError(f"train.bad_sample_budget={budget} is negative.")
        self.skip = on_bad_sample == "skip"
        self.budget = budget
        self._messages: dict[str, str] = {}
        self._times: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, samples: Iterable[BadSample]) -> None:
        """Count samples that were skipped, reporting each file the first time.

        Raises:
            DatasetError: the budget is spent.
        """
        for bad in samples:
            if bad.path not in self._messages:
                logger.warning("Skipped a bad sample: %s", bad.message)
            self._messages.setdefault(bad.path, bad.message)
            self._times[bad.path] = self._times.get(bad.path, 0) + 1
        if len(self) > self.budget:
            raise DatasetError(
                f"{len(self)} bad samples are more than train.bad_sample_budget={self.budget} allows; the last one: "
                f"{next(reversed(self._messages.values()))}"
            )

    def summary(self) -> str:
        """One line, and one more for each bad file."""
        if not self:
            return "No bad samples."
        lines = [f"{len(self)} bad samples were skipped (budget {self.budget}):"]
        lines += [
            f"  {message} ({self._times[p]} x)" for p, message in list(self._messages.items())[:_MOST_NAMED]
        ]
        if len(self) > _MOST_NAMED:
            lines.append(f"  and {len(self) - _MOST_NAMED} more.")
        return "\n".join(lines)

    def records(self) -> list[dict[str, Any]]:
        """For a report file and for checkpoints: path, message and number of times of each."""
        return [{"path": p, "message": m, "times": self._times[p]} for p, m in self._messages.items()]

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over what `records` returned."""
        self._messages = {record["path"]: record["message"] for record in records}
        self._times = {record["path"]: record["times"] for record in records}
