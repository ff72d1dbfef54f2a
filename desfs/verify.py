"""Reading every byte of a store, and comparing it with what its containers say. Blocking, with threads of its own.

What is damage and what is not:

    damage      no container under a container's key; an entry whose payload, external object or metadata is not what
                index and checksums say, or cannot be read by anybody; a layout (`.desfs.json`) that is no JSON
    warning     what readers cope with or do not look at: names that are never shown, metadata without a checksum that
                is broken, entries in the wrong shard, objects that are no containers or that no container names
    unverified  what could not be read: nothing is known of it

A container that is replaced or deleted meanwhile is no damage: the store is listed again, and what is new is verified.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from des_format.layout import BIG_FILES_FOLDER
from des_format.names import name_problem
from des_format.shards import CONTAINER_SUFFIX, is_day, parse_container_name
from desfs.errors import AccessDenied, DeadlineExceeded, NoSuchObject, ObjectReplaced, StoreError
from desfs.layout import CONTROL_NAME, LAYOUT_KEY, LAYOUT_LIMIT, Layout
from desfs.store.base import ObjectInfo, Store
from desfs.verify_container import ContainerCheck, Finding, Report
from desfs.verify_index import Kind

__all__ = ["Contents", "Finding", "Summary", "Verification", "sort_objects"]

AT_A_TIME = 4  # containers: as many GETs under way, and two windows of each in memory
_ROUNDS = 3  # listings, while containers change
# Containers one after the other that the store did not answer for: after so many the others are not tried. Each takes
# its whole deadline.
_GIVE_UP = 2 * AT_A_TIME
_NAMED = 100  # objects that are no containers, of one reason; the others are counted
_LIKE_A_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


@dataclass(slots=True)
class Summary:
    """What was verified, and what came of it. `size` in bytes, with external objects; `damaged_containers`: those that
    are none, or whose header is damaged; `damaged_layout`: `.desfs.json`."""

    containers: int = 0
    files: int = 0
    size: int = 0
    damaged_containers: int = 0
    damaged_entries: int = 0
    containers_with_damaged_entries: int = 0
    damaged_layout: bool = False
    without_checksum: int = 0
    warnings: int = 0
    unverified: int = 0

    @property
    def is_damaged(self) -> bool:
        return self.damaged_containers > 0 or self.damaged_entries > 0 or self.damaged_layout


@dataclass(slots=True)
class Contents:
    """A listing, sorted: the containers, external objects (bytes by key), whether there is a layout, and what there is
    to say of it."""

    containers: list[ObjectInfo] = field(default_factory=list)
    externals: dict[str, int] = field(default_factory=dict)
    has_layout: bool = False
    findings: list[Finding] = field(default_factory=list)


def sort_objects(objects: Iterable[ObjectInfo]) -> Contents:
    """Which objects of a store are containers, as a mount sees it. Pure."""
    contents = Contents()
    foreign: list[str] = []
    for info in objects:
        *folders, name = info.key.split("/")
        if info.key == LAYOUT_KEY:
            contents.has_layout = True
        elif BIG_FILES_FOLDER in folders:
            contents.externals[info.key] = info.size
        elif len(folders) > 1 or parse_container_name(name) is None:
            foreign.append(info.key)
        else:
            problem = name_problem(info.key.encode("utf-8", "surrogateescape"))
            if problem is not None:
                contents.findings.append(_about(info.key, "warning", f"is never shown, and not verified: {problem}"))
                continue
            contents.containers.append(info)
            shown_as = folders[0] if folders else name.removesuffix(CONTAINER_SUFFIX)
            if shown_as == CONTROL_NAME:
                contents.findings.append(
                    _about(info.key, "warning", "is never shown: its name is that of the control directory")
                )
            elif _LIKE_A_DAY.fullmatch(shown_as) and not is_day(shown_as):
                contents.findings.append(_about(info.key, "warning", f"is of the day {shown_as}, which is no date"))
    contents.findings += _named(foreign, "is no container")
    return contents


def _about(key: str, kind: Kind, problem: str) -> Finding:
    return Finding(kind, key, None, None, problem)


def _named(keys: Sequence[str], problem: str) -> Iterator[Finding]:
    """A warning of each object, and one of those that are too many."""
    for key in keys[:_NAMED]:
        yield _about(key, "warning", problem)
    if len(keys) > _NAMED:
        yield _about("", "warning", f"{len(keys) - _NAMED} more objects: each {problem}")


class Verification:
    """Verifies a store, or a container of it, once. One thread at a time."""

    def __init__(
        self,
        store: Store,
        found: Callable[[Finding], None],
        *,
        expect: Callable[[int], None] = lambda size: None,
        advance: Callable[[int], None] = lambda size: None,
    ) -> None:
        """`found` is told of each finding, in the caller's thread; those of one container come together, when it is
        done. `expect` is told of bytes that will be read, as far as that is known, and `advance`, from any thread, of
        bytes that were."""
        self._store = store
        self._found = found
        self._expect = expect
        self._advance = advance
        self._summary = Summary()
        self._seen: set[tuple[str, str]] = set()
        self._named_externals: set[str] = set()
        self._is_complete = True  # whether every external object that is named is known
        self._failed = 0  # containers in a row
        self._gave_up = False
        self._stop = threading.Event()

    def store(self) -> Summary:
        """Verify all of it. Raises: StoreError when it cannot be listed; what `found` raises."""
        latest = sort_objects(self._store.list().objects)
        for finding in latest.findings:
            self._tell(finding)
        layout = self._layout(listed=True) if latest.has_layout else Layout()
        self._expect(sum(latest.externals.values()))

        def again() -> list[ObjectInfo]:
            nonlocal latest
            latest = sort_objects(self._store.list().objects)
            return latest.containers

        self._check_rounds(latest.containers, again, layout)
        orphans = sorted(latest.externals.keys() - self._named_externals)
        of_those = "no container" if self._is_complete else "no container that could be read"
        for finding in _named(orphans, f"is named by {of_those}: left over, or its container is still to come"):
            self._tell(finding)
        return self._summary

    def container(self, key: str) -> Summary:
        """Verify one container and its external objects. Raises: NoSuchObject, StoreError when it cannot be found;
        what `found` raises."""

        def look() -> list[ObjectInfo]:
            tail = self._store.get_tail(key, 1)  # no LIST: one who may read an object may not be allowed to
            return [ObjectInfo(key, tail.size, tail.etag, 0)]

        first = look()
        self._check_rounds(first, look, self._layout(listed=False))
        return self._summary

    def _layout(self, *, listed: bool) -> Layout:
        """What the store says of its names; nothing where it cannot be had. `listed`: it is there."""
        try:
            layout = msgspec.json.decode(self._store.get_tail(LAYOUT_KEY, LAYOUT_LIMIT).data, type=Layout)
        except NoSuchObject:
            return Layout()
        except StoreError as error:
            # AccessDenied is also what S3 says of an object that is not there, to those who may not list.
            if listed or not isinstance(error, AccessDenied):
                self._tell(_about(LAYOUT_KEY, "unverified", f"could not be read: {error}"))
            return Layout()
        except (msgspec.MsgspecError, RecursionError) as error:
            self._summary.damaged_layout = True
            self._tell(_about(LAYOUT_KEY, "damage", f"is not understood: {error}"))
            return Layout()
        if not layout.is_known:
            self._tell(
                _about(LAYOUT_KEY, "warning", f"found {layout}, which this version does not know: no name was checked")
            )
        return layout

    def _tell(self, finding: Finding) -> None:
        self._summary.warnings += finding.kind == "warning"
        self._summary.unverified += finding.kind == "unverified"
        self._found(finding)

    # --- containers ----------------------------------------------------------------------------------------------

    def _check_rounds(
        self, containers: list[ObjectInfo], again: Callable[[], list[ObjectInfo]], layout: Layout
    ) -> None:
        """Verify containers; those that change meanwhile as they are `again`, with what is new then."""
        with self._threads() as (workers, gets):
            for attempt in range(1, _ROUNDS + 1):
                changed = self._check_all(containers, layout, workers, gets)
                if not changed or self._gave_up:
                    return
                if attempt == _ROUNDS:
                    break
                try:
                    containers = [info for info in again() if (info.key, info.etag) not in self._seen]
                except NoSuchObject as error:  # the one container that was asked for
                    self._fail(_about(changed[0], "unverified", f"was deleted while it was read: {error}"))
                    return
                except StoreError as error:
                    for key in changed:
                        self._fail(_about(key, "unverified", f"changed while it was read, and then: {error}"))
                    return
            for key in changed:
                self._fail(_about(key, "unverified", f"changed {_ROUNDS} times while it was read"))

    def _fail(self, finding: Finding) -> None:
        self._is_complete = False
        self._tell(finding)

    @contextmanager
    def _threads(self) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
        """Threads for containers, and for their GETs. Whoever leaves early waits for the GETs under way alone."""
        workers = ThreadPoolExecutor(AT_A_TIME, "verify")
        gets = ThreadPoolExecutor(AT_A_TIME, "verify-get")
        try:
            yield workers, gets
        finally:
            self._stop.set()
            workers.shutdown(cancel_futures=True)
            gets.shutdown(cancel_futures=True)

    def _check_all(
        self, containers: list[ObjectInfo], layout: Layout, workers: ThreadPoolExecutor, gets: ThreadPoolExecutor
    ) -> list[str]:
        """Verify containers; the keys of those that were replaced or deleted meanwhile."""
        self._expect(sum(info.size for info in containers))
        waiting = iter(containers)
        running: dict[Future[Report], ObjectInfo] = {}
        changed: list[str] = []
        while True:
            for info in islice(waiting, 2 * AT_A_TIME - len(running)):
                check = ContainerCheck(self._store, info, layout, gets, advance=self._advance, stop=self._stop)
                running[workers.submit(check.run)] = info
            if not running:
                return changed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                info = running.pop(future)
                try:
                    report = future.result()
                except (NoSuchObject, ObjectReplaced):
                    changed.append(info.key)
                    continue
                self._seen.add((info.key, info.etag))
                self._take(report)
                self._failed = self._failed + 1 if isinstance(report.failure, DeadlineExceeded) else 0
            if self._failed >= _GIVE_UP:
                self._gave_up = True
                left = sum(1 for _ in waiting)
                if left:
                    self._fail(_about("", "unverified", f"{left} containers were not tried: the store does not answer"))

    def _take(self, report: Report) -> None:
        summary = self._summary
        summary.containers += 1
        summary.files += report.files
        summary.size += report.size
        summary.damaged_containers += report.damaged
        summary.damaged_entries += report.damaged_entries
        summary.containers_with_damaged_entries += report.damaged_entries > 0
        summary.without_checksum += report.without_checksum
        summary.warnings += report.counts["warning"]
        summary.unverified += report.counts["unverified"]
        self._named_externals |= report.externals
        self._is_complete &= report.is_complete
        for finding in report.findings:
            self._found(finding)
