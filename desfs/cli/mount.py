"""`desfs mount SOURCE DIR`: parse, fork, and wait for the daemon's word. Imports little: a mount starts fast."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from desfs.cli.exits import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_MOUNT_FAILED, EXIT_USAGE, fail, one_line
from desfs.errors import DesfsError, UsageError
from desfs.options import FLAGS, OPTION_HELP

if TYPE_CHECKING:
    from desfs.notify import Notifier
    from desfs.settings import MountSettings

    Serve = Callable[[Callable[[], None], Notifier], None]

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
        "SIGHUP makes it read its settings again, SIGUSR1 write its state to the log.\n"
        "Exit status: 0 mounted, 2 usage, 32 the mount failed.",
    )
    parser.add_argument("source", metavar="SOURCE", help="s3://bucket/prefix, file:///directory or a directory")
    parser.add_argument("directory", metavar="DIR", help="where to mount it: an existing directory")
    parser.add_argument("-o", dest="options", metavar="OPT,…", action="append", default=[], help="mount options")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground, log to stderr")
    _add_flags_of_mount(parser)
    return parser


def _helper_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mount.desfs",
        description="What mount(8) runs for `mount -t desfs SOURCE DIR`.",
        epilog="`desfs mount --help` has the mount options.",
    )
    parser.add_argument("source", metavar="SOURCE", help="s3://bucket/prefix, file:///directory or a directory")
    parser.add_argument("directory", metavar="DIR", help="where to mount it: an existing directory")
    parser.add_argument("-o", dest="options", metavar="OPT,…", action="append", default=[], help="mount options")
    parser.add_argument("-f", dest="fake", action="store_true", help="check options and mount point, mount nothing")
    _add_flags_of_mount(parser)
    return parser


def _add_flags_of_mount(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", dest="verbose", action="store_true", help="say what was mounted")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore options that are not known")
    # mount(8) hands these to a helper: no line in /etc/mtab, which is /proc/mounts today; the type; a namespace.
    parser.add_argument("-n", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", metavar="TYPE", help=argparse.SUPPRESS)
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help=argparse.SUPPRESS)


def main(arguments: list[str]) -> int:
    """`desfs mount …`, and `desfs SOURCE DIR …` as mount.fuse3 runs it; the exit status."""
    return _mount(_parser().parse_args(arguments), fake=False)


def helper() -> NoReturn:
    """The entry point of `mount.desfs`, which mount(8) runs for the type `desfs`; its exit codes are mount(8)'s."""
    try:
        parsed = _helper_parser().parse_args()
    except SystemExit as end:
        sys.exit(EXIT_FAILURE if end.code == EXIT_USAGE else end.code)
    parsed.foreground = False
    status = _mount(parsed, fake=parsed.fake)
    sys.exit(EXIT_FAILURE if status == EXIT_USAGE else status)


def _mount(parsed: argparse.Namespace, *, fake: bool) -> int:
    try:
        source, mountpoint, is_writable, serve = _prepare(parsed)
    except UsageError as error:
        return fail(error, EXIT_USAGE)
    except DesfsError as error:
        return fail(error, EXIT_MOUNT_FAILED)
    if fake:
        status = 0
    elif parsed.foreground:
        status = _stay(serve)
    else:
        status = _daemonize(serve)
    if status == 0 and is_writable and not fake:
        print(f"desfs: {source} is mounted read-only", file=sys.stderr)
    if status == 0 and parsed.verbose:
        print(f"desfs: {source} {'would be' if fake else 'is'} mounted on {mountpoint}")
    return status


def _stay(serve: Serve) -> int:
    from desfs.notify import Notifier

    try:
        serve(lambda: None, Notifier(os.environ))
    except KeyboardInterrupt:  # before there is a mount
        return EXIT_INTERRUPTED
    except DesfsError as error:
        return fail(error, EXIT_MOUNT_FAILED)
    except Exception as error:
        return fail(_unexpected(error), EXIT_FAILURE)
    return 0


def _prepare(parsed: argparse.Namespace) -> tuple[str, str, bool, Serve]:
    """Check all that can be checked without the store; source, mount point, whether somebody wants to write there, and
    the function that serves."""
    from desfs.mountpoint import check_mountpoint, lock_mountpoint
    from desfs.options import parse_options, split_options
    from desfs.settings import MountSettings

    words = [option for text in parsed.options for option in split_options(text)]
    if "remount" in words:
        raise DesfsError(f"{parsed.directory}: a mount cannot be changed by remount: unmount it and mount it again")
    if parsed.namespace is not None:
        raise DesfsError(f"-N {parsed.namespace}: run mount in that namespace (nsenter --mount) instead")
    known = frozenset(MountSettings.model_fields)
    given, unknown = parse_options(parsed.options, known, sloppy=parsed.sloppy)
    for name in unknown:
        print(f"desfs: unknown mount option {name!r} is ignored", file=sys.stderr)
    settings = _settings(given)
    if settings.allow_other:
        _check_allow_other()
    if settings.cache_dir:
        from desfs.cache_folder import take_into_use

        take_into_use(settings.cache_dir)
    source = parsed.source
    if not parsed.directory:
        raise UsageError("the mount point is empty: want an existing directory")
    if not source:
        raise UsageError("the source is empty: want s3://bucket/prefix, file:///directory or a directory")
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(s3|file):", source, re.IGNORECASE):
        source = os.path.abspath(source)
    try:
        mountpoint = check_mountpoint(parsed.directory)
        _check_hidden(source, mountpoint)
        lock = lock_mountpoint(mountpoint)
    except UsageError as error:
        raise DesfsError(str(error)) from error
    here = os.getcwd()

    def serve(say_ready: Callable[[], None], notifier: Notifier) -> None:
        from desfs.levers import LEVERS
        from desfs.logs import configure_logs

        configure_logs(settings, detached=not parsed.foreground)
        LEVERS.load(settings.levers)  # before anything imports pyfuse3
        from desfs.mount import serve

        def ready() -> None:
            if lock is not None:
                os.close(lock)
            say_ready()

        def reload() -> MountSettings:
            changed = _settings(given, here)
            configure_logs(changed, detached=not parsed.foreground)
            return changed

        serve(source, mountpoint, settings, ready, reload=reload, notifier=notifier)

    return source, mountpoint, "rw" in words, serve


def _settings(given: dict[str, str], here: str = "") -> MountSettings:
    """The settings. Paths that are relative to the caller's directory (`here`, once that is not ours any more) are said
    in full: the daemon's is the root."""
    from desfs.settings import MountSettings, config_path, load_settings

    def in_full(path: str | None) -> str | None:
        return path and os.path.abspath(os.path.join(here, path))

    config = config_path(given)
    if config:
        given = given | {"config": str(in_full(config))}
    settings = load_settings(MountSettings, given, lambda name: f"mount option {name}")
    paths = {name: in_full(getattr(settings, name)) for name in ("log_file", "ca_bundle", "cache_dir")}
    return settings.model_copy(update=paths)


def _check_hidden(source: str, mountpoint: str) -> None:
    """The mount must not hide its own store, nor another one: most likely the arguments are the wrong way round.

    Raises: DesfsError.
    """
    from desfs.mountpoint import mounted_at
    from desfs.store.url import local_root

    if mounted_at(mountpoint) is not None:  # an automount point: a look below it would wait for this mount
        return
    root = local_root(source)
    if root is not None and root.resolve().is_relative_to(mountpoint):
        raise DesfsError(f"the store {source} is at the mount point {mountpoint}, or below it, and would be hidden")
    if _is_store(mountpoint):
        raise DesfsError(f"the mount point {mountpoint} is itself a store, and would be hidden: the source comes first")


def _is_store(folder: str) -> bool:
    """Whether there is a layout, or a day with a container in it."""
    from des_format.shards import CONTAINER_SUFFIX, is_day
    from desfs.layout import LAYOUT_KEY

    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name == LAYOUT_KEY:
                return True
            if is_day(entry.name) and entry.is_dir(follow_symlinks=False):
                with os.scandir(entry.path) as inside:
                    if any(each.name.endswith(CONTAINER_SUFFIX) for each in inside):
                        return True
    return False


def _check_allow_other() -> None:
    """fusermount3 refuses it for ordinary users unless the administrator has allowed it. Raises: DesfsError."""
    from desfs.mountpoint import FUSE_CONF, user_allow_other

    if os.geteuid() != 0 and not user_allow_other():
        raise DesfsError(
            f"allow_other: only root may use it here. To let every user, the administrator adds a line "
            f"'user_allow_other' to {FUSE_CONF}"
        )


def _daemonize(serve: Serve) -> int:
    """Fork, before any thread or event loop exists; the child serves, the parent waits for its word."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        _run_daemon(serve, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            word = pipe.read()
    except KeyboardInterrupt:  # the daemon has it too, as long as it is not ready
        return EXIT_INTERRUPTED
    if word == _READY:
        return 0
    return fail(word.decode(errors="replace").strip() or "the mount daemon died at its start", EXIT_MOUNT_FAILED)


def _run_daemon(serve: Serve, writer: int) -> NoReturn:
    from desfs.notify import Notifier

    status = 1
    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        _ready(writer)

    try:
        os.chdir("/")
        serve(ready, Notifier({}))
        status = 0
    except DesfsError as error:
        if is_ready:  # else whoever waits says it
            _log().error("the mount failed", error=str(error))
        _say(writer, one_line(str(error)).encode("utf-8", "backslashreplace"))
    except Exception as error:
        _say(writer, one_line(str(_unexpected(error))).encode("utf-8", "backslashreplace"))
    finally:
        os._exit(status)


def _ready(writer: int) -> None:
    # Not before: what looks at an automount point waits for the mount, all but the process group of who makes it, in
    # which systemd starts mount(8) (Linux, fs/autofs/autofs_i.h, autofs_oz_mode).
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    _say(writer, _READY)
    os.dup2(null, writer)  # not closed: what is said later must not get into whatever has the number then
    os.close(null)


def _say(writer: int, word: bytes) -> None:
    # A parent that is gone, killed or with its word already, is no reason to stop serving.
    with contextlib.suppress(OSError):
        os.write(writer, word)


def _unexpected(error: Exception) -> DesfsError:
    """Log what nobody foresaw with its traceback; an error that says it in a line."""
    _log().exception("the mount failed", exc_info=error)
    return DesfsError(f"{type(error).__name__}: {error}")


def _log() -> Any:
    import structlog

    return structlog.get_logger(__name__)
