"""A word of help after a name that does not exist."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """ "did you mean …?" with names that begin like it or else the nearest ones, or `otherwise` where none is near."""
    name = name.removeprefix("configs/")
    near = [one for one in known if name and one.startswith(name)][:3]
    near = near or difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise
