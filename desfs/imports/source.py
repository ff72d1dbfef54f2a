"""What is imported: the files of a source and where their bytes are; what of a source is not. Blocking."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple, Protocol

from des_format.errors import InvalidEntryName
from des_format.names import check_writable
from desfs.errors import DesfsError

MAX_LINES = 100  # that are kept of what went wrong; the rest is counted
# Without O_NONBLOCK the opening of a FIFO that has taken a file's place waits for its writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class SourceDamaged(DesfsError):
    """A source, or one file of it, is not what it should be. The message does not name it, but says where in it, in
    bytes, as far as that is known."""


class SourceChanged(DesfsError):
    """A source, or one file of it, is not the one any more that was looked at. The message does not name it."""


class Skipped(Enum):
    """What has no content that a container could hold."""

    SYMBOLIC_LINK = "symbolic link"
    EMPTY_DIRECTORY = "empty directory"
    PACKERS_OWN = "packer's folder"  # .desfs of a spool
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    FIFO = "FIFO"
    SOCKET = "socket"

    @property
    def plural(self) -> str:
        return "empty directories" if self is Skipped.EMPTY_DIRECTORY else f"{self.value}s"


_KINDS = {
    stat.S_IFLNK: Skipped.SYMBOLIC_LINK,
    stat.S_IFCHR: Skipped.CHARACTER_DEVICE,
    stat.S_IFBLK: Skipped.BLOCK_DEVICE,
    stat.S_IFIFO: Skipped.FIFO,
    stat.S_IFSOCK: Skipped.SOCKET,
}


def skipped_kind(mode: int) -> Skipped | None:
    """Which of them a file type is (stat(2), st_mode); None for regular files and directories."""
    return _KINDS.get(stat.S_IFMT(mode))


class Report:
    """What was not imported, and why. `refuse`: any thread; the rest: one."""

    def __init__(self) -> None:
        self.skipped: Counter[Skipped] = Counter()
        self.refused = 0
        self.replaced = 0
        self.failures: list[str] = []  # the first MAX_LINES
        self.notes: list[str] = []  # the first MAX_LINES of what is no failure
        self._lock = Lock()

    def skip(self, kind: Skipped) -> None:
        """Something that is left out without being a failure."""
        self.skipped[kind] += 1

    def refuse(self, message: str) -> None:
        """A file, or a source, that should have been imported and was not."""
        with self._lock:
            self.refused += 1
            if len(self.failures) < MAX_LINES:
                self.failures.append(message)

    def replace(self, message: str) -> None:
        """A file in whose stead a later one of the same name is imported."""
        self.replaced += 1
        if len(self.notes) < MAX_LINES:
            self.notes.append(message)


class Payload(Protocol):
    """The bytes of one file, opened. `path` leads to them where they are a file of their own."""

    path: Path | None

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer only at the end. Raises: SourceDamaged; OSError."""
        ...

    def check(self) -> None:
        """After the last byte. Raises: SourceChanged."""
        ...


@dataclass(slots=True, kw_only=True)
class SourceFile(ABC):
    """A file to be imported under `name`, which can be written. `size` in bytes; `mtime_ns` since the epoch and the
    permission bits `mode` are None where the source does not tell. `day` and `shard` are given later."""

    name: str
    size: int
    mtime_ns: int | None
    mode: int | None
    day: date = date.min
    shard: str = ""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where it is, for messages."""

    @abstractmethod
    def open(self) -> AbstractContextManager[Payload]:
        """Its bytes. Any thread. Raises: SourceDamaged; SourceChanged; OSError."""


class Source(Protocol):
    """Something that has files."""

    def files(self, report: Report) -> Iterable[SourceFile]:
        """Its regular files, each name once; the report gets the rest.

        Raises: SourceDamaged; SourceChanged; OSError.
        """
        ...

    def close(self) -> None:
        """When none of its files is needed any more."""
        ...


class Identity(NamedTuple):
    """What tells whether a file is still the one that was looked at."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class OpenFile:
    """A file of a disk, open for reading."""

    def __init__(self, descriptor: int, identity: Identity | None) -> None:
        self.descriptor = descriptor
        # Another path to the same file, whatever has become of its name since (proc(5)).
        self.path: Path | None = Path(f"/proc/self/fd/{descriptor}")
        self._identity = identity
        self._file: BinaryIO | None = None

    def read(self, size: int, /) -> bytes:
        """As `Payload.read`, from the file's start on."""
        if self._file is None:
            self._file = open(self.descriptor, "rb", closefd=False)  # noqa: SIM115 - owns nothing
        return self._file.read(size)

    def read_at(self, size: int, at: int) -> bytes:
        """`size` bytes from `at` on, fewer only at the end. Any thread. Raises: OSError."""
        data = os.pread(self.descriptor, size, at)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), at + len(data))):
            data += more
        return data

    def check(self) -> None:
        """As `Payload.check`."""
        if self._identity is not None and Identity.of(os.fstat(self.descriptor)) != self._identity:
            raise SourceChanged("changed while it was read")


@contextmanager
def open_unchanged(path: str, identity: Identity, *, below: str | None = None) -> Iterator[OpenFile]:
    """The file at a path, relative to the directory `below` if that is given, if it is still the same: links that have
    taken the place of a directory on the way lead to another file, and so nowhere.

    Raises: SourceChanged; OSError.
    """
    folder = None if below is None else os.open(below, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = os.open(path, _FILE, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceChanged("is gone") from error
    finally:
        if folder is not None:
            os.close(folder)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or Identity.of(status) != identity:
            raise SourceChanged("changed since it was found")
        yield OpenFile(descriptor, identity)
    finally:
        os.close(descriptor)


class Archive:
    """The bytes of an archive, at any place, for any thread: a file on disk, or what was decompressed from it into an
    unnamed temporary file, which is there until `close`."""

    def __init__(self, path: str, identity: Identity, decompressed: BinaryIO | None = None) -> None:
        self.path = path
        self._real_path = os.path.realpath(path)  # the path was given: links in it are meant
        self._identity = identity
        self._decompressed = decompressed
        self.size = identity.size if decompressed is None else os.fstat(decompressed.fileno()).st_size

    def position(self, at: int) -> str:
        """A place in it, for messages."""
        return f"byte {at}" if self._decompressed is None else f"byte {at} of what it holds decompressed"

    def decompressed(self, content: BinaryIO) -> Archive:
        """The same archive with what was in it, which is its own from now on."""
        return Archive(self.path, self._identity, content)

    def close(self) -> None:
        if self._decompressed is not None:
            self._decompressed.close()

    @contextmanager
    def opened(self) -> Iterator[OpenFile]:
        """Raises: SourceChanged; OSError."""
        if self._decompressed is not None:
            yield OpenFile(self._decompressed.fileno(), None)
            return
        with open_unchanged(self._real_path, self._identity) as file:
            yield file


class Members:
    """The files of an archive as they come: the last one of a name counts, as when an archive is unpacked."""

    def __init__(self, archive: Archive, report: Report) -> None:
        self._archive = archive
        self._report = report
        self._files: dict[str, SourceFile] = {}
        self._skipped: dict[str, Skipped] = {}
        self._directories: set[str] = set()
        self._filled: set[str] = set()

    def name_of(self, raw: str) -> str | None:
        """The name of a member as its entry has it; None, and the report says why, if no entry can have it."""
        name = without_dots(raw)
        try:
            check_writable(name)
        except InvalidEntryName as error:
            self._report.refuse(f"{self._archive.path}: {error}")
            return None
        return name

    def refuse(self, raw: str, reason: str) -> None:
        """A member that cannot be imported."""
        self._report.refuse(f"{self._archive.path}: {raw!r}: {reason}")

    def find(self, name: str) -> SourceFile | None:
        """The last file of a name."""
        return self._files.get(name)

    def find_skipped(self, name: str) -> Skipped | None:
        """What was skipped under a name."""
        return self._skipped.get(name)

    def add(self, file: SourceFile) -> None:
        """A regular file."""
        self._drop(file.name)
        self._skipped.pop(file.name, None)
        self._files[file.name] = file
        self._fill_parents(file.name)

    def add_directory(self, raw: str) -> None:
        """A directory: the root of all, written as `./`, is none."""
        name = without_dots(raw).strip("/")
        if name not in ("", "."):
            self._directories.add(name)
            self._fill_parents(name)

    def skip(self, raw: str, kind: Skipped) -> None:
        """Something else, which takes the place of a file of the same name."""
        self._report.skip(kind)
        name = without_dots(raw)
        self._drop(name)
        self._skipped[name] = kind
        self._fill_parents(name)

    def result(self) -> list[SourceFile]:
        """All files; directories with nothing in them are counted."""
        for _ in self._directories - self._filled:
            self._report.skip(Skipped.EMPTY_DIRECTORY)
        return list(self._files.values())

    def _drop(self, name: str) -> None:
        if self._files.pop(name, None) is not None:
            self._report.replace(f"{self._archive.path}: {name!r} is in it more than once: the last one counts")

    def _fill_parents(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        while folder and folder not in self._filled:
            self._filled.add(folder)
            folder = folder.rpartition("/")[0]


def time_or_none(mtime_ns: int) -> int | None:
    """A time that a file of any file system can have: signed 64 bits of nanoseconds."""
    return mtime_ns if -(2**63) <= mtime_ns < 2**63 else None


def without_dots(raw: str) -> str:
    """A member's name without the `./` in front that many archives have."""
    while raw.startswith("./"):
        raw = raw[2:]
    return raw
