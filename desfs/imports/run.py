"""From sources to containers in a store: found, placed, cut, built and put. Blocking; containers in threads.

Nothing is in the store before a container is whole: an import that dies leaves containers that are complete, payloads
of external files that no container names, and nothing else; done again, it stores everything once more under newer
generations, external payloads excepted, which are found and kept. Files of the same names from before are hidden by
it, as by any newer container. A packer that works on the same day looks at the listing, as this does: both put under
keys that are free, and take the next generation where they are not.

Temporary files, in TMPDIR: the containers that are being built, a few at a time; the content of an external file of an
archive, one at a time; what compressed tar archives hold, without a name. A process that is killed leaves the folder
desfs-import-* behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, tzinfo
from pathlib import Path
from types import FrameType
from typing import Any
from zoneinfo import ZoneInfo

import structlog

from des_format.blocks import BlockSummer
from des_format.errors import SizeMismatch
from des_format.shards import hex_group, is_day, parse_container_name, part_name, placement_shard, shard_hex
from des_format.writer import DesWriter
from desfs.errors import DesfsError, ObjectExists, StoreError, UsageError
from desfs.imports.opening import TemporaryFailed, open_source
from desfs.imports.source import Payload, Report, Source, SourceChanged, SourceDamaged, SourceFile
from desfs.layout import Layout
from desfs.packer.batch import cut_groups
from desfs.packer.build import Checksums, FileUnreadable, add_internal, file_meta, put_external
from desfs.packer.layout import settle_layout
from desfs.settings import ImportSettings
from desfs.store import open_store
from desfs.store.retrying import Retrying
from desfs.store.url import local_root

log = structlog.get_logger(__name__)

_PARALLEL = 4  # containers built and put at a time, as in the packer: some are hashed while others are uploaded
_CHUNK = 1024 * 1024
_SHOW_EVERY = 256  # files
_REMOVALS = 100  # of a folder in which threads that know nothing of its end go on making files
_ENDING = (signal.SIGINT, signal.SIGTERM)

# Files done, and how many there are: None while they are being found.
Progress = Callable[[int, int | None], None]
Effect = Callable[[str], None]


class Stopped(DesfsError):
    """The import was told to end."""


@dataclass(slots=True)
class Summary:
    """What an import has done so far; `report` has what it did not do. Sizes in bytes."""

    files: int = 0
    bytes: int = 0
    containers: int = 0
    external: int = 0
    days: set[date] = field(default_factory=set)
    report: Report = field(default_factory=Report)


@dataclass(frozen=True, slots=True)
class DayChoice:
    """Which day gets a file: `day`, or without one that of the file's modification time, in `timezone`."""

    timezone: tzinfo
    day: date | None

    def day_of(self, file: SourceFile) -> date:
        """Raises: ValueError for a file whose time is not known, or in no year of four digits."""
        if self.day is not None:
            return self.day
        if file.mtime_ns is None:
            raise ValueError("its modification time is not known, and so not its day")
        try:
            return datetime.fromtimestamp(file.mtime_ns // 10**9, self.timezone).date()
        except (ValueError, OverflowError, OSError):
            raise ValueError(f"its modification time, {file.mtime_ns // 10**9} s, is in no day") from None


def choose_day(day: str | None, day_from: str | None, timezone: str) -> DayChoice:
    """What `--day` and `--day-from` say; without them, today. Raises: UsageError."""
    zone = UTC if timezone == "UTC" else ZoneInfo(timezone)  # UTC needs no time zone database
    if day is not None and day_from is not None:
        raise UsageError("--day and --day-from exclude each other")
    if day_from is not None:
        if day_from != "mtime":
            raise UsageError(f"--day-from: found {day_from!r}, want mtime")
        return DayChoice(zone, None)
    if day is None:
        return DayChoice(zone, datetime.now(zone).date())
    if not is_day(day):
        raise UsageError(f"--day: found {day!r}, want a date such as 2026-11-20")
    return DayChoice(zone, date.fromisoformat(day))


def run_import(
    paths: Sequence[str],
    store_url: str,
    settings: ImportSettings,
    days: DayChoice,
    summary: Summary,
    *,
    progress: Progress = lambda done, total: None,
    effect: Effect = lambda name: None,
) -> None:
    """Import what is at the paths; `summary` tells how far it came, also after an error. Called in the main thread,
    SIGINT and SIGTERM end it when the requests under way have been answered, a second one at once.

    `effect` is called before each change of the store: tests die there.

    Raises: UsageError; StoreError; TemporaryFailed; KeyboardInterrupt for either signal.
    """
    _check_apart(paths, store_url)
    store = open_store(store_url, settings.s3_options(), deadline_s=settings.deadline, create=True)
    try:
        layout = settle_layout(store, settings.shard_bits, None)
        if layout.naming != "path":
            raise UsageError(
                f"{store.url} names its files by assigned ids, which only packers get: import into a store of its own"
            )
        with _temporary_folder() as folder, _signals(folder):
            _Import(store, layout, settings, days, summary, folder, progress, effect).run(paths)
    finally:
        store.close()


def _check_apart(paths: Sequence[str], store_url: str) -> None:
    """Refuse a store that is inside of what is to be imported. Raises: UsageError."""
    root = local_root(store_url)
    if root is None:
        return
    for path in paths:
        if os.path.isdir(path) and root.resolve().is_relative_to(Path(path).resolve()):
            raise UsageError(f"the store {store_url} is inside {path}: its containers would be imported")


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix="desfs-import-"))
    except OSError as error:
        raise TemporaryFailed(error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _signals(folder: Path) -> Iterator[None]:
    """The first signal is a KeyboardInterrupt; the second ends the process, without its temporary files."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = 0

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received == 1:
            raise KeyboardInterrupt
        for _ in range(_REMOVALS):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():  # from here on nobody can make a file in it
                break
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # What whoever started us had ignored (nohup, a job in the background) stays so.
    before = {number: handler for number in _ENDING if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, take)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Generations:
    """Keys that are free in a store, as far as its listings tell: only a PUT decides. Any thread."""

    def __init__(self, store: Retrying) -> None:
        self._store = store
        self._last: dict[date, dict[str, int]] = {}
        self._lock = threading.Lock()

    def next_key(self, day: date, shard: str) -> str:
        """A key of a shard that nobody got before. Raises: StoreError."""
        with self._lock:
            is_listed = day in self._last
        if not is_listed:
            self.refresh(day)
        group = hex_group(shard)
        with self._lock:
            last = self._last[day]
            last[group] = max(last.get(group, 0), 0) + 1  # a sealed container counts as -1
            return f"{day.isoformat()}/{part_name(shard, last[group])}"

    def refresh(self, day: date) -> None:
        """Look what a day has, at the beginning and when a key was taken by somebody else. Raises: StoreError."""
        listing = self._store.list(f"{day.isoformat()}/", delimiter=True)
        with self._lock:
            last = self._last.setdefault(day, {})
            for info in listing.objects:
                name = parse_container_name(info.key.rpartition("/")[2])
                if name is not None:
                    last[name.group] = max(last.get(name.group, 0), name.last)


class _Import:
    """One import. `run` in one thread; the containers in others."""

    def __init__(
        self,
        store: Retrying,
        layout: Layout,
        settings: ImportSettings,
        days: DayChoice,
        summary: Summary,
        folder: Path,
        progress: Progress,
        effect: Effect,
    ) -> None:
        self._store = store
        self._layout = layout
        self._settings = settings
        self._days = days
        self._summary = summary
        self._report = summary.report
        self._folder = folder
        self._progress = progress
        self._effect = effect
        self._generations = _Generations(store)
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of the summary and the progress
        self._copying = threading.Lock()  # one large file at a time lies in the temporary folder
        self._total = 0
        self._done = 0

    def run(self, paths: Sequence[str]) -> None:
        """As `run_import`."""
        sources: list[Source] = []
        try:
            self._publish(self._find(paths, sources))
        finally:
            for source in sources:
                source.close()

    # --- finding -------------------------------------------------------------------------------------------------

    def _find(self, paths: Sequence[str], sources: list[Source]) -> list[SourceFile]:
        """The files of all sources, placed; of those of one name and day the last one. A source that cannot be read
        is left out and reported."""
        found: dict[tuple[date, str], SourceFile] = {}
        for path in paths:
            try:
                source = open_source(path)
                sources.append(source)
                for file in source.files(self._report):
                    self._place(file, found)
            except (SourceDamaged, SourceChanged) as error:
                self._report.refuse(f"{path}: {error}")
            except OSError as error:
                self._report.refuse(f"{path}: {error.strerror or error}")
        self._drop_hidden(found)
        return list(found.values())

    def _place(self, file: SourceFile, found: dict[tuple[date, str], SourceFile]) -> None:
        try:
            file.day = self._days.day_of(file)
        except ValueError as error:
            self._report.refuse(f"{file.origin}: {error}")
            return
        if file.size > self._settings.max_file_size:
            self._report.refuse(
                f"{file.origin}: {file.size} bytes, more than the {self._settings.max_file_size} of one object"
            )
            return
        file.shard = shard_hex(placement_shard(file.name, self._layout.shard_bits), self._layout.shard_bits)
        before = found.get((file.day, file.name))
        if before is not None:
            self._report.replace(f"{before.origin}: {file.origin} has the same name and is the one that is imported")
        found[file.day, file.name] = file
        if len(found) % _SHOW_EVERY == 0:
            self._progress(len(found), None)

    def _drop_hidden(self, found: dict[tuple[date, str], SourceFile]) -> None:
        """Two sources may have a file and a directory of one name: a mount would show the directory."""
        folders: set[tuple[date, str]] = set()
        for day, name in found:
            folder = name.rpartition("/")[0]
            while folder and (day, folder) not in folders:
                folders.add((day, folder))
                folder = folder.rpartition("/")[0]
        for place in folders & found.keys():
            self._report.refuse(f"{found.pop(place).origin}: a directory of the same name would hide it")

    # --- containers ----------------------------------------------------------------------------------------------

    def _publish(self, files: list[SourceFile]) -> None:
        self._total = len(files)
        self._progress(0, self._total)
        plans = cut_groups(
            files,
            max_bytes=self._settings.max_container_bytes,
            max_files=self._settings.max_container_files,
            big_file_threshold=self._settings.big_file_threshold,
        )
        futures: list[Future[None]] = []
        with ThreadPoolExecutor(_PARALLEL, "import") as pool:
            try:
                futures.extend(pool.submit(self._publish_container, plan) for plan in plans)
                wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                log.warning("interrupted: waiting for what is under way; a second time ends it at once")
                raise
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        _raise_first(futures)

    def _publish_container(self, files: list[SourceFile]) -> None:
        day, shard = files[0].day, files[0].shard
        key = self._generations.next_key(day, shard)
        path = self._folder / key.replace("/", "_")
        try:
            packed = self._build(path, files, key)
            if packed:
                self._put(path, key, day, shard)
                self._count(packed)
        except OSError as error:  # of the container file: those of sources are caught for each
            raise TemporaryFailed(error) from error
        finally:
            path.unlink(missing_ok=True)

    def _build(self, path: Path, files: list[SourceFile], key: str) -> list[SourceFile]:
        """Write a container; external payloads are put into the store first. The files that are in it: one that
        changes meanwhile, or cannot be read, is left out and reported."""
        packed = []
        self._effect(f"build {key}")
        with DesWriter(path, big_file_threshold=self._settings.big_file_threshold) as writer:
            for file in files:
                if self._stop.is_set():
                    raise Stopped("the import was told to end")
                try:
                    self._add(writer, file, key)
                    packed.append(file)
                except SizeMismatch:
                    self._report.refuse(f"{file.origin}: changed while it was read")
                except (SourceDamaged, SourceChanged, FileUnreadable) as error:
                    self._report.refuse(f"{file.origin}: {error}")
                except StoreError as error:
                    if type(error) is not StoreError:  # those that say more concern the store, not the key
                        raise
                    self._report.refuse(f"{file.origin}: {error}")
                self._show()
            if not packed:
                writer.discard()
        return packed

    def _add(self, writer: DesWriter, file: SourceFile, key: str) -> None:
        """Raises: SizeMismatch; SourceDamaged; SourceChanged; FileUnreadable; StoreError; OSError."""
        with _opened(file) as payload:
            is_external = file.size >= self._settings.big_file_threshold
            checksums = Checksums(payload, BlockSummer(file.size) if is_external else None)

            def checked_meta() -> dict[str, Any]:
                payload.check()
                return file_meta(file.mtime_ns, file.mode, checksums)

            if not is_external:
                add_internal(writer, file.name, file.size, checksums, checked_meta)
                return
            with self._content(payload, checksums, file) as path:
                checksum = checked_meta()["sha256"]  # before the upload: what has changed already need not travel
                stored = put_external(self._store, path, key, file.name, checksum, self._effect, again=True)
                writer.add_external(file.name, file.size, checked_meta(), key=stored)

    @contextmanager
    def _content(self, payload: Payload, checksums: Checksums, file: SourceFile) -> Iterator[Path]:
        """Read a payload to its end; the path to a file that has just it, for as long as the block lasts."""
        if payload.path is not None:
            self._read_all(checksums, lambda piece: None)
            yield payload.path
            return
        with self._copying:
            free = shutil.disk_usage(self._folder).free
            if file.size > free:
                raise FileUnreadable(
                    f"needs {file.size} bytes in the directory for temporary files, {self._folder.parent}, which has "
                    f"{free}: set TMPDIR to another"
                )
            with tempfile.TemporaryFile(dir=self._folder) as temporary:
                self._read_all(checksums, temporary.write)
                temporary.flush()
                yield Path(f"/proc/self/fd/{temporary.fileno()}")

    def _read_all(self, checksums: Checksums, take: Callable[[bytes], object]) -> None:
        while piece := checksums.read(_CHUNK):
            if self._stop.is_set():
                raise Stopped("the import was told to end")
            take(piece)

    def _put(self, path: Path, key: str, day: date, shard: str) -> None:
        """Put a container, under the next generation if somebody else has taken its key."""
        while True:
            self._effect(f"put {key}")
            try:
                self._store.put(key, path)
                return
            except ObjectExists:
                self._generations.refresh(day)
                key = self._generations.next_key(day, shard)

    def _count(self, packed: list[SourceFile]) -> None:
        with self._lock:
            self._summary.containers += 1
            self._summary.files += len(packed)
            self._summary.bytes += sum(file.size for file in packed)
            self._summary.external += sum(file.size >= self._settings.big_file_threshold for file in packed)
            self._summary.days.add(packed[0].day)

    def _show(self) -> None:
        with self._lock:
            self._done += 1
            if self._done % _SHOW_EVERY == 0 or self._done == self._total:
                self._progress(self._done, self._total)


@contextmanager
def _opened(file: SourceFile) -> Iterator[Payload]:
    """Raises: SourceDamaged; SourceChanged; FileUnreadable."""
    with ExitStack() as stack:
        try:
            payload = stack.enter_context(file.open())
        except OSError as error:
            raise FileUnreadable(str(error.strerror or error)) from error
        yield payload


def _raise_first(futures: Sequence[Future[None]]) -> None:
    """What ended the import; those that were stopped by it say nothing new."""
    errors = [future.exception() for future in futures if not future.cancelled()]
    for error in sorted((error for error in errors if error is not None), key=lambda each: isinstance(each, Stopped)):
        raise error
