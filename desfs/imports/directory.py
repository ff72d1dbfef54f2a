"""Directories and single files as sources. No symbolic link is followed below a path that was given."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from des_format.errors import InvalidEntryName
from des_format.names import check_writable
from desfs.imports.source import Identity, OpenFile, Report, Skipped, SourceFile, open_unchanged, skipped_kind
from desfs.spool import INTERNAL

_PERMISSIONS = 0o7777
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True, kw_only=True)
class DiskFile(SourceFile):
    """A file below the directory `root`, or at the path `root` itself."""

    root: str
    is_root: bool
    device: int
    inode: int

    @property
    def origin(self) -> str:
        return repr(self.root if self.is_root else os.path.join(self.root, self.name))

    def open(self) -> AbstractContextManager[OpenFile]:
        assert self.mtime_ns is not None
        identity = Identity(self.device, self.inode, self.size, self.mtime_ns)
        if self.is_root:
            # The path was given: links in it are meant.
            return open_unchanged(os.path.realpath(self.root), identity)
        return open_unchanged(self.name, identity, below=self.root)


class DirectorySource:
    """All that is below a directory, by names relative to it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def files(self, report: Report) -> Iterator[SourceFile]:
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                listed = self._list(folder)
            except OSError as error:
                if not folder:
                    raise
                report.refuse(f"{os.path.join(self.path, folder)!r}: {error.strerror or error}")
                continue
            if folder and not listed:
                report.skip(Skipped.EMPTY_DIRECTORY)
            for base, status in listed:
                name = f"{folder}/{base}" if folder else base
                kind = skipped_kind(status.st_mode)
                if name == INTERNAL and stat.S_ISDIR(status.st_mode):
                    kind = Skipped.PACKERS_OWN
                if kind is not None:
                    report.skip(kind)
                elif not (problem := _name_problem(name)):
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(name)
                    else:
                        yield _disk_file(self.path, name, status)
                else:
                    report.refuse(f"{self.path}: {problem}")

    def close(self) -> None:
        """Nothing is kept open."""

    def _list(self, folder: str) -> list[tuple[str, os.stat_result]]:
        """Names and states of a directory, ascending. Raises: OSError, NotADirectoryError for a link on the way."""
        listed = []
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in folder.split("/") if folder else ():
                below = os.open(name, _DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # deleted meanwhile: as if it had been a moment earlier
                        listed.append((entry.name, entry.stat(follow_symlinks=False)))
        finally:
            os.close(descriptor)
        return sorted(listed, key=lambda each: os.fsencode(each[0]))


class FileSource:
    """One file that is no archive, by its base name."""

    def __init__(self, path: str, status: os.stat_result) -> None:
        self.path = path
        self._status = status

    def files(self, report: Report) -> Iterator[SourceFile]:
        name = os.path.basename(self.path)
        problem = _name_problem(name)
        if problem:
            report.refuse(f"{self.path}: {problem}")
        else:
            yield _disk_file(self.path, name, self._status, is_root=True)

    def close(self) -> None:
        """Nothing is kept open."""


def _disk_file(root: str, name: str, status: os.stat_result, *, is_root: bool = False) -> DiskFile:
    return DiskFile(
        name=name,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        mode=status.st_mode & _PERMISSIONS,
        root=root,
        is_root=is_root,
        device=status.st_dev,
        inode=status.st_ino,
    )


def _name_problem(name: str) -> str:
    """Why no entry can have a name; empty if one can."""
    try:
        check_writable(name)
    except InvalidEntryName as error:
        return str(error)
    return ""
