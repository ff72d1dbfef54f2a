"""The process that imports are forked from, so that one costs little: one order a line on stdin, one answer on stdout.

An import dies (SIGKILL), or gets signals, before its n-th effect.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from typing import Any, NoReturn

from desfs.cli.imports import as_object
from desfs.errors import DesfsError
from desfs.imports.run import Summary, choose_day, run_import
from desfs.logs import configure_logs
from desfs.settings import ImportSettings
from desfs.store import file  # noqa: F401 - imported here, once, for all forks
from tests.crash.forking import forked


def _import(order: dict[str, Any], report: int) -> NoReturn:
    count = 0
    lock = threading.Lock()
    tempfile.tempdir = order["tmp"]

    def effect(name: str) -> None:
        nonlocal count
        with lock:
            count += 1
            os.write(report, f"{name}\n".encode())
            if count == order["at"]:
                for number in order["signals"]:
                    os.kill(os.getpid(), number)

    summary = Summary()
    end = "done"
    try:
        settings = ImportSettings(**order["settings"], log_level="error")
        configure_logs(settings)
        days = choose_day(order["day"], None, settings.timezone)
        run_import(order["paths"], order["store"], settings, days, summary, effect=effect)
    except KeyboardInterrupt:
        end = "interrupted"
    except DesfsError as error:
        end = str(error)
    os.write(report, f"\0{json.dumps({'end': end, **as_object(summary)})}".encode())
    os._exit(0)


def _fork(order: dict[str, Any]) -> dict[str, Any]:
    report = forked(lambda writer: _import(order, writer))
    return {
        "status": report.status,
        "effects": report.effects,
        "answer": json.loads(report.word) if report.word else {},
    }


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have ignored it
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)
