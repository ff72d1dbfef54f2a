"""`desfs rm`. With `--json` it prints one object: `files` (paths that were removed, or would be), `containers` (of
tombstones), `days` (how many), `gone` (paths that were removed before) and `missing` (with --force)."""

from __future__ import annotations

import asyncio
import json as jsons
import sys
from contextlib import closing
from typing import Any

from assignment.client import AssignmentError, InvalidRequest
from des_format.errors import DesFormatError
from desfs.amounts import counted
from desfs.cli.catalog_option import catalog_url, opened_catalog
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail, printable
from desfs.cli.setup import set_up
from desfs.errors import DesfsError, UsageError
from desfs.removal.rm import NotRemoved, Removed, remove
from desfs.settings import RemovalSettings
from desfs.store.url import open_store


def run(
    store: str,
    paths: list[str],
    options: dict[str, Any],
    *,
    recursive: bool,
    force: bool,
    dry_run: bool,
    json: bool,
) -> int:
    """Remove paths from a store; the exit status."""

    async def main(settings: RemovalSettings, url: str) -> Removed:
        with closing(open_store(store, settings.s3_options(), deadline_s=settings.deadline)) as opened:
            async with opened_catalog(url, opened) as catalog:
                return await remove(opened, catalog, paths, settings, recursive=recursive, force=force, dry_run=dry_run)

    try:
        settings = set_up(RemovalSettings, options)
        removed = asyncio.run(main(settings, catalog_url(settings)))
    except (UsageError, InvalidRequest) as error:
        return fail(error, EXIT_USAGE)
    except NotRemoved as error:
        for reason in error.reasons:
            fail(reason, EXIT_FAILURE)
        return EXIT_FAILURE
    except (DesfsError, DesFormatError, AssignmentError, OSError) as error:
        return fail(error, EXIT_FAILURE)
    if json:
        print(jsons.dumps(_record(removed)))
    else:
        if dry_run:
            for path in removed.files:
                print(printable(path))
        print(describe(removed, dry_run=dry_run))
    sys.stdout.flush()
    for problem in removed.problems:
        fail(f"not all was looked at: {problem}", EXIT_FAILURE)
    return EXIT_FAILURE if removed.problems else 0


def describe(removed: Removed, *, dry_run: bool = False) -> str:
    """One line about what was removed."""
    verb = "would remove" if dry_run else "removed"
    where = f"{counted(removed.containers, 'container')} of tombstones in {counted(removed.days, 'day')}"
    parts = [f"{verb} {counted(len(removed.files), 'file')}" + (f": {where}" if removed.files else "")]
    if removed.gone:
        parts.append(f"{counted(len(removed.gone), 'path')} gone already")
    if removed.missing:
        parts.append(f"{counted(len(removed.missing), 'path')} never there")
    return "; ".join(parts)


def _record(removed: Removed) -> dict[str, object]:
    return {
        "files": removed.files,
        "containers": removed.containers,
        "days": removed.days,
        "gone": removed.gone,
        "missing": removed.missing,
    }
