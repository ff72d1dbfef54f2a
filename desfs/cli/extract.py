"""`desfs extract`: files out of a store into a directory."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from des_format.errors import DesFormatError
from desfs.browse import Browser
from desfs.cli.browse import with_browser
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail
from desfs.errors import DesfsError
from desfs.fs import Attributes

_BATCH = 4 * 1024 * 1024  # bytes of small files that a thread writes while the next ones come
_BATCH_FILES = 256
# No set-user-ID bits: the files belong to whoever extracts them, and not to whom they were trusted with.
_PERMISSIONS = 0o777


class NotWritten(DesfsError):
    """A file could not be written; the message says which and why."""


@dataclass(frozen=True, slots=True)
class _Small:
    """A file whose bytes are here."""

    path: str
    attributes: Attributes
    data: bytes


# Shows files and bytes so far.
_Show = Callable[[int, int], None]


def extract(store: str, paths: list[str], to: str, options: dict[str, Any], *, overwrite: bool) -> int:
    """Write paths, and all below them, under a directory, by the names that they have in the store. The exit status."""
    try:
        os.makedirs(to, exist_ok=True)
        target = os.path.realpath(to)
    except OSError as error:
        return fail(f"{to}: {error.strerror}", EXIT_USAGE)

    async def main(browser: Browser) -> int:
        with _progress(sys.stderr.isatty()) as show:
            extraction = _Extraction(browser, target, overwrite, show)
            for path in paths:
                await extraction.take(path)
            await extraction.finish()
        for problem in browser.problems():
            fail(f"not all could be shown: {problem}", EXIT_FAILURE)
            extraction.failures += 1
        print(f"extracted {extraction.files} files ({extraction.bytes} bytes)")
        return EXIT_FAILURE if extraction.failures else 0

    return with_browser(store, options, main)


class _Extraction:
    """Files on their way: read in the order of the store, written in a thread, a batch behind the readers."""

    def __init__(self, browser: Browser, target: str, overwrite: bool, show: _Show) -> None:
        self.files = self.bytes = self.failures = 0
        self._browser = browser
        self._target = target
        self._overwrite = overwrite
        self._show = show
        self._batch: list[_Small] = []
        self._folders: set[str] = set()

    async def take(self, path: str) -> None:
        """A path and what is below it. What cannot be read or written is said, and the rest goes on."""
        try:
            async for at, attributes in self._browser.walk(path):
                try:
                    await self._take_one(at, attributes)
                except (DesfsError, DesFormatError) as error:
                    self._failed(error)
        except (DesfsError, DesFormatError) as error:
            self._failed(error)

    async def finish(self) -> None:
        """Write what is left."""
        batch, self._batch = self._batch, []
        for error in await trio.to_thread.run_sync(self._write_batch, batch):
            self._failed(error)

    async def _take_one(self, path: str, attributes: Attributes) -> None:
        if stat.S_ISDIR(attributes.mode):
            await trio.to_thread.run_sync(self._make_folder, path)
        elif attributes.size > _BATCH:
            await self._write_large(path, attributes)
        else:
            data = b"".join([bytes(piece) async for piece in self._browser.read(attributes)])
            self._batch.append(_Small(path, attributes, data))
            if len(self._batch) >= _BATCH_FILES or sum(len(each.data) for each in self._batch) >= _BATCH:
                await self.finish()

    def _write_batch(self, batch: list[_Small]) -> list[NotWritten]:
        errors = []
        for each in batch:
            try:
                with self._created(each.path, each.attributes) as file:
                    _write(file, each.data)
            except NotWritten as error:
                errors.append(error)
                continue
            self._count(len(each.data))
        return errors

    async def _write_large(self, path: str, attributes: Attributes) -> None:
        with self._created(path, attributes) as file:
            async for piece in self._browser.read(attributes):
                await trio.to_thread.run_sync(_write, file, piece)
        self._count(attributes.size)

    @contextmanager
    def _created(self, path: str, attributes: Attributes) -> Iterator[int]:
        """A new file, which is whole and has its time and mode at the end, or is not there. Raises: NotWritten."""
        folder, _, name = path.rpartition("/")
        self._make_folder(folder)
        full = os.path.join(self._target, folder, name)
        try:
            if self._overwrite and os.path.lexists(full):
                os.unlink(full)
            file = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NotWritten(f"{full}: {error.strerror}") from error
        try:
            yield file
            os.fchmod(file, stat.S_IMODE(attributes.mode) & _PERMISSIONS)
            os.utime(file, ns=(attributes.mtime_ns, attributes.mtime_ns))
        except BaseException as error:
            os.unlink(full)
            if isinstance(error, OSError):
                raise NotWritten(f"{full}: {error.strerror}") from error
            raise
        finally:
            os.close(file)

    def _make_folder(self, folder: str) -> None:
        """The directories of a path, none of them a symbolic link that leads elsewhere. Raises: NotWritten."""
        if folder in self._folders or not folder:
            return
        self._make_folder(folder.rpartition("/")[0])
        full = os.path.join(self._target, folder)
        try:
            if not stat.S_ISDIR(os.lstat(full).st_mode):
                raise NotWritten(f"{full}: is there and no directory")
        except FileNotFoundError:
            try:
                os.mkdir(full)
            except OSError as error:
                raise NotWritten(f"{full}: {error.strerror}") from error
        self._folders.add(folder)

    def _count(self, size: int) -> None:
        self.files += 1
        self.bytes += size
        self._show(self.files, self.bytes)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        fail(error, EXIT_FAILURE)


def _write(file: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


@contextmanager
def _progress(shown: bool) -> Iterator[_Show]:
    """A line on a terminal, nothing elsewhere."""
    if not shown:
        yield lambda files, size: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    text = TextColumn("extracting {task.fields[files]} files")
    columns = (SpinnerColumn(), text, TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("extracting", total=None, files=0)

        def show(files: int, size: int) -> None:
            bar.update(task, completed=size, files=files)

        yield show
