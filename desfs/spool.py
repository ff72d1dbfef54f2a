"""The spool: which files may be taken from it, and how they are taken without losing or tearing one. Blocking.

    SPOOL/                    any program writes here, with ordinary calls
    SPOOL/.desfs/lock, id, workers/   who packs the spool (`desfs.spool_workers`)
                 catalog.sqlite       the embedded catalog
                 claims/BATCH/files/… files taken, under their paths
                 claims/BATCH/journal.json
                 emptied-WORKER.json  folders that it has taken files from, to be removed when they are quiet
                 work/WORKER/         containers being built; worth nothing after a crash
                 rejected/N/          a file that cannot be stored, and `reason.txt`

A claim is a rename into `claims/`: it is on the same file system, and nobody opens the file there by its path.

A batch is its worker's, whose number its name ends in. A spool may have several workers; one takes the batches of
another that has died by renaming their folders, journal and all. A worker that was only paused then finds its files
and its journal gone: what it has open already it may put, and the fencing token keeps it from committing that.

Folders outside of `.desfs` are opened component by component, and no symbolic link is followed on the way: who may
write to the spool cannot lead the packer out of it.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import json
import os
import re
import secrets
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path

import structlog

from des_format.errors import InvalidEntryName
from des_format.names import MAX_PATH, check_writable
from desfs.errors import DesfsError, UsageError
from desfs.file_lease import LeaseRefused, lease_is_broken, take_lease
from desfs.spool_workers import WorkerPlace

log = structlog.get_logger(__name__)

INTERNAL = ".desfs"
TEMPORARY_PATTERNS = ("*.tmp", "*.part")
_RSYNC_TEMPORARY = re.compile(r"\..+\.[A-Za-z0-9]{6}")  # .NAME.XXXXXX, rsync(1)
TEMPORARY_WAIT_S = 3600.0  # for the owner of a name that looks temporary to rename it
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CLAIM_PREFIX = len("/.desfs/claims//files/") + 20 + 1 + 4 + 1 + 8  # the folder of a claim, with `new_batch_name`
# What the opening of a path says that is not what the scan has seen any more: gone, or something else.
_EXCHANGED = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EEXIST, errno.EISDIR}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1  # renameat2(2)
_libc = ctypes.CDLL(None, use_errno=True)

Effect = Callable[[str], None]
Refused = Callable[[str, OSError | LeaseRefused], None]


class FileChanged(DesfsError):
    """A claimed file was written to, or is about to be: it goes back."""


class Kind(Enum):
    """What the packer does with something that it finds in the spool."""

    SETTLED = "settled"  # can be taken
    WAITING = "waiting"  # was touched a moment ago
    TEMPORARY = "temporary"  # has a name that its owner will change
    UNSUITABLE = "unsuitable"  # can never be stored


@dataclass(frozen=True, slots=True)
class Found:
    """Something in the spool: its path relative to it, what to do with it, how long ago it was changed, and, where it
    is unsuitable, why."""

    path: str
    kind: Kind
    size: int
    age_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells whether a file is still the one that was looked at."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


ClaimedFiles = dict[str, FileState]


def is_temporary(path: str, patterns: tuple[str, ...] = TEMPORARY_PATTERNS) -> bool:
    """True for a file name that its owner will change when the file is whole."""
    name = path.rpartition("/")[2]
    return _RSYNC_TEMPORARY.fullmatch(name) is not None or any(fnmatch.fnmatchcase(name, each) for each in patterns)


def unsuitable_reason(path: str, status: os.stat_result, max_file_size: int) -> str | None:
    """Why a path of the spool can never be stored, or None."""
    kinds = {
        stat.S_IFLNK: "a symbolic link: links are never followed",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    kind = stat.S_IFMT(status.st_mode)
    if kind in kinds:
        return kinds[kind]
    try:
        check_writable(path)
    except InvalidEntryName as error:
        return str(error)
    if status.st_size > max_file_size:
        return f"{status.st_size} bytes, more than the {max_file_size} of one object"
    return None


class Spool:
    """One spool directory. One thread at a time; `join` gives this process its place among those who pack it.

    `effect` is called before each change on disk: tests die there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        settle_s: float = 2.0,
        max_file_size: int = 5 * 1024**4,
        temporary: Sequence[str] = TEMPORARY_PATTERNS,
        clock: Callable[[], float] = time.time,
        effect: Effect = lambda name: None,
    ) -> None:
        """Raises: UsageError for a root that is no directory or cannot be written to."""
        self.root = Path(os.path.abspath(root))
        if not self.root.is_dir():
            raise UsageError(f"spool {root} is no directory")
        self.internal = self.root / INTERNAL
        self._claims = str(self.internal / "claims")
        # Claims are reached by their whole path, which the kernel takes up to MAX_PATH.
        self._max_path = MAX_PATH - len(os.fsencode(self.root)) - _CLAIM_PREFIX
        self._settle_s = settle_s
        self._max_file_size = max_file_size
        self._temporary = tuple(temporary)
        self._clock = clock
        self._effect = effect
        self._place: WorkerPlace | None = None
        # Folders that we changed last: their ctime since, and when somebody else had changed them before.
        self._own_changes: dict[str, tuple[int, float]] = {}
        try:
            for folder in ("claims", "work", "rejected", "workers"):
                (self.internal / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"spool {root}: {error.strerror}: {error.filename}") from error
        # A lease that somebody breaks sends SIGIO to its holder, whose default is to end it (fcntl(2)).
        signal.signal(signal.SIGIO, signal.SIG_IGN)

    def join(self, *, shared: bool = False) -> WorkerPlace:
        """Become a worker of this spool, until `leave` or the end of the process: the only one, or with `shared` one of
        several. Raises: UsageError when that cannot be; OSError."""
        self._place = WorkerPlace.take(self.internal, shared=shared)
        self._work.mkdir(exist_ok=True)
        return self._place

    def leave(self) -> None:
        """Let others have the place."""
        if self._place is not None:
            self._place.leave()

    @property
    def place(self) -> WorkerPlace:
        """Ours, after `join`."""
        assert self._place is not None, "join() comes first"
        return self._place

    @property
    def _worker(self) -> str:
        return self.place.number

    @property
    def _work(self) -> Path:
        return self.internal / "work" / self._worker

    def new_batch(self) -> str:
        """The name of a batch of ours, which sorts behind those made before it."""
        return f"{time.time_ns():020d}-{secrets.token_hex(2)}-{self._worker}"

    def scan(self) -> Iterator[Found]:
        """All that is in the spool, folder by folder, names ascending. What goes away meanwhile is left out; a folder
        that cannot be read is found itself."""
        folders: list[tuple[str, os.stat_result | None]] = [("", None)]
        while folders:
            folder, status = folders.pop()
            try:
                listed = self._list(folder)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except PermissionError as error:
                if status is None:
                    raise
                yield self._unsuitable(folder, status, f"cannot be read: {error.strerror}")
                continue
            below: list[tuple[str, os.stat_result | None]] = []
            for name, status in listed:
                path = f"{folder}/{name}" if folder else name
                if path == INTERNAL:
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    yield self._classify(path, status)
                elif len(os.fsencode(path)) + len("/x") > self._max_path:
                    yield self._unsuitable(path, status, f"a folder whose path has {len(os.fsencode(path))} bytes")
                else:
                    below.append((path, status))
            folders.extend(reversed(below))

    def _list(self, folder: str) -> list[tuple[str, os.stat_result]]:
        listed = []
        with self._opened(folder) as descriptor, os.scandir(descriptor) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    listed.append((entry.name, entry.stat(follow_symlinks=False)))
        return sorted(listed, key=lambda each: os.fsencode(each[0]))

    @contextmanager
    def _opened(self, folder: str, *, make: bool = False) -> Iterator[int]:
        """A folder of the spool; with `make`, it and those above it are made if they are missing. Raises: OSError, for
        a symbolic link on the way NotADirectoryError."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in folder.split("/") if folder else ():
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=descriptor)
                below = os.open(name, _DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def _age_s(self, status: os.stat_result) -> float:
        # ctime: a program can set mtime, and a rename into the spool counts as a touch as well.
        return abs(self._clock() - status.st_ctime)

    def _unsuitable(self, path: str, status: os.stat_result, reason: str) -> Found:
        age_s = self._age_s(status)
        kind = Kind.UNSUITABLE if age_s >= self._settle_s else Kind.WAITING
        return Found(path, kind, status.st_size, age_s, reason)

    def _classify(self, path: str, status: os.stat_result) -> Found:
        reason = unsuitable_reason(path, status, self._max_file_size)
        if reason is None and len(os.fsencode(path)) > self._max_path:
            reason = f"a path of {len(os.fsencode(path))} bytes, more than the {self._max_path} that fit in this spool"
        if reason is not None:
            return self._unsuitable(path, status, reason)
        age_s = self._age_s(status)
        kind = Kind.SETTLED
        if age_s < self._settle_s:
            kind = Kind.WAITING
        elif is_temporary(path, self._temporary) and age_s < TEMPORARY_WAIT_S:
            kind = Kind.TEMPORARY
        return Found(path, kind, status.st_size, age_s)

    def claim(self, paths: Iterable[str], batch: str, refused: Refused = lambda path, error: None) -> ClaimedFiles:
        """Take files; those that were taken, each in its state. Left out is what went away or became something else,
        is held open by a writer, or somebody is about to write to.

        `refused` is told of each that could not be taken: PermissionError for a file that we may not read, LeaseRefused
        for one of another user, other OSErrors.
        """
        taken: ClaimedFiles = {}
        for folder, below in groupby(paths, _folder_of):
            names = list(below)
            try:
                with self._opened(folder) as above, self._own_change(folder, above):
                    target = f"{self._files(batch)}/{folder}".rstrip("/")
                    os.makedirs(target, exist_ok=True)
                    for path in names:
                        self._claim_in(above, path, target, batch, taken, refused)
            except OSError as error:
                if error.errno not in _EXCHANGED:  # else the next scan will see what it is
                    for path in names:
                        refused(path, error)
        return taken

    def _claim_in(self, above: int, path: str, target: str, batch: str, taken: ClaimedFiles, refused: Refused) -> None:
        name = path.rpartition("/")[2]
        target = f"{target}/{name}"
        try:
            descriptor = os.open(name, _FILE, dir_fd=above)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not take_lease(descriptor):
                    return
                self._effect(f"claim {path}")
                os.rename(name, target, src_dir_fd=above)
                # Either a writer opened the path before the rename, and waits for us; or the rename took another file
                # than the one that was opened, which may be held open.
                status = os.lstat(target)
                if lease_is_broken(descriptor) or not os.path.samestat(os.fstat(descriptor), status):
                    self.give_back(batch, path)
                else:
                    taken[path] = FileState.of(status)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _EXCHANGED:
                refused(path, error)
        except LeaseRefused as error:
            refused(path, error)

    def claimed(self, batch: str, path: str) -> str:
        """Where a claimed file is."""
        return f"{self._files(batch)}/{path}"

    def _files(self, batch: str) -> str:
        return f"{self._claims}/{batch}/files"

    def _batch(self, batch: str) -> Path:
        return self.internal / "claims" / batch

    def give_back(self, batch: str, path: str) -> bool:
        """Put a claimed file where it was; False, and it stays claimed, when a newer one has taken its place. One that
        another worker has taken over is left to it."""
        folder, _, name = path.rpartition("/")
        self._effect(f"give back {path}")
        try:
            with self._opened(folder, make=True) as above, suppress(FileNotFoundError):
                _rename_to_free_name(self.claimed(batch, path), name, above)
        except (FileExistsError, NotADirectoryError):
            return False
        return True

    def reject(self, path: str, reason: str, *, batch: str | None = None) -> None:
        """Put a file, or a folder with all in it, aside for good, with the reason beside it. Raises: OSError."""
        folder, _, name = path.rpartition("/")
        place = Path(tempfile.mkdtemp(prefix=f"{time.time_ns():x}-", dir=self.internal / "rejected"))
        target = place / (name if name != "reason.txt" else "reason.txt.file")
        self._effect(f"write reason {path}")
        (place / "reason.txt").write_text(f"{path}: {reason}\n", encoding="utf-8", errors="backslashreplace")
        self._effect(f"reject {path}")
        try:
            if batch is not None:
                os.rename(self.claimed(batch, path), target)
            else:
                with self._opened(folder) as above, self._own_change(folder, above):
                    os.rename(name, target, src_dir_fd=above)
        except OSError as error:
            (place / "reason.txt").unlink()
            place.rmdir()
            if error.errno in _EXCHANGED:
                return
            raise
        log.warning("put aside", path=path, reason=reason, rejected=str(place))

    def batches(self) -> list[str]:
        """The batches that have claims or a journal, whoever's they are, oldest first."""
        return sorted(entry.name for entry in os.scandir(self.internal / "claims"))

    def claims(self, batch: str) -> list[str]:
        """The paths of a batch's files, ascending."""
        root = self._files(batch)
        paths = []
        for folder, _, names in os.walk(root):
            below = os.path.relpath(folder, root)
            paths += [name if below == "." else f"{below}/{name}" for name in names]
        return sorted(paths)

    def claimed_files(self, is_ours: Callable[[str], bool]) -> list[tuple[float, int]]:
        """Seconds since they were claimed, and bytes, of the files in those batches that are ours."""
        found = []
        for batch in filter(is_ours, self.batches()):
            claimed_at = batch.partition("-")[0]
            age_s = max(self._clock() - int(claimed_at) / 1e9, 0.0) if claimed_at.isdecimal() else 0.0
            for path in self.claims(batch):
                with suppress(FileNotFoundError):
                    found.append((age_s, os.lstat(self.claimed(batch, path)).st_size))
        return found

    def take_over(self, batch: str) -> str | None:
        """Make another worker's batch ours, with all that is in it; its new name, None if somebody was faster.

        Its time stays at the front of the name: batches are finished in the order of their claims.
        """
        time_of_claim = batch.partition("-")[0]
        mine = f"{time_of_claim}-{secrets.token_hex(2)}-{self._worker}"
        self._effect(f"take over {batch}")
        try:
            os.rename(self._batch(batch), self._batch(mine))
        except FileNotFoundError:
            return None
        return mine

    def finish(self, batch: str) -> None:
        """Forget a batch whose files have all left it: its folders, then its journal."""
        root = self._files(batch)
        for folder, _, names in os.walk(root, topdown=False):
            if not names:
                _remove_empty(Path(folder))
        if not os.path.lexists(root):
            self._effect(f"remove journal {batch}")
            self.journal_path(batch).unlink(missing_ok=True)
            for temporary in self._batch(batch).glob(".*.tmp"):  # of a worker that died while it wrote
                temporary.unlink(missing_ok=True)
            _remove_empty(self._batch(batch))

    def journal_path(self, batch: str) -> Path:
        """Where a batch's journal is."""
        return self._batch(batch) / "journal.json"

    def write_durably(self, path: Path, content: bytes) -> None:
        """Replace a file as a whole: after a crash it has the old content or the new one."""
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            self._effect(f"fsync {path.name}")
            os.fsync(file.fileno())
        self._effect(f"rename {path.name}")
        os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._effect(f"fsync folder of {path.name}")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_claimed(self, batch: str, path: str, packed: FileState) -> bool:
        """Delete a file that is durable in the store; False if it was written to since it was packed: it stays."""
        source = self.claimed(batch, path)
        try:
            if FileState.of(os.lstat(source)) != packed:
                return False
        except FileNotFoundError:
            return True
        self._effect(f"unlink {path}")
        with suppress(FileNotFoundError):  # another worker took it over meanwhile, and has deleted it
            os.unlink(source)
        return True

    def remove_emptied(self, folders: set[str]) -> set[str]:
        """Remove those of the folders that are empty and quiet, and what that empties above them; the ones that have to
        be looked at again are returned."""
        again: set[str] = set()
        for folder in sorted(folders, key=lambda each: each.count("/"), reverse=True):
            for each in _with_parents(folder):
                try:
                    with self._opened(each) as descriptor:
                        if os.listdir(descriptor):
                            break  # in use; the next file taken from it brings it up again
                        if abs(self._clock() - self._changed_by_others(each, descriptor)) < self._settle_s:
                            again.add(each)
                            break
                    self._effect(f"rmdir {each}")
                    above, _, name = each.rpartition("/")
                    with self._opened(above) as descriptor, self._own_change(above, descriptor):
                        os.rmdir(name, dir_fd=descriptor)
                    self._own_changes.pop(each, None)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        log.warning("cannot remove an emptied folder", folder=each, error=str(error))
                    break
        return again

    def _changed_by_others(self, folder: str, descriptor: int) -> float:
        """When somebody else changed a folder or the names in it last. By ctime: copying programs set mtime back."""
        status = os.fstat(descriptor)
        own = self._own_changes.get(folder)
        return own[1] if own is not None and own[0] == status.st_ctime_ns else status.st_ctime

    @contextmanager
    def _own_change(self, folder: str, descriptor: int) -> Iterator[None]:
        """Around a change of ours to the names in a folder: it does not count as a touch."""
        before = self._changed_by_others(folder, descriptor)
        yield
        self._own_changes[folder] = (os.fstat(descriptor).st_ctime_ns, before)

    def work_path(self, key: str) -> Path:
        """Where the container for a key is built."""
        return self._work / key.replace("/", "_")

    def read_emptied(self, worker: str | None = None) -> set[str]:
        """The folders that files were taken from, by us or by the worker of that number, and that are still to be
        removed."""
        try:
            return set(map(str, json.loads(self._emptied_path(worker or self._worker).read_bytes())))
        except FileNotFoundError:
            return set()
        except (ValueError, TypeError) as error:
            log.warning("the list of emptied folders is damaged, and is made anew", error=str(error))
            return set()

    def write_emptied(self, folders: set[str]) -> None:
        """Remember the folders over a restart; to lose them leaves an empty folder behind, no more."""
        path = self._emptied_path(self._worker)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(sorted(folders)))  # json, which can spell names that are not UTF-8
        self._effect("rename emptied.json")
        os.replace(temporary, path)

    def _emptied_path(self, worker: str) -> Path:
        return self.internal / f"emptied-{worker}.json"

    def clear_work(self) -> None:
        """Throw away what the worker that had our place before us was building."""
        for entry in os.scandir(self._work):
            os.unlink(entry.path)


def _with_parents(folder: str) -> Iterator[str]:
    """A folder's path and those above it, up to the spool's root, which is not among them."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _rename_to_free_name(source: str, name: str, folder: int) -> None:
    """Rename, atomically, to a name that is free. Not link and unlink: a crash between them doubles the file, and the
    kernel refuses links to files of others (proc(5), protected_hardlinks). Raises: FileExistsError; OSError."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(source), folder, os.fsencode(name), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), source)
    os.link(source, name, dst_dir_fd=folder, follow_symlinks=False)  # a file system without RENAME_NOREPLACE
    os.unlink(source)


def _remove_empty(folder: Path) -> None:
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
