"""A warning where a run trains on label maps that are void throughout."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ccnet_d2.data.sem_seg_mapper import IGNORE_LABEL

logger = logging.getLogger(__name__)

_BATCHES = 10


class VoidLabels:
    """Looks at the batches of a run until one has a labelled pixel, which the first one has as a rule.

    The loss of void alone is 0 and no error: label maps whose classes all got the value of void, by a conversion or a
    wrong `ignore_label`, would train for hours.
    """

    def __init__(self) -> None:
        self._batches_left = _BATCHES

    def look(self, batch: Any) -> None:
        """Warn once, of the tenth batch without a labelled pixel where all before had none either.

        Args:
            batch: a list of Detectron2 dicts; those without "sem_seg", (..., H, W) integer labels, say nothing, and
                neither do other batches.
        """
        if not self._batches_left:
            return
        samples = batch if isinstance(batch, Sequence) else ()
        labels = [one["sem_seg"] for one in samples if isinstance(one, Mapping) and "sem_seg" in one]
        if not labels or any(bool((label != IGNORE_LABEL).any()) for label in labels):
            self._batches_left = 0
            return
        self._batches_left -= 1
        if not self._batches_left:
            logger.warning(
                "The first %d batches have no labelled pixel, the last one of '%s': nothing is learnt from void. See "
                "which values the label maps have, and which ignore_label their data set is registered with.",
                _BATCHES,
                batch[0].get("file_name", "an image without a name"),
            )


class WatchedLoader:
    """The batches of a loader, which `VoidLabels` looks at, for a training loop that is not this package's."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        void_labels = VoidLabels()
        for batch in self._loader:
            void_labels.look(batch)
            yield batch
