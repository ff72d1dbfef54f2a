"""`desfs ls`, `cat` and `stat`.

With `--json`, `ls` and `stat` print an object a line, with these keys; more may come, these stay:

    path       as it is in the store: "2026-11-20/photos/1.jpg"
    type       "file" or "directory"
    size       bytes
    mode       permission bits, octal: "0644"
    mtime      UTC, to the nanosecond: "2026-11-20T08:30:00.000000000Z"
    container  the key of the container that a file is in; not for directories

`stat` has these besides, where a file has them: `id`, `mime_type`, `sha256`, and `meta`, its metadata as stored.
"""

from __future__ import annotations

import json as jsons
import stat as modes
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from des_format.errors import DesFormatError
from desfs.browse import Browser, browse
from desfs.cli.exits import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, fail, printable
from desfs.cli.setup import set_up
from desfs.entries import Attributes
from desfs.errors import DesfsError, IsADirectory, UsageError
from desfs.settings import MountSettings

_XATTRS = {"user.des.id": "id", "user.mime_type": "mime_type", "user.sha256": "sha256"}
_META = "user.des.meta"


def with_browser(store: str, options: dict[str, Any], main: Callable[[Browser], Awaitable[int]]) -> int:
    """Run a command over a store; its exit status, or that of what kept it from running."""
    try:
        settings = set_up(MountSettings, options)
        return browse(store, settings, main)
    except UsageError as error:
        return fail(error, EXIT_USAGE)
    except (DesfsError, DesFormatError) as error:
        return fail(error, EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def ls(
    store: str,
    paths: list[str],
    options: dict[str, Any],
    *,
    long: bool,
    recursive: bool,
    directory: bool,
    json: bool,
) -> int:
    """List paths; directories with what is in them. The exit status."""

    async def main(browser: Browser) -> int:
        status = 0

        def failed(error: Exception) -> None:
            nonlocal status
            status = fail(error, EXIT_FAILURE)

        for path in paths:
            try:
                await _list(
                    browser,
                    path.strip("/"),
                    failed,
                    long=long,
                    recursive=recursive,
                    directory=directory,
                    json=json,
                )
            except (DesfsError, DesFormatError) as error:
                status = fail(error, EXIT_FAILURE)
        for problem in browser.problems():
            status = fail(f"not all is shown: {problem}", EXIT_FAILURE)
        sys.stdout.flush()
        return status

    return with_browser(store, options, main)


async def _list(
    browser: Browser,
    path: str,
    failed: Callable[[Exception], None],
    *,
    long: bool,
    recursive: bool,
    directory: bool,
    json: bool,
) -> None:
    def show(name: str, at: str, attributes: Attributes) -> None:
        if json:
            print(jsons.dumps(_record(browser, at, attributes), ensure_ascii=False))
        else:
            print(_line(attributes, name) if long else printable(name))

    found = await browser.lookup(path)
    if recursive and not directory:
        async for at, attributes in browser.walk(path, failed):
            if at != path or not modes.S_ISDIR(attributes.mode):
                show(at, at, attributes)
    elif modes.S_ISDIR(found.mode) and not directory:
        for name, attributes in sorted(await browser.entries(found.inode)):
            show(name, f"{path}/{name}" if path else name, attributes)
    else:
        show(path or "/", path, found)


def cat(store: str, paths: list[str], options: dict[str, Any]) -> int:
    """Write files to standard output; the exit status."""

    async def main(browser: Browser) -> int:
        status = 0
        for path in paths:
            try:
                found = await browser.lookup(path)
                if modes.S_ISDIR(found.mode):
                    raise IsADirectory(f"{path}: is a directory")
                async for piece in browser.read(found):
                    sys.stdout.buffer.write(piece)
            except (DesfsError, DesFormatError) as error:
                status = fail(error, EXIT_FAILURE)
        sys.stdout.buffer.flush()
        return status

    return with_browser(store, options, main)


def stat(store: str, paths: list[str], options: dict[str, Any], *, json: bool) -> int:
    """Show all that is known of paths; the exit status."""

    async def main(browser: Browser) -> int:
        status = 0
        for path in paths:
            try:
                found = await browser.lookup(path)
                record = _record(browser, path.strip("/"), found)
                if not modes.S_ISDIR(found.mode):
                    record |= _of_xattrs(await browser.xattrs(found))
            except (DesfsError, DesFormatError) as error:
                status = fail(error, EXIT_FAILURE)
                continue
            if json:
                print(msgspec.json.encode(record).decode())
            else:
                for key, value in record.items():
                    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
                    print(f"{key:>10}: {printable(text)}")
        sys.stdout.flush()
        return status

    return with_browser(store, options, main)


def _record(browser: Browser, path: str, attributes: Attributes) -> dict[str, Any]:
    record: dict[str, Any] = {
        "path": path,
        "type": "directory" if modes.S_ISDIR(attributes.mode) else "file",
        "size": attributes.size,
        "mode": f"{modes.S_IMODE(attributes.mode):04o}",
        "mtime": _time(attributes.mtime_ns),
    }
    container = browser.container(attributes)
    return record | {"container": container} if container else record


def _of_xattrs(values: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: values[name].decode("utf-8", "replace") for name, key in _XATTRS.items() if name in values
    }
    if _META in values:
        try:
            msgspec.json.decode(values[_META])
            found["meta"] = msgspec.Raw(values[_META])  # a float would not have all of the digits
        except msgspec.DecodeError:  # damaged: as it is
            found["meta"] = values[_META].decode("utf-8", "replace")
    return found


def _line(attributes: Attributes, name: str) -> str:
    return (
        f"{modes.filemode(attributes.mode)} {attributes.size:>12} {_time(attributes.mtime_ns)[:19]} {printable(name)}"
    )


def _time(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 1_000_000_000)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
    except (ValueError, OverflowError):  # years that datetime does not have
        return f"@{seconds}.{rest:09d}"
