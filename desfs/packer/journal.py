"""What a batch is about to do, written before it does it. Pure."""

from __future__ import annotations

import datetime

import msgspec

from desfs.spool import FileState

VERSION = 1


class JournalFile(msgspec.Struct, frozen=True, array_like=True):
    """A file of a container: its assigned name, and the state in which it was taken."""

    id: str
    inode: int
    size: int
    mtime_ns: int

    @property
    def state(self) -> FileState:
        return FileState(self.inode, self.size, self.mtime_ns)


class JournalContainer(msgspec.Struct):
    """A container that the batch puts: its key and place, the fencing token it is committed under, its files by their
    paths in the spool, and the mark of its row: tokens of two catalogs may be the same, ids are not."""

    key: str
    day: datetime.date
    shard: str
    generation: int
    token: int
    files: dict[str, JournalFile]
    mark: str = ""


class Journal(msgspec.Struct):
    """A batch. `version` is that of this layout."""

    version: int
    containers: list[JournalContainer]

    def encode(self) -> bytes:
        """The journal as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> Journal:
        """Raises: ValueError (msgspec's errors are) for what is no journal, or one of another version."""
        journal = msgspec.json.decode(raw, type=cls)
        if journal.version != VERSION:
            raise ValueError(f"journal version {journal.version}, want {VERSION}")
        return journal

    def file_of(self, path: str) -> tuple[JournalContainer, JournalFile] | None:
        """What was planned for a path."""
        for container in self.containers:
            if path in container.files:
                return container, container.files[path]
        return None
