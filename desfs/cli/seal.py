"""`desfs seal`. With `--json` it prints one object: `days` that were looked at, `sealed` (containers that were made),
`inputs` (those that they are made of), `files` and `bytes` in them, `copied` (of the containers, those that the store
has copied by itself), `deleted` (objects whose grace has passed), `failures` (what was left, and why)."""

from __future__ import annotations

import asyncio
import json as jsons
import os
import socket
import sys
from contextlib import closing
from datetime import date
from typing import Any

from assignment.client import AssignmentError, InvalidRequest
from des_format.errors import DesFormatError
from des_format.shards import is_day
from desfs.amounts import counted, format_size
from desfs.cli.catalog_option import catalog_url, opened_catalog
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail, printable
from desfs.cli.setup import set_up
from desfs.errors import DesfsError, UsageError
from desfs.merging.seal import Sealer, Summary
from desfs.settings import SealSettings
from desfs.store.url import open_store


def run(store: str, options: dict[str, Any], *, day: str | None, json: bool) -> int:
    """Seal a day, or all that are over; the exit status."""

    async def main(settings: SealSettings, url: str) -> Summary:
        with closing(open_store(store, settings.s3_options(), deadline_s=settings.deadline)) as opened:
            async with opened_catalog(url, opened) as catalog:
                # A name that no other process has: two that are at work on one shard must not take it from each other.
                holder = f"{socket.gethostname()}:{os.getpid()}:seal"
                sealer = Sealer(opened, catalog, settings, holder=holder)
                if day is None:
                    await sealer.seal_past()
                else:
                    await sealer.seal_day(date.fromisoformat(day))
                return sealer.summary

    try:
        settings = set_up(SealSettings, options)
        if day is not None and not is_day(day):
            raise UsageError(f"--day {day!r}: want a date, such as 2026-11-20")
        summary = asyncio.run(main(settings, catalog_url(settings)))
    except (UsageError, InvalidRequest) as error:
        return fail(error, EXIT_USAGE)
    except (DesfsError, DesFormatError, AssignmentError, OSError) as error:
        return fail(error, EXIT_FAILURE)
    print(jsons.dumps(_record(summary)) if json else describe(summary))
    sys.stdout.flush()
    for failure in summary.failures:
        fail(failure, EXIT_FAILURE)
    return EXIT_FAILURE if summary.failures else 0


def describe(summary: Summary) -> str:
    """One line about what was sealed."""
    line = f"looked at {counted(len(summary.days), 'day')}: sealed {counted(summary.inputs, 'container')} into "
    line += f"{summary.sealed} ({format_size(summary.bytes)})"
    parts = [line, f"{summary.copied} of them copied by the store"] if summary.copied else [line]
    if summary.deleted:
        parts.append(f"deleted {counted(summary.deleted, 'object')} merged before")
    if summary.failures:
        parts.append(f"{len(summary.failures)} left for the next run")
    return "; ".join(parts)


def _record(summary: Summary) -> dict[str, object]:
    return {
        "days": [day.isoformat() for day in summary.days],
        "sealed": summary.sealed,
        "inputs": summary.inputs,
        "files": summary.files,
        "bytes": summary.bytes,
        "copied": summary.copied,
        "deleted": summary.deleted,
        "failures": [printable(failure) for failure in summary.failures],
    }
