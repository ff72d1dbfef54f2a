"""`desfs mount SOURCE DIR`: parse, fork, and wait for the daemon's word. Imports little: a mount starts fast."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from desfs.errors import DesfsError, UsageError
from desfs.options import FLAGS, OPTION_HELP

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_MOUNT_FAILED = 32  # mount(8)
_READY = b"ready\n"


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, OPTION_HELP)) + 1
    options = "\n".join(
        f"  {name if name in FLAGS else name + '=':{width}}  {text}" for name, text in sorted(OPTION_HELP.items())
    )
    parser = argparse.ArgumentParser(
        prog="desfs mount",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Mount the containers of a store, read-only. Returns when the root answers.",
        epilog=f"mount options, besides those of mount(8):\n{options}\n\n"
        "Without -f a daemon serves the mount; desfs umount, umount or fusermount3 -u end it.\n"
        "Exit status: 0 mounted, 2 usage, 32 the mount failed.",
    )
    parser.add_argument("source", metavar="SOURCE", help="s3://bucket/prefix, file:///directory or a directory")
    parser.add_argument("directory", metavar="DIR", help="where to mount it: an existing directory")
    parser.add_argument("-o", dest="options", metavar="OPT,…", action="append", default=[], help="mount options")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground, log to stderr")
    # mount(8) hands these to a helper: be sloppy about options, do not write mtab, be verbose, the type.
    for flag in ("-s", "-n", "-v"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", metavar="TYPE", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str]) -> int:
    """Mount; the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        serve, note = _prepare(parsed)
    except UsageError as error:
        return _fail(error, EXIT_USAGE)
    except DesfsError as error:
        return _fail(error, EXIT_MOUNT_FAILED)
    if note:
        print(f"desfs: {note}", file=sys.stderr)
    if parsed.foreground:
        try:
            serve(False, lambda: None)
        except DesfsError as error:
            return _fail(error, EXIT_MOUNT_FAILED)
        except Exception as error:
            return _fail(_unexpected(error), EXIT_FAILURE)
        return 0
    return _daemonize(serve)


def _prepare(parsed: argparse.Namespace) -> tuple[Callable[[bool, Callable[[], None]], None], str | None]:
    """Check all that can be checked without the store; the function that serves, and a note for the user."""
    from pydantic import ValidationError

    from desfs.mountpoint import check_mountpoint
    from desfs.options import parse_options, split_options
    from desfs.settings import MountSettings

    given: dict[str, Any] = parse_options(parsed.options, frozenset(MountSettings.model_fields))
    try:
        settings = MountSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        origin = f"mount option {name}" if name in given else f"DESFS_{name.upper()} in the environment"
        raise UsageError(f"{origin}: {first['msg'].removeprefix('Value error, ')}") from None
    # The daemon's directory is the root: what is relative to ours has to be said in full.
    paths = {"log_file": settings.log_file, "ca_bundle": settings.ca_bundle, "cache_dir": settings.cache_dir}
    settings = settings.model_copy(update={name: path and os.path.abspath(path) for name, path in paths.items()})
    if settings.cache_dir:
        from desfs.cache_folder import take_into_use

        take_into_use(settings.cache_dir)
    source = parsed.source
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", source):
        source = os.path.abspath(source)
    try:
        mountpoint = check_mountpoint(parsed.directory)
    except UsageError as error:
        raise DesfsError(str(error)) from error
    asked_for_writing = "rw" in [option for text in parsed.options for option in split_options(text)]

    def serve(detached: bool, ready: Callable[[], None]) -> None:
        from desfs.logs import configure_logs

        try:
            configure_logs(settings, detached=detached)
        except OSError as error:
            raise UsageError(f"log file {settings.log_file}: {error.strerror}") from error
        from desfs.levers import LEVERS

        LEVERS.load(settings.levers)  # before anything imports pyfuse3
        from desfs.mount import serve

        serve(source, mountpoint, settings, ready)

    return serve, f"{source} is mounted read-only" if asked_for_writing else None


def _daemonize(serve: Callable[[bool, Callable[[], None]], None]) -> int:
    """Fork, before any thread or event loop exists; the child serves, the parent waits for its word."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        _run_daemon(serve, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        word = pipe.read()
    if word == _READY:
        return 0
    print(f"desfs: {word.decode(errors='replace').strip() or 'the mount daemon died at its start'}", file=sys.stderr)
    return EXIT_MOUNT_FAILED


def _run_daemon(serve: Callable[[bool, Callable[[], None]], None], writer: int) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.chdir("/")

        def ready() -> None:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.close(null)
            _say(writer, _READY)
            os.close(writer)

        serve(True, ready)
        status = 0
    except DesfsError as error:
        _say(writer, _one_line(str(error)).encode("utf-8", "backslashreplace"))
    except Exception as error:
        _say(writer, _one_line(str(_unexpected(error))).encode("utf-8", "backslashreplace"))
    finally:
        os._exit(status)


def _say(writer: int, word: bytes) -> None:
    # A parent that is gone, killed or with its word already, is no reason to stop serving.
    with contextlib.suppress(OSError):
        os.write(writer, word)


def _unexpected(error: Exception) -> DesfsError:
    """Log what nobody foresaw with its traceback; an error that says it in a line."""
    import structlog

    structlog.get_logger(__name__).exception("the mount failed", exc_info=error)
    return DesfsError(f"{type(error).__name__}: {error}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(error: Exception, status: int) -> int:
    print(f"desfs: {_one_line(str(error))}", file=sys.stderr)
    return status
