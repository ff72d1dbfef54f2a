"""`desfs status`: what a mount does, what waits in a spool, what a store holds; with `--watch` again and again.

`--json` prints one object a look: `MountStatus`, `SpoolStatus` or `StoreStatus` of desfs.status, as `kind` says. Of a
mount that is not served there are `kind`, `place` and `state` ("dead", "hung", "gone") alone. Exit status: 0; 1 when
the mount is not served or the place cannot be looked at; 2 when it is none of the three.

A watch ends with 0 when somebody interrupts it or unmounts what it looks at, with 1 when the mount's daemon has ended.
While a mount does not answer it goes on, and looks more and more rarely: each look may leave a process behind that
waits until the mount answers (desfs.hanging).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NoReturn

from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail
from desfs.cli.setup import option_name, set_up
from desfs.cli.status_lines import Line, Report
from desfs.cli.status_show import Show, live, show_blocks, show_json, show_on_terminal
from desfs.errors import DesfsError, UsageError
from desfs.settings import PackerSettings, StoreSettings, load_settings
from desfs.status import (
    NotServed,
    Place,
    Status,
    expected_wait_s,
    mount_status,
    place_of,
    since,
    spool_status,
    store_status,
)
from desfs.store import open_store

_LIMIT_S = 5.0  # for a mount to answer
_WATCH_S = {"mount": 2.0, "spool": 2.0, "store": 60.0}  # a look at a store lists all of it, which costs requests
_LEAST_WATCH_S = 0.1
_RARELY_S = 60.0  # between looks at a mount that does not answer
_EXIT_TERMINATED = 128 + signal.SIGTERM  # as a shell has it


def run(place: str, options: dict[str, Any], *, json: bool, watch: str | None = None) -> int:
    """Look, and print what is there; the exit status. `watch`: seconds between looks as somebody wrote them, "" for
    what is usual, None for one look."""
    try:
        watch_s = None if watch is None else _parse_seconds(watch)
        looks = _looks_at(place, options)
        if watch_s is not None:
            return _watch(looks, watch_s or _WATCH_S[looks.place.kind], json=json)
        with _open_show(json=json, is_live=False) as show:
            try:
                show(Report.of(looks.look()))
            except NotServed as error:
                if json:
                    show(Report.of_unserved(looks.place.path, error))
                raise
    except UsageError as error:
        return fail(error, EXIT_USAGE)
    except (DesfsError, OSError) as error:
        return fail(error, EXIT_FAILURE)
    except KeyboardInterrupt:
        if watch is None:
            raise
    return 0


def _parse_seconds(text: str) -> float:
    """0.0 for an empty text."""
    try:
        seconds = float(text or 0)
    except ValueError:
        seconds = math.nan
    if text and not (_LEAST_WATCH_S <= seconds < math.inf):
        raise UsageError(f"--watch: {text!r} is no number of seconds, {_LEAST_WATCH_S} and more")
    return seconds


@dataclass(frozen=True, slots=True)
class _Looks:
    """Looks at one place. `packer`: the settings of who packs it, of a spool."""

    place: Place
    settings: StoreSettings
    limit_s: float
    packer: PackerSettings | None = None

    def look(self) -> Status:
        """What is there now. Raises: NotServed; DesfsError; OSError."""
        if self.place.kind == "mount":
            return mount_status(self.place, limit_s=self.limit_s)
        if self.packer is not None:
            patterns = tuple(pattern for pattern in map(str.strip, self.packer.temporary.split(",")) if pattern)
            return spool_status(self.place.path, expected_s=expected_wait_s(self.packer), temporary=patterns)
        store = open_store(self.place.path, self.settings.s3_options(), deadline_s=self.settings.deadline)
        try:
            return store_status(store)
        finally:
            store.close()


def _looks_at(text: str, options: dict[str, Any]) -> _Looks:
    settings = set_up(StoreSettings, options)
    limit_s = min(_LIMIT_S, settings.deadline)
    place = place_of(text, limit_s=limit_s)
    # How long a file may wait is for its packer to say, which has the same variables and the same file.
    packer = load_settings(PackerSettings, options, option_name) if place.kind == "spool" else None
    return _Looks(place, settings, limit_s, packer)


def _watch(looks: _Looks, every_s: float, *, json: bool) -> int:
    """Show one look after another; the exit status. Raises: KeyboardInterrupt; what `_Looks.look` raises."""
    try:
        with _open_show(json=json, is_live=True) as show:
            _look_on(looks, every_s, show, json=json)
    except NotServed as error:
        if error.state != "gone":
            raise
        return fail(error, 0)


def _look_on(looks: _Looks, every_s: float, show: Show, *, json: bool) -> NoReturn:
    before: Status | None = None
    pause_s = every_s
    while True:
        began = time.monotonic()
        try:
            status = looks.look()
        except NotServed as error:
            report = Report.of_unserved(looks.place.path, error)
            if error.state != "hung":
                if json:
                    show(report)
                raise
            pause_s = min(2 * pause_s, max(_RARELY_S, every_s))
        else:
            report = Report.of(since(status, before))
            before, pause_s = status, every_s
        show(_dated(report, pause_s))
        time.sleep(max(0.0, began + pause_s - time.monotonic()))


def _dated(report: Report, every_s: float) -> Report:
    first, *others = report.lines
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, again every {every_s:g} s"
    return replace(report, lines=[first, Line("at", when), *others])


@contextlib.contextmanager
def _open_show(*, json: bool, is_live: bool) -> Iterator[Show]:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are no UTF-8
    if json:
        yield show_json
    elif not sys.stdout.isatty():
        yield show_blocks()
    elif not is_live or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):  # those cannot go back up
        yield show_on_terminal
    else:
        # Without it the terminal would be left without its cursor.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_EXIT_TERMINATED))
        with live() as show:
            yield show
