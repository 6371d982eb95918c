"""The commands and the code in the documents, found by their fences."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "projects/CCNet/**/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
# What a line of a block begins with that is a command; other blocks without a language are pictures of folders.
_COMMAND = re.compile(
    r"(?:[A-Z_0-9]+=\S+ )*(?:python|make|pip|git|mv|cp|export|cs[A-Z]\w+|torchrun|apt|\w+\.py)(?: |$)"
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its document, the line where it begins, its language and its text."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command with its continuation lines joined and its comment taken off."""

    document: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def words(self) -> list[str]:
        """The words, without variables set before the command."""
        words = shlex.split(self.text)
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
            words = words[1:]
        return words


def blocks() -> Iterator[Block]:
    """All fenced blocks of all documents."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            yield Block(document, text[: match.start()].count("\n") + 1, match[2], match[3])


def commands() -> Iterator[Command]:
    """All shell commands.

    Raises:
        AssertionError: a block has commands and something else.
    """
    for block in blocks():
        if block.language not in ("", "bash", "sh"):
            continue
        found = list(_commands_of(block))
        are_commands = [bool(_COMMAND.match(command.text)) for command in found]
        assert all(are_commands) or (not any(are_commands) and not block.language), f"{block}: {block.text}"
        if found and all(are_commands):
            yield from found


def python_blocks() -> list[Block]:
    return [block for block in blocks() if block.language == "python"]


def _commands_of(block: Block) -> Iterator[Command]:
    line, text = block.line + 1, ""
    start = line
    for raw in block.text.splitlines():
        text += raw.rstrip("\\") if raw.endswith("\\") else raw
        if not raw.endswith("\\"):
            text = re.sub(r"\s+# .*$", "", " ".join(text.split()))
            if text:
                yield Command(block.document, start, text)
            text, start = "", line + 1
        line += 1
