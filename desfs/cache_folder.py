"""The folder of the disk cache: what it may take, what makes room, and when it is left alone.

    FOLDER/CACHEDIR.TAG                    tells backup programs to pass it over
    FOLDER/desfs-1/blocks/ab/ab….data .rec a segment of an object version (desfs.disk_cache)
    FOLDER/desfs-1/index/ab/ab….idx        a compiled index (desfs.compiled)

Another layout gets another number: what an earlier or later program has left is a miss. Files whose names are not of
this pattern are neither counted nor removed.

Several processes may share the folder. Each knows what it wrote itself, and learns of the others when it looks at all
files, after every 32nd of the limit that it has written. Two that make room at once choose the same files, those that
were used longest ago. A file may therefore vanish at any time; who has it open goes on reading, or finds it short, as
its checksum tells.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import structlog

from desfs import metrics
from desfs.errors import UsageError
from desfs.problems import Problems

log = structlog.get_logger(__name__)

LAYOUT = "desfs-1"
BLOCKS = "blocks"
INDEX = "index"

_OURS = re.compile(r"(?P<unit>(?P<digest>[0-9a-f]{40})(-[0-9a-f]+)?)\.(data|rec|idx|[0-9a-f]+\.tmp)")
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# A cache of desfs: nothing here is lost when it is removed.\n"

_HIGH, _LOW = 15 / 16, 14 / 16  # of the limit: room is made above the one, down to the other
_LOOK = 32  # all files are looked at when a process has written so small a part of the limit
_SHRINK = 3 / 4  # of what is there, when the disk is full in spite of all
FREE_FRACTION = 0.05  # of the disk that stays free
_RETRY_S = 60.0  # how long the folder is left alone after it failed
_COUNT_S = 0.5  # how long a put waits for the first look at all files: so long it takes with 100,000 of them
_WARN_S = 3600.0  # how long a disk that is full again and again is not warned of again
_TEMPORARY_S = 3600.0  # a file that somebody is writing is younger
# An index is a hundredth of its container's bytes and spares every start of a mount a round trip: between blocks that
# were used later it stays as if it had been used so much later than it was.
_INDEX_BONUS_NS = 86400 * 10**9
_BLOCK_SIZE = 4096  # of the disk, for estimates
_ST_BLOCK = 512  # stat(2): st_blocks counts these
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


class _Unit(NamedTuple):
    """Files that go together, and when one of them was used last."""

    used_ns: int
    size: int
    paths: list[str]


class CacheFolder:
    """What the parts of the disk cache share. Any thread; no method but the first raises for a fault of the disk."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int,
        *,
        problems: Problems | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a folder into use, made with mode 0700 if it is missing; its files are counted in the background.

        Raises: UsageError for a folder that cannot be made, is another user's, or may be written to by everybody.
        """
        self.path = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self.free_fraction = FREE_FRACTION
        self._about = f"cache_dir {self.path}"
        self._base = os.path.join(self.path, LAYOUT)
        self._problems = problems
        self._clock = clock
        # The names of indexes that somebody has mapped: none of them is one that was used long ago.
        self.indexes_in_use: Callable[[], Iterable[str]] = tuple
        self._lock = threading.Lock()
        self._counted = threading.Event()
        self._due = False
        self._worker: threading.Thread | None = None
        self._used = 0  # what the last look found, and what was written since
        self._written = 0  # since the last look
        self._shrink = False
        self._wanted = 0  # bytes that there was no room for
        self._fault: str | None = None
        self._off_until = {"read": 0.0, "write": 0.0}
        self._said = False  # somebody was told of the fault
        self._warned_at: float | None = None
        refused = take_into_use(self.path)
        if refused is not None:
            self.failed("write", refused)
        self._wake()

    # --- places ---

    def file(self, kind: str, name: str) -> str:
        """The path of a file; its directory may be missing."""
        return f"{self._base}/{kind}/{name[:2]}/{name}"

    def open(self, kind: str, name: str, flags: int) -> int:
        """A descriptor, whose owner closes it; with O_CREAT in `flags` the directories are made. Raises: OSError."""
        path = self.file(kind, name)
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        return os.open(path, flags, 0o600)

    # --- whether and how much ---

    def readable(self) -> bool:
        """False for a while after a read has failed."""
        return self._clock() >= self._off_until["read"]

    def admits(self, size: int) -> bool:
        """Whether so many bytes may be written now; they count from then on."""
        if self._clock() < self._off_until["write"]:
            return False
        if not self._counted.wait(_COUNT_S):
            return False
        missing = self._missing_on_disk(size)
        with self._lock:
            due = self._used + size > self.max_bytes * _HIGH or self._written + size > self.max_bytes // _LOOK
            admitted = missing <= 0 and self._used + size <= self.max_bytes
            if admitted:
                self._used += size
                self._written += size
            elif size <= self.max_bytes:
                self._wanted = max(self._wanted, size)
        if due or not admitted:
            self._wake()
        return admitted

    def succeeded(self) -> None:
        """Something was written: the disk is well again."""
        if self._fault is None:
            return
        with self._lock:
            said, self._said, self._fault = self._said, False, None
        if said:
            log.info("the disk cache is in use again", folder=self.path)
            if self._problems is not None:
                self._problems.clear(self._about)

    def failed(self, doing: str, error: OSError) -> None:
        """The disk refused to "read" or to "write". It is left alone for a while; when it is full, room is made."""
        metrics.DISK_CACHE_ERRORS.labels(doing).inc()
        full = error.errno in _FULL
        with self._lock:
            self._off_until[doing] = self._clock() + _RETRY_S
            self._shrink = self._shrink or full
        self._say(f"cannot {doing}: {error.strerror}")
        if full:
            self._wake()

    def state(self) -> dict[str, Any]:
        """For the statistics: limits, use in bytes (an estimate between two looks), and why it is off, if it is."""
        return {"folder": self.path, "max_bytes": self.max_bytes, "bytes": self._used, "fault": self._fault}

    def wait_idle(self) -> None:
        """Return when nothing is being counted or removed in the background."""
        worker = self._worker
        if worker is not None:
            worker.join()

    # --- making room ---

    def _wake(self) -> None:
        with self._lock:
            self._due = True
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="desfs-cache", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._due:
                    self._worker = None
                    return
                self._due = False
            self._tidy()

    def _tidy(self) -> None:
        try:
            with self._lock:
                self._written = 0
                shrink, self._shrink = self._shrink, False
                wanted, self._wanted = self._wanted, 0
            for name in self.indexes_in_use():
                with contextlib.suppress(OSError):  # evicted all the same, or a disk that can only be read
                    os.utime(self.file(INDEX, name))
            units = sorted(self._units())
            used = sum(unit.size for unit in units)
            target: float = used
            if used + wanted > self.max_bytes * _HIGH:
                target = min(target, self.max_bytes * _LOW - wanted)
            if shrink:
                target = min(target, used * _SHRINK)
            missing = self._missing_on_disk(wanted)
            if missing > 0:
                target = min(target, used - missing)
            freed = 0
            for unit in units:
                if used - freed <= target:
                    break
                freed += self._remove(unit)
            with self._lock:
                self._used = used - freed + self._written
                if shrink and freed:
                    self._off_until["write"] = 0.0
            if self._missing_on_disk(wanted) > 0:
                with self._lock:
                    self._off_until["write"] = self._clock() + _RETRY_S
                metrics.DISK_CACHE_ERRORS.labels("full").inc()
                self._say(f"less than {self.free_fraction:.0%} of the disk is free")
        except OSError as error:
            self.failed("write", error)
        finally:
            self._counted.set()

    def _units(self) -> Iterator[_Unit]:
        """All that is ours below the folder."""
        old_ns = time.time_ns() - int(_TEMPORARY_S * 1e9)
        for kind in (BLOCKS, INDEX):
            for directory in _entries(f"{self._base}/{kind}"):
                if not directory.is_dir(follow_symlinks=False):
                    continue
                found: dict[str, _Unit] = {}
                for entry in _entries(directory.path):
                    match = _OURS.fullmatch(entry.name)
                    if match is None:
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    used_ns = status.st_mtime_ns + (_INDEX_BONUS_NS if kind == INDEX else 0)
                    if entry.name.endswith(".tmp"):
                        name, used_ns = entry.name, 0 if status.st_mtime_ns < old_ns else used_ns
                    else:
                        name = match["unit"]
                    unit = found.get(name, _Unit(0, 0, []))
                    size = status.st_blocks * _ST_BLOCK
                    found[name] = _Unit(max(used_ns, unit.used_ns), unit.size + size, [*unit.paths, entry.path])
                yield from found.values()

    def _remove(self, unit: _Unit) -> int:
        """The bytes that are free now."""
        for path in unit.paths:
            try:
                # Others may have a segment open, and its space would stay taken as long. An index is memory-mapped:
                # who reads it behind its end dies of SIGBUS, so that is never cut.
                if path.endswith((".data", ".rec")):
                    os.truncate(path, 0)
                os.unlink(path)
            except FileNotFoundError:
                pass  # another process was faster
            except OSError as error:
                self.failed("write", error)
                return 0
        metrics.CACHE_EVICTED.labels("disk").inc(unit.size)
        return unit.size

    def _missing_on_disk(self, size: int) -> int:
        """How many bytes have to be freed so that `size` more leave the disk its reserve."""
        try:
            disk = os.statvfs(self.path)
        except OSError:
            return 0  # what is written next will tell
        if not disk.f_blocks:
            return 0  # a file system that does not tell
        return int(disk.f_blocks * disk.f_frsize * self.free_fraction) + size - disk.f_bavail * disk.f_frsize

    def _say(self, fault: str) -> None:
        with self._lock:
            known, self._fault = self._fault is not None, fault
            now = self._clock()
            if known or (self._warned_at is not None and now - self._warned_at < _WARN_S):
                return
            self._warned_at = now
            self._said = True
        if self._problems is not None:
            self._problems.report(self._about, f"off: {fault}")
        else:
            log.warning("the disk cache is off", folder=self.path, fault=fault)


def take_into_use(folder: str) -> OSError | None:
    """Make the folder if it is missing, with mode 0700; what a disk that is full or cannot be written to has refused.

    Raises: UsageError for a folder that cannot be made, is another user's, or may be written to by everybody.
    """
    base = os.path.join(folder, LAYOUT)
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        _check_owner(folder)
        os.makedirs(base, 0o700, exist_ok=True)
        _check_owner(base)
        tag = os.open(f"{folder}/CACHEDIR.TAG", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(tag).st_size == 0:
                os.write(tag, _TAG)
        finally:
            os.close(tag)
    except OSError as error:
        if error.errno not in (*_FULL, errno.EROFS, errno.EIO):
            raise UsageError(f"cache_dir {folder}: {error.strerror}") from error
        return error
    return None


def disk_size(size: int) -> int:
    """What a file or a run of blocks of `size` bytes takes on disk, at most."""
    return (size // _BLOCK_SIZE + 2) * _BLOCK_SIZE


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _check_owner(folder: str) -> None:
    status = os.stat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"cache_dir {folder} is no directory")
    if status.st_uid != os.geteuid():
        raise UsageError(f"cache_dir {folder} belongs to another user (uid {status.st_uid})")
    if status.st_mode & stat.S_IWOTH:
        raise UsageError(f"cache_dir {folder} may be written to by everybody: chmod o-w, or choose another")
