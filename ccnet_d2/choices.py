"""The check of an argument that takes one of a few values, and the sentence for others."""

from collections.abc import Collection

__all__ = ["check_choice"]


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """
    Args:
        name: of the argument.
        value: what it was given.
        choices: what it may be.

    Raises:
        ValueError: the value is none of them; the message names all.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
