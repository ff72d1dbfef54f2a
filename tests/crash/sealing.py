"""The process that seals are forked from: one order a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import closing
from datetime import date
from typing import Any, NoReturn

# Imported here, once, for all forks.
import aiosqlite  # noqa: F401
import sqlalchemy.dialects.sqlite.aiosqlite  # noqa: F401

import assignment.sqlite  # noqa: F401
from assignment.opening import open_catalog
from desfs.logs import configure_logs
from desfs.merging.seal import Sealer, Summary
from desfs.settings import SealSettings
from desfs.store import file, obstore_s3, open_store, s3  # noqa: F401
from tests.crash.forking import forked


def _seal(order: dict[str, Any], report: int) -> NoReturn:
    """Seal a day; the effects and what was done go to `report`."""
    count = 0

    def effect(name: str) -> None:
        nonlocal count
        count += 1
        if count == order["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(report, f"{name}\n".encode())

    async def main(settings: SealSettings) -> Summary:
        with closing(open_store(order["store"], settings.s3_options())) as store:
            catalog = await open_catalog(order["catalog"])
            sealer = Sealer(store, catalog, settings, holder="host:seal", effect=effect)
            await sealer.seal_day(date.fromisoformat(order["day"]))
            await catalog.close()
            return sealer.summary

    status = 1
    try:
        settings = SealSettings(log_level="error", **order["settings"])
        configure_logs(settings)
        summary = asyncio.run(main(settings))
        message = "; ".join(summary.failures)
        status = 1 if summary.failures else 0
    except Exception as error:
        message = repr(error)
        status = 3
    os.write(report, f"\0{message}\n".encode())
    os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        report = forked(lambda writer: _seal(order, writer))  # noqa: B023 - it is called before the next line
        answer = {"status": report.status, "effects": report.effects, "message": report.word.strip()}
        print(json.dumps(answer), flush=True)
