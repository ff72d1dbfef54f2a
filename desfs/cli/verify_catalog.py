"""`desfs verify --catalog`; what it prints is in desfs/cli/verify.py."""

from __future__ import annotations

import asyncio
import json as jsons
import sys
from collections.abc import Callable
from contextlib import closing

from assignment.client import AssignmentError, InvalidRequest
from desfs.amounts import counted
from desfs.catalog_check.check import Compared, Comparison
from desfs.catalog_check.repair import Repair, Repaired
from desfs.cli.catalog_option import catalog_url, opened_catalog
from desfs.cli.exits import EXIT_DAMAGE, EXIT_FAILURE, EXIT_USAGE, fail
from desfs.errors import UsageError
from desfs.settings import VerifySettings
from desfs.store.url import open_store, split_place
from desfs.verify import Finding


def run(store: str, settings: VerifySettings, *, repair: bool, show: Callable[[Finding], None], json: bool) -> int:
    """Compare a store with its catalog, after a repair if that is wanted; the exit status.

    Raises: UsageError; DesfsError.
    """
    if split_place(store)[1] is not None:
        raise UsageError(f"{store}: a catalog is compared with a whole store, not with one container")
    unread: list[Finding] = []
    is_whole = True

    def found(finding: Finding) -> None:
        if finding.kind == "unverified":
            unread.append(finding)
        show(finding)

    async def main(url: str) -> tuple[Compared, Repaired | None]:
        with closing(open_store(store, settings.s3_options(), deadline_s=settings.deadline)) as opened:
            async with opened_catalog(url, opened) as catalog:
                repaired = None
                if repair:

                    def left(key: str, reason: str) -> None:
                        nonlocal is_whole
                        is_whole = False
                        fail(f"not repaired: {key}: {reason}", EXIT_FAILURE)

                    repaired = await Repair(opened, catalog, settings, left=left).run()
                return await Comparison(opened, catalog, settings, found).run(), repaired

    try:
        compared, repaired = asyncio.run(main(catalog_url(settings, create=repair)))
    except InvalidRequest as error:
        return fail(error, EXIT_USAGE)
    except AssignmentError as error:
        return fail(error, EXIT_FAILURE)
    print(jsons.dumps(_record(compared, repaired)) if json else describe(compared, repaired))
    sys.stdout.flush()
    if unread:
        fail(f"not all could be compared: {unread[0].container}: {unread[0].problem}", EXIT_FAILURE)
    return EXIT_DAMAGE if compared.is_damaged else EXIT_FAILURE if unread or not is_whole else 0


def describe(compared: Compared, repaired: Repaired | None = None) -> str:
    """One line about what was compared, and repaired before."""
    counts = compared.counts
    what = f"{counted(compared.containers, 'container')}, {counted(compared.files, 'entry', 'entries')}"
    damage = f"{counts['damage']:,} damaged" if counts["damage"] else "no damage"
    parts = [f"compared {what} with the catalog: {damage}"]
    if repaired is not None:
        done = f"{repaired.adopted:,} containers adopted, {repaired.deleted + repaired.external:,} objects deleted"
        parts.insert(0, f"repaired: {done}, {repaired.forgotten:,} rows forgotten")
    if counts["warning"]:
        parts.append(counted(counts["warning"], "warning"))
    if counts["unverified"]:
        parts.append("not all could be compared")
    return "; ".join(parts)


def _record(compared: Compared, repaired: Repaired | None) -> dict[str, object]:
    record: dict[str, object] = {
        "kind": "summary",
        "containers": compared.containers,
        "files": compared.files,
        "external": compared.external,
        "damage": compared.counts["damage"],
        "warnings": compared.counts["warning"],
        "unverified": compared.counts["unverified"],
    }
    if repaired is not None:
        record |= {
            "adopted": repaired.adopted,
            "deleted": repaired.deleted,
            "deleted_external": repaired.external,
            "forgotten": repaired.forgotten,
        }
    return record
