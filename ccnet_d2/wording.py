"""Wording that the messages of several modules share."""

from collections.abc import Iterable

__all__ = ["first_line", "listed"]


def first_line(error: BaseException | str) -> str:
    """Of an error's message, or of a text, without the full stop at its end; "" where there is none."""
    return (str(error).splitlines() or [""])[0].rstrip(".")


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names after commas, such as "a, b and 3 more".

    Args:
        names: what to list.
        most: how many of them are named.
    """
    words = [str(name) for name in names]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
