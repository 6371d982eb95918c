"""The progress bar of scripts that go through a data set's files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def progress_bar(unit: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """Within the block, a bar on standard error that follows the calls of what is yielded.

    Args:
        unit: what is counted, in the singular.
        options: others of tqdm.

    Yields:
        A function of the number done and the number of all.
    """
    with tqdm(unit=unit, **options) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
