"""The check of an argument that takes one of a few values, and the sentence for others."""

from collections.abc import Collection

from ccnet_d2.errors import UserError

__all__ = ["check_choice"]


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """
    Args:
        name: of the argument, or the config's key.
        value: what it was given.
        choices: what it may be.

    Raises:
        UserError: the value is none of them; the message names all.
    """
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
