"""What waits in a spool, and who packs it. Blocking; takes no lock and changes nothing."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from desfs.amounts import counted
from desfs.errors import DesfsError
from desfs.settings import PackerSettings
from desfs.spool import INTERNAL, TEMPORARY_PATTERNS, TEMPORARY_WAIT_S, is_temporary
from desfs.spool_workers import worker_number_of
from desfs.status.durations import format_duration
from desfs.status.locks import Locks

_FIRST = 10  # reasons that are named; the rest is counted


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """A spool.

    `waiting`: {"files", "bytes", "oldest_seconds", "oldest_file"}: what nobody has taken yet, and how long ago the
    oldest of it was touched last (both null without any); `temporary` of these have names that their owners will
    change. `claimed`: {"files", "bytes", "batches", "oldest_seconds"}: taken, and not yet durable in the store; the
    oldest since it was taken. `overdue`: {"expected_seconds", "waiting", "claimed"}: how long either should take at
    most, and how many files it has taken longer; those with temporary names have an hour more. `rejected`: {"count",
    "first"}, of each of the first {"file", "reason", "folder"}.

    `packers`: {"number", "running", "pid", "batches"} of each that is at work, that may be, or that has left batches;
    "running" is null where it cannot be told, "pid" for one in another container. `packer`: {"running", "pid"}: whether
    there is any, and the process where there is one alone. `warnings`: what is wrong now, a text for each thing.
    `rates`: null, or by how much what waits has grown since the look before, by the second: {"seconds", "files",
    "bytes"}, below 0 where it shrank. `looked_at`: since the epoch.
    """

    place: str
    waiting: dict[str, Any]
    temporary: int
    claimed: dict[str, Any]
    overdue: dict[str, float]
    rejected: dict[str, Any]
    packers: list[dict[str, Any]]
    packer: dict[str, Any]
    warnings: list[str]
    looked_at: float
    rates: dict[str, float] | None = None
    kind: str = "spool"


def expected_wait_s(settings: PackerSettings) -> float:
    """How long a file waits in a spool at most while all goes well: until it is due, until somebody looks, and while
    the request for what came before may still be tried again."""
    return max(settings.settle, settings.max_age) + settings.rescan_interval + settings.deadline


def spool_status(
    path: str,
    *,
    expected_s: float,
    temporary: tuple[str, ...] = TEMPORARY_PATTERNS,
    now_s: float | None = None,
) -> SpoolStatus:
    """What is in a spool. What comes and goes meanwhile is counted or not. `expected_s`: of `expected_wait_s`;
    `temporary`: patterns of names that their owners will change. Raises: DesfsError for what may not be read."""
    now_s = time.time() if now_s is None else now_s
    internal = os.path.join(path, INTERNAL)
    waiting, claimed, unnamed = _Files(now_s), _Files(now_s), 0
    try:
        for name, status in _files(path, leave_out=INTERNAL):
            has_owner = is_temporary(name, temporary)
            waiting.add(name, status, expected_s + TEMPORARY_WAIT_S if has_owner else expected_s)
            unnamed += has_owner
        batches = os.listdir(os.path.join(internal, "claims"))
        for batch in batches:
            for name, status in _files(os.path.join(internal, "claims", batch, "files")):
                claimed.add(name, status, expected_s)
        rejected = sorted(os.listdir(os.path.join(internal, "rejected")))
        reasons = [_rejection(os.path.join(internal, "rejected", each)) for each in rejected[:_FIRST]]
        packers, packer = _packers(internal, Counter(map(worker_number_of, batches)))
    except PermissionError as error:
        raise DesfsError(f"spool {path}: {error.strerror}: {error.filename}") from error
    return SpoolStatus(
        place=path,
        waiting={
            "files": waiting.count,
            "bytes": waiting.size,
            "oldest_seconds": _rounded(waiting.oldest_s),
            "oldest_file": waiting.oldest,
        },
        temporary=unnamed,
        claimed={
            "files": claimed.count,
            "bytes": claimed.size,
            "batches": len(batches),
            "oldest_seconds": _rounded(claimed.oldest_s),
        },
        overdue={"expected_seconds": expected_s, "waiting": waiting.overdue, "claimed": claimed.overdue},
        rejected={"count": len(rejected), "first": reasons},
        packers=packers,
        packer=packer,
        warnings=[
            *_late(waiting, "waiting", expected_s),
            *_late(claimed, "claimed", expected_s),
            *(["no packer is at work"] if packer["running"] is False and waiting.overdue + claimed.overdue else []),
        ],
        looked_at=now_s,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


class _Files:
    """A sum of files. Their age is that of ctime, as for the packer: programs set mtime, and a rename counts, into the
    spool as well as into a batch."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self.count = self.size = self.overdue = 0
        self.oldest: str | None = None
        self.oldest_s: float | None = None
        self.worst = "", 0.0  # the one that is overdue most, and its age
        self._worst_by_s = 0.0

    def add(self, name: str, status: os.stat_result, expected_s: float) -> None:
        age_s = max(0.0, self._now_s - status.st_ctime)
        self.count += 1
        self.size += status.st_size
        if self.oldest_s is None or age_s > self.oldest_s:
            self.oldest, self.oldest_s = name, age_s
        if age_s > expected_s:
            self.overdue += 1
            if age_s - expected_s > self._worst_by_s:
                self._worst_by_s, self.worst = age_s - expected_s, (name, age_s)


def _late(files: _Files, what: str, expected_s: float) -> list[str]:
    if not files.overdue:
        return []
    name, age_s = files.worst
    who = f"{counted(files.overdue, 'file')} {'has' if files.overdue == 1 else 'have'} been {what}"
    return [f"{who} longer than expected ({format_duration(expected_s)}), {name} for {format_duration(age_s)}"]


def spool_since(now: SpoolStatus, before: SpoolStatus) -> SpoolStatus:
    """The same with rates: how what waits has grown between two looks at one spool. Pure."""
    seconds = now.looked_at - before.looked_at
    if seconds <= 0:  # somebody has set the clock
        return now
    grown = {name: (now.waiting[name] - before.waiting[name]) / seconds for name in ("files", "bytes")}
    return replace(now, rates={"seconds": round(seconds, 3)} | {name: round(each, 3) for name, each in grown.items()})


def _files(root: str, *, leave_out: str | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder that is no folder, by its path from there; symbolic links are not followed."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone meanwhile
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if name == leave_out:
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                else:
                    yield name, entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue


def _rejection(folder: str) -> dict[str, str]:
    """What was put aside, and why."""
    try:
        text = Path(folder, "reason.txt").read_text(encoding="utf-8", errors="backslashreplace").strip()
    except FileNotFoundError:
        return {"file": "", "reason": "no reason was left", "folder": folder}
    # "PATH: reason", and both may have colons: the path ends in the name of what lies beside.
    beside = next((each for each in os.listdir(folder) if each != "reason.txt"), "")
    at = text.find(f"{beside}: ")
    file, reason = (text[: at + len(beside)], text[at + len(beside) + 2 :]) if at >= 0 else ("", text)
    return {"file": file, "reason": reason, "folder": folder}


def _packers(internal: str, batches: Mapping[str, int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The packers, and what can be said of all of them: each holds the lock of its number, and that of the spool."""
    locks = Locks.read()
    workers = os.path.join(internal, "workers")
    found = []
    for number in sorted({*os.listdir(workers), *batches}):
        holders = locks.holders(os.path.join(workers, number))
        running = None if holders is None else bool(holders)
        if running is not False or number in batches:
            pid = holders[0] or None if holders else None
            found.append({"number": number, "running": running, "pid": pid, "batches": batches.get(number, 0)})
    holders = locks.holders(os.path.join(internal, "lock"))
    running = None if holders is None else bool(holders)
    return found, {"running": running, "pid": holders[0] or None if holders and len(holders) == 1 else None}
