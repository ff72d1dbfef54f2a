"""`desfs catalog`: what is done to a catalog as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from desfs.amounts import counted
from desfs.cli.assignment import catalog_url
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail
from desfs.cli.setup import set_up
from desfs.errors import UsageError
from desfs.settings import AssignmentSettings, has_password


def migrate(options: dict[str, Any]) -> int:
    """Bring the tables of a catalog up to date; the exit status."""

    async def work(settings: AssignmentSettings) -> str:
        from assignment.opening import migrate

        await migrate(catalog_url(settings))
        return "the catalog is up to date"

    return _run(work, options)


def copy(source: str, target: str, options: dict[str, Any]) -> int:
    """Copy a catalog into an empty one; the exit status."""

    async def work(_: AssignmentSettings) -> str:
        from assignment.transfer import copy_catalog

        for url in (source, target):
            if has_password(url):
                raise UsageError(
                    "everybody sees a password on a command line: leave it out of the URL, and set PGPASSWORD or "
                    "write it into ~/.pgpass"
                )
        copied = await copy_catalog(source, target)
        return f"copied {counted(copied.containers, 'container')} and {counted(copied.shards, 'shard')}"

    return _run(work, options)


def _run(work: Callable[[AssignmentSettings], Coroutine[Any, Any, str]], options: dict[str, Any]) -> int:
    from assignment.client import AssignmentError, InvalidRequest

    try:
        print(asyncio.run(work(set_up(AssignmentSettings, options))))
    except (UsageError, InvalidRequest) as error:
        return fail(error, EXIT_USAGE)
    except (AssignmentError, OSError) as error:
        return fail(error, EXIT_FAILURE)
    return 0
