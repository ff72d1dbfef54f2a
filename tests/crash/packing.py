"""The process that packers are forked from: one order a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any, NoReturn

# Imported here, once, for all forks: one that is not root may not be able to.
import aiosqlite  # noqa: F401
import sqlalchemy.dialects.sqlite.aiosqlite  # noqa: F401

import assignment.sqlite  # noqa: F401
from assignment.client import AssignmentError
from desfs.cli.packer import describe
from desfs.errors import DesfsError
from desfs.logs import configure_logs
from desfs.packer.run import run_packer
from desfs.settings import PackerSettings
from desfs.store import file, s3  # noqa: F401
from tests.crash.forking import forked


def _pack(order: dict[str, Any], report: int) -> NoReturn:
    """Run one packer; its effects and its last line go to `report`."""
    count = 0
    lock = threading.Lock()

    def effect(name: str) -> None:
        nonlocal count
        with lock:
            count += 1
            dies = order["die_before"] and name.startswith(order["die_before"])
            if count == order["die_at"] or dies:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(report, f"{name}\n".encode())

    status = 1
    try:
        if order["uid"]:
            os.setgroups([])
            os.setgid(order["uid"])
            os.setuid(order["uid"])
        settings = PackerSettings(**order["settings"])
        configure_logs(settings)
        summary = run_packer(order["spool"], order["store"], settings, once=True, effect=effect)
        message = "; ".join([describe(summary), *summary.failures])
        status = 1 if summary.failures else 0
    except (DesfsError, AssignmentError, OSError) as error:
        message = str(error)
    except Exception as error:
        message = repr(error)
        status = 3
    os.write(report, f"\0{message}\n".encode())
    os._exit(status)


def _fork(order: dict[str, Any]) -> dict[str, Any]:
    report = forked(lambda writer: _pack(order, writer))
    return {"status": report.status, "effects": report.effects, "message": report.word.strip()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)
