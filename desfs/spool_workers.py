"""Who packs a spool: a place for each worker, held by a lock that goes with its process. Blocking.

    SPOOL/.desfs/lock            locked by every worker: for itself alone, or shared
                 id              which spool this is, for the catalog: 16 hex digits, made once
                 workers/NUMBER  locked by the worker that has this number

A number is six hex digits of the host's name and two for the place on that host, the first that is free: a worker that
is started again has the number it had, and with it its batches. Locks are flock(2), which NFS carries to its server.
Where they do not reach other hosts, their names keep the numbers apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from desfs.errors import UsageError

_PLACES = 256  # workers of one spool on one host


@dataclass(slots=True)
class WorkerPlace:
    """A worker's place. `spool_id` says which spool, `number` which worker of it; `name` is both, unique everywhere."""

    internal: Path
    spool_id: str
    number: str
    descriptors: list[int]

    @property
    def name(self) -> str:
        return f"{self.spool_id}-{self.number}"

    @classmethod
    def take(cls, internal: Path, *, shared: bool) -> WorkerPlace:
        """A place that nobody has. Raises: UsageError when a packer is at work that wants the spool for itself, or this
        one does; OSError."""
        descriptors = [_open(internal / "lock")]
        try:
            if not _lock(descriptors[0], fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                hint = ", with a catalog of its own in the spool" if shared else ""
                raise UsageError(f"spool {internal.parent}: another packer is at work in it{hint}")
            host = sha256(socket.gethostname().encode()).hexdigest()[:6]
            for place in range(_PLACES):
                number = f"{host}{place:02x}"
                descriptor = _open(internal / "workers" / number)
                if _lock(descriptor, fcntl.LOCK_EX):
                    descriptors.append(descriptor)
                    return cls(internal, _spool_id(internal), number, descriptors)
                os.close(descriptor)
            raise UsageError(f"spool {internal.parent}: {_PLACES} packers are at work in it on this host")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def leave(self) -> None:
        """Let others have the place."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def has_ended(self, number: str) -> bool:
        """Whether the worker of that number has certainly ended: its process holds no lock. False says nothing where
        locks do not reach other hosts, or when it was never here."""
        if number == self.number:
            return False
        try:
            descriptor = os.open(self.internal / "workers" / number, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            # Its own host's numbers alone: another's may be held by a process whose locks we do not see.
            return number[:6] == self.number[:6] and _lock(descriptor, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)


def worker_number_of(batch: str) -> str:
    """The number of the worker whose batch has this name; what is no such name gives text that is nobody's."""
    return batch.rpartition("-")[2]


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _spool_id(internal: Path) -> str:
    path = internal / "id"
    with contextlib.suppress(FileNotFoundError):
        return _read_id(path)
    temporary = internal / f".id.{secrets.token_hex(8)}"
    temporary.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    try:
        os.link(temporary, path)  # fails if another worker was faster: its id holds
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return _read_id(path)


def _read_id(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if len(text) != 16 or set(text) - set("0123456789abcdef"):
        raise UsageError(f"{path}: found {text[:40]!r}, want the spool's id, 16 hex digits")
    return text
