"""Exit codes, and how a command says why it failed."""

from __future__ import annotations

import sys

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DAMAGE = 3  # `desfs verify` found some
EXIT_MOUNT_FAILED = 32  # mount(8)


def one_line(text: str) -> str:
    """A message without line breaks."""
    return " ".join(text.split())


def fail(error: object, status: int) -> int:
    """Say in one line on stderr what went wrong; the status."""
    print(f"desfs: {one_line(str(error))}", file=sys.stderr)
    return status
