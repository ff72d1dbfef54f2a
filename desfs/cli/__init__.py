"""The command line. `main` decides which of its two halves runs: the small one that mounts, or typer's."""

from __future__ import annotations

import os
import sys

from desfs import __version__

# What typer's half knows; all else is `SOURCE DIR -o …`, as mount(8) runs it.
COMMANDS = frozenset(
    (
        "assignment",
        "cat",
        "catalog",
        "doctor",
        "expire",
        "extract",
        "import",
        "ls",
        "packer",
        "seal",
        "rm",
        "stat",
        "status",
        "umount",
        "verify",
    )
)


def main() -> None:
    """The entry point of the program `desfs`."""
    for name, mode in (("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - to the end
    try:
        try:
            _main()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            print(f"desfs: {error.filename}: {error.strerror}", file=sys.stderr)
        elif not isinstance(error, BrokenPipeError):  # whoever reads has had enough: no error, but no success
            print(f"desfs: standard output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["--version"]:  # without typer: scripts ask for it
        print(f"desfs {__version__}")
        return
    if arguments and arguments[0] == "mount":
        from desfs.cli.mount import main as mount_main

        sys.exit(mount_main(arguments[1:]))
    # A source has a slash or a colon, or is there; any other word is a command, or a typing error of one.
    is_source = bool(arguments) and ("/" in arguments[0] or ":" in arguments[0] or os.path.exists(arguments[0]))
    if len(arguments) >= 2 and is_source and arguments[0] not in COMMANDS:
        from desfs.cli.mount import main as mount_main

        sys.exit(mount_main(arguments))
    from desfs.cli.commands import app

    app()
