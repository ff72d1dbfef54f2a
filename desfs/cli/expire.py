"""`desfs expire`. With `--json` it prints one object: `days` (deleted, or that would be), `containers`, `external`
(objects of their own), `bytes` of both, and `foreign` (objects of these days that are left)."""

from __future__ import annotations

import asyncio
import json as jsons
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date
from typing import Any

from assignment.client import AssignmentError, InvalidRequest
from desfs.amounts import counted, format_size
from desfs.cli.catalog_option import catalog_url, opened_catalog
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail, printable
from desfs.cli.setup import set_up
from desfs.errors import DesfsError, UsageError
from desfs.removal.expire import Expired, Progress, expire, find_expired
from desfs.settings import ExpireSettings
from desfs.store.url import open_store

_NAMED = 100  # objects that are left; the others are counted


def run(store: str, options: dict[str, Any], *, dry_run: bool, yes: bool, json: bool) -> int:
    """Delete the days of a store that are too old; the exit status."""

    async def main(settings: ExpireSettings, url: str) -> Expired | None:
        with closing(open_store(store, settings.s3_options(), deadline_s=settings.deadline)) as opened:
            async with opened_catalog(url, opened) as catalog:
                days = await find_expired(opened, catalog, settings)
                if days and not (dry_run or yes) and not _agreed(days, opened.url):
                    return None
                with _progress(sys.stderr.isatty() and not dry_run) as progress:
                    return await expire(opened, catalog, days, settings, dry_run=dry_run, progress=progress)

    try:
        settings = set_up(ExpireSettings, options)
        if not (dry_run or yes or sys.stdin.isatty()):
            raise UsageError("--yes is missing: nobody can be asked here, and what is deleted is gone")
        expired = asyncio.run(main(settings, catalog_url(settings)))
    except (UsageError, InvalidRequest) as error:
        return fail(error, EXIT_USAGE)
    except (DesfsError, AssignmentError, OSError) as error:
        return fail(error, EXIT_FAILURE)
    if expired is None:
        return fail("nothing was deleted", EXIT_FAILURE)
    print(jsons.dumps(_record(expired)) if json else describe(expired, dry_run=dry_run))
    sys.stdout.flush()
    for key in expired.foreign[:_NAMED]:
        fail(f"{key} is left: it is neither a container nor an object that one names", EXIT_FAILURE)
    if len(expired.foreign) > _NAMED:
        fail(f"and {len(expired.foreign) - _NAMED} more objects", EXIT_FAILURE)
    return 0


def describe(expired: Expired, *, dry_run: bool = False) -> str:
    """One line about what was deleted."""
    verb = "would delete" if dry_run else "deleted"
    left = f"; {counted(len(expired.foreign), 'foreign object')} left" if expired.foreign else ""
    if not expired.days:
        return f"{verb} nothing: no day is that old{left}"
    first, last = expired.days[0], expired.days[-1]
    which = f" ({first})" if first == last else f" ({first} to {last})"
    what = f"{counted(expired.containers, 'container')}, {counted(expired.external, 'external object')}"
    return f"{verb} {counted(len(expired.days), 'day')}{which}: {what}, {format_size(expired.bytes)}{left}"


def _record(expired: Expired) -> dict[str, object]:
    return {
        "days": [day.isoformat() for day in expired.days],
        "containers": expired.containers,
        "external": expired.external,
        "bytes": expired.bytes,
        "foreign": [printable(key) for key in expired.foreign],
    }


def _agreed(days: list[date], url: str) -> bool:
    print(
        f"{url}: {counted(len(days), 'day')}, {days[0]} to {days[-1]}. Delete for good? [y/N] ", end="", file=sys.stderr
    )
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if not shown:
        yield lambda day, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("objects"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("expiring", total=None)
        yield lambda day, done, total: bar.update(task, description=f"deleting {day}", completed=done, total=total)
