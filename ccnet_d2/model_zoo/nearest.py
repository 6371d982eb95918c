"""A word of help after a name that does not exist."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """ "did you mean …?" with the nearest names, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name.removeprefix("configs/"), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise
