"""A child that reports through a pipe: effects, a line each, then what came of it behind a NUL."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple, NoReturn


class Report(NamedTuple):
    """The exit code, negative for a signal; the effects in their order; the last word, "" if it did not come to it."""

    status: int
    effects: list[str]
    word: str


def forked(child: Callable[[int], NoReturn]) -> Report:
    """Run `child` in a fork, with the descriptor that it reports to, to its end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as lines:
        effects, _, word = lines.read().partition("\0")
    _, status = os.waitpid(pid, 0)
    return Report(os.waitstatus_to_exitcode(status), effects.splitlines(), word)
