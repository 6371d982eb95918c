"""Results as text."""

import textwrap
from collections.abc import Mapping, Sequence

_WIDTH = 110


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def notes(conventions: Mapping[str, str]) -> str:
    """What each figure means, a wrapped sentence each."""
    sentences = (f"{name}: {text}." for name, text in conventions.items())
    return "\n".join(textwrap.fill(sentence, _WIDTH, subsequent_indent="  ") for sentence in sentences)


def number(value: float | None) -> str:
    """A printed figure, or a dash where the paper prints none."""
    return "-" if value is None else f"{value:g}"
