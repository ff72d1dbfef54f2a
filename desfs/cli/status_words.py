"""The words of `desfs status`. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")


def with_seconds(words: Sequence[str]) -> list[str]:
    """The words with an empty text behind each `--watch` or `-w` that has no number behind it: an option that may stand
    without its value is nothing that typer knows, and a directory is not its value."""
    found: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return found + list(words[place:])
        found.append(word)
        if word in ("--watch", "-w") and not _NUMBER.fullmatch("".join(words[place + 1 : place + 2])):
            found.append("")
    return found
