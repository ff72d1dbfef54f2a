"""Exit codes, and how a command says why it failed."""

from __future__ import annotations

import sys

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DAMAGE = 3  # `desfs verify` found some
EXIT_MOUNT_FAILED = 32  # mount(8)
EXIT_INTERRUPTED = 130  # as a shell has it: 128 and SIGINT


def one_line(text: str) -> str:
    """A message without line breaks."""
    return " ".join(text.split())


def printable(text: str) -> str:
    """A text without control characters, which would do something on a terminal, and without what is no Unicode."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def fail(error: object, status: int) -> int:
    """Say in one line on stderr what went wrong; the status."""
    print(f"desfs: {printable(one_line(str(error)))}", file=sys.stderr)
    return status
