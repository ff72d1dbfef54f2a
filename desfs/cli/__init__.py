"""The command line. `main` decides which of its two halves runs: the small one that mounts, or typer's."""

from __future__ import annotations

import sys

# What typer's half knows; all else is `SOURCE DIR -o …`, as mount(8) runs it.
COMMANDS = frozenset(("packer", "umount"))


def main() -> None:
    """The entry point of the program `desfs`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] == "mount":
        from desfs.cli.mount import main as mount_main

        sys.exit(mount_main(arguments[1:]))
    if len(arguments) >= 2 and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        from desfs.cli.mount import main as mount_main

        sys.exit(mount_main(arguments))
    from desfs.cli.commands import app

    app()
