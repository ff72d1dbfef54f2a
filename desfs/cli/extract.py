"""`desfs extract`: files out of a store into a directory."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio

from des_format.errors import DesFormatError
from desfs.browse import Browser
from desfs.cli.browse import with_browser
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail
from desfs.entries import Attributes
from desfs.errors import DesfsError

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
            try:
                for path in paths:
                    await extraction.take(path)
                await extraction.finish()
            finally:
                extraction.close()
        for problem in browser.problems():
            fail(f"not all could be shown: {problem}", EXIT_FAILURE)
            extraction.failures += 1
        print(f"extracted {extraction.files} files ({extraction.bytes} bytes)")
        return EXIT_FAILURE if extraction.failures else 0

    return with_browser(store, options, main)


class _Extraction:
    """Files on their way: read in the order of the store, written in a thread, a batch behind the readers. One thread
    writes at a time. Below the target everything is reached from open directories, so that no symbolic link that
    somebody puts there leads elsewhere."""

    def __init__(self, browser: Browser, target: str, overwrite: bool, show: _Show) -> None:
        """Raises: NotWritten."""
        self.files = self.bytes = self.failures = 0
        self._browser = browser
        self._target = target
        self._overwrite = overwrite
        self._show = show
        self._batch: list[_Small] = []
        self._folder = ""  # that `_folder_fd` is
        self._folder_fd = -1

    async def take(self, path: str) -> None:
        """A path and what is below it. What cannot be read or written is said, and the rest goes on."""
        try:
            async for at, attributes in self._browser.walk(path, self._failed):
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

    def close(self) -> None:
        """Let go of the directory that is open."""
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1

    async def _take_one(self, path: str, attributes: Attributes) -> None:
        if stat.S_ISDIR(attributes.mode):
            await self.finish()
            await trio.to_thread.run_sync(self._enter, path)
        elif attributes.size > _BATCH:
            await self.finish()
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
        """A file that gets its name, time and mode when it is whole; until then what had the name has it.

        Raises: NotWritten.
        """
        folder, _, name = path.rpartition("/")
        at = self._enter(folder)
        temporary = f".desfs-{os.getpid()}-{self.files}.part"
        with self._named(path):
            if not self._overwrite and _is_there(name, at):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(temporary, flags, 0o600, dir_fd=at)
        try:
            with self._named(path):
                yield file
                os.fchmod(file, stat.S_IMODE(attributes.mode) & _PERMISSIONS)
                os.utime(file, ns=(attributes.mtime_ns, attributes.mtime_ns))
                if self._overwrite:
                    os.replace(temporary, name, src_dir_fd=at, dst_dir_fd=at)
                else:
                    os.link(temporary, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
        finally:
            os.close(file)
            with suppress(FileNotFoundError):  # replaced
                os.unlink(temporary, dir_fd=at)

    def _enter(self, folder: str) -> int:
        """The open directory of that path below the target; made where it is missing. Raises: NotWritten."""
        if folder == self._folder and self._folder_fd >= 0:
            return self._folder_fd
        self.close()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._named(""):
            at = os.open(self._target, flags)
        try:
            so_far = ""
            for part in filter(None, folder.split("/")):
                so_far = f"{so_far}/{part}".lstrip("/")
                with self._named(so_far):
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=at)
                    try:
                        below = os.open(part, flags, dir_fd=at)
                    except OSError as error:
                        if error.errno in (errno.ENOTDIR, errno.ELOOP):
                            raise NotWritten(f"{self._full(so_far)}: is there and no directory") from None
                        raise
                os.close(at)
                at = below
        except BaseException:
            os.close(at)
            raise
        self._folder, self._folder_fd = folder, at
        return at

    @contextmanager
    def _named(self, path: str) -> Iterator[None]:
        """Errors of the system's name the path."""
        try:
            yield
        except OSError as error:
            raise NotWritten(f"{self._full(path)}: {error.strerror}") from error

    def _full(self, path: str) -> str:
        return os.path.join(self._target, path)

    def _count(self, size: int) -> None:
        self.files += 1
        self.bytes += size
        self._show(self.files, self.bytes)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        fail(error, EXIT_FAILURE)


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


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
