"""All that is in one container and in its external objects, compared with what the container says of it. Blocking:
`desfs.verify` runs one of these in each of its threads.

A container is read from its first byte to its last, once, in GETs of `WINDOW` bytes; the next one is under way while
one is compared. No more than two of them are in memory, and the columns of index and metadata. What turns out wrong is
read once more before it is called damage: it may have been the way's fault, not the store's.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from des_format.blocks import BlockChecksums
from des_format.checksum import crc32c
from des_format.codec import Buffer, parse_header
from des_format.errors import NotAContainer
from des_format.index import Index
from des_format.layout import HEADER
from des_format.names import external_keys
from des_format.plan import plan_gets
from des_format.shards import parse_container_name
from des_format.source import Opened, Tail, open_container
from desfs.container import StoreSource, meta_pieces, tail_length
from desfs.errors import BadAnswer, DeadlineExceeded, NoSuchObject, ObjectReplaced, StoreError
from desfs.layout import Layout
from desfs.store.base import Answer, ObjectInfo, Store
from desfs.verify_index import (
    Checksums,
    Kind,
    Problem,
    Rows,
    affordable,
    entry_label,
    extents,
    external_rows,
    index_problems,
    misplaced,
    overlapping,
    overridden_external_rows,
    payload_rows,
)

T = TypeVar("T")

WINDOW = 8 * 1024 * 1024  # bytes of a GET: its round trip is a tenth of its time at most, on a line of 1 Gbit/s
_META_HELD = 16 * 1024 * 1024  # bytes; a longer META region is read in pieces of that length
_ATTEMPTS = 3  # to read an external object that is replaced meanwhile
# Findings of one container that are kept, and with them memory and the patience of those who read them; the others are
# counted.
_KEPT: dict[Kind, int] = {"damage": 10_000, "warning": 100, "unverified": 1_000}
_POSITION = re.compile(r"at byte (\d+)")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to be said of an object. `container` is its key, "" for the store as a whole; `entry` a name in it;
    `offset` a byte of the container, or of the external object that `problem` names."""

    kind: Kind
    container: str
    entry: str | None
    offset: int | None
    problem: str


@dataclass(slots=True)
class Report:
    """What came of one container. `size` in bytes, with its external objects; `damaged`: something of the container
    itself, beside its entries; `counts` of findings, with those that are not kept; `externals`: the keys that it names;
    `failure` kept a part of it from being read."""

    container: str
    size: int = 0
    files: int = 0
    without_checksum: int = 0
    damaged: bool = False
    damaged_entries: int = 0
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[Kind] = field(default_factory=Counter)
    externals: set[str] = field(default_factory=set)
    failure: StoreError | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of its external objects are known."""
        return self.failure is None and not self.damaged


class Stopped(Exception):
    """Nobody wants the result any more."""


def in_turn(gets: Executor, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """The results of calls, in their order; the next one is under way while the caller works on one. Raises: what a
    call raises, in its turn."""
    pending: Future[T] | None = None
    try:
        for place, call in enumerate(calls):
            result = (gets.submit(call) if pending is None else pending).result()
            pending = gets.submit(calls[place + 1]) if place + 1 < len(calls) else None
            yield result
    finally:
        if pending is not None:
            pending.cancel()


class _Source(StoreSource):
    """As StoreSource, for threads that do not take turns with parsing. The tail is kept: most of a small container."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        super().__init__(store, info)
        self._tail = b""

    def tail(self, length: int) -> Tail:
        self._tail = b""
        tail = super().tail(length)
        self._tail = tail.data
        return tail

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self.window(start, stop))

    def window(self, start: int, stop: int, *, fresh: bool = False) -> bytes | memoryview:
        """[start, stop), from the store in any case if it is to be `fresh`."""
        kept_from = self._info.size - len(self._tail)
        if start >= kept_from and not fresh:
            return memoryview(self._tail)[start - kept_from : stop - kept_from]
        return self._store.get_range(self.key, start, stop, if_match=self._info.etag).data


class _Running:
    """The checksums of a payload that comes in pieces; those that nobody wants are not taken."""

    def __init__(self, stop: int, *, with_crc32c: bool, with_sha256: bool) -> None:
        self.stop = stop
        self.crc32c: int | None = 0 if with_crc32c else None
        self._sha256 = hashlib.sha256() if with_sha256 else None

    def update(self, piece: Buffer) -> None:
        """Take the next bytes."""
        if self.crc32c is not None:
            self.crc32c = crc32c(piece, self.crc32c)
        if self._sha256 is not None:
            self._sha256.update(piece)

    def digest(self) -> bytes | None:
        return None if self._sha256 is None else self._sha256.digest()


class _Blocks:
    """Compares a payload that comes in pieces, block by block, with the checksums of its blocks."""

    def __init__(self, wanted: BlockChecksums) -> None:
        self._wanted = wanted
        self._values = np.frombuffer(wanted.crc32c, "<u4")
        self._number = 0
        self._taken = 0  # of the current block
        self._crc32c = 0
        self.wrong: list[tuple[int, str]] = []  # first byte of the block, what to say of it

    def update(self, piece: Buffer) -> None:
        """Take the next bytes."""
        view = memoryview(piece)
        while view.nbytes:
            part = view[: self._wanted.block_size - self._taken]
            view = view[len(part) :]
            self._crc32c = crc32c(part, self._crc32c)
            self._taken += len(part)
            if self._taken == self._wanted.block_size:
                self.finish()

    def finish(self) -> None:
        """Compare the block whose last byte was taken."""
        if not self._taken:
            return
        wanted, start = int(self._values[self._number]), self._number * self._wanted.block_size
        if self._crc32c != wanted:
            self.wrong.append(
                (
                    start,
                    f"block {self._number} at byte {start}: found a crc32c of {self._crc32c:08x}, want {wanted:08x}",
                )
            )
        self._number, self._taken, self._crc32c = self._number + 1, 0, 0


class ContainerCheck:
    """One version of a container to be verified. `run` is called once, from any thread."""

    def __init__(
        self,
        store: Store,
        info: ObjectInfo,
        layout: Layout,
        gets: Executor,
        *,
        advance: Callable[[int], None] = lambda size: None,
        stop: threading.Event | None = None,
    ) -> None:
        """`gets` runs the requests, `advance` is told of bytes that were read, and `stop` ends it: run raises Stopped
        then."""
        self._store = store
        self._info = info
        self._layout = layout
        self._gets = gets
        self._advance = advance
        self._stop = threading.Event() if stop is None else stop
        self._source = _Source(store, info)
        self._report = Report(info.key)
        self._damaged_rows: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._external_sizes: dict[int, int] = {}
        self._counted = 0
        self._doing = "the index"

    def run(self) -> Report:
        """Read and compare. A failing store is a finding. Raises: NoSuchObject, ObjectReplaced when the container is
        not there any more; Stopped."""
        report = self._report
        try:
            self._run()
        except (NoSuchObject, ObjectReplaced):
            raise
        except StoreError as error:
            report.failure = error
            self._find("unverified", None, None, f"{self._doing} could not be read: {error}")
        finally:
            self._advance(self._info.size - self._counted)
        for kind, kept in _KEPT.items():
            if report.counts[kind] > kept:
                text = f"and {report.counts[kind] - kept} more findings of this kind"
                report.findings.append(Finding(kind, report.container, None, None, text))
        report.damaged_entries = int(np.count_nonzero(self._damaged_rows))
        report.size = self._info.size + sum(self._external_sizes.values())
        return report

    def _run(self) -> None:
        try:
            opened = self._open()
        except NotAContainer as error:
            self._refuse(error)
            return
        index = opened.index
        self._damaged_rows = np.zeros(index.rows, np.bool_)
        self._report.files = len(index)
        checksums = Checksums(index, partial(self._take, index))
        self._doing = "the metadata"
        for start, raw in self._meta(opened):
            checksums.fill(raw, start)
        key = parse_container_name(self._info.key.rpartition("/")[2])
        rows = payload_rows(index)
        for problem in chain(
            index_problems(index),
            checksums.empty_mismatches(),
            overlapping(index, rows),
            misplaced(index, key, self._layout) if key is not None else (),
        ):
            self._take(index, problem)
        self._report.without_checksum = checksums.without()
        self._check_payloads(index, checksums, rows)
        self._check_externals(index, checksums)

    # --- findings ------------------------------------------------------------------------------------------------

    def _find(self, kind: Kind, entry: str | None, offset: int | None, text: str) -> None:
        counts = self._report.counts
        counts[kind] += 1
        if counts[kind] <= _KEPT[kind]:
            self._report.findings.append(Finding(kind, self._info.key, entry, offset, text))

    def _find_in(self, index: Index, kind: Kind, row: int, offset: int | None, text: str) -> None:
        if kind == "damage":
            self._damaged_rows[row] = True
        self._find(kind, entry_label(index.name(row)), offset, text)

    def _take(self, index: Index, problem: Problem) -> None:
        self._find_in(index, problem.kind, problem.row, problem.offset, problem.text)

    def _refuse(self, error: NotAContainer) -> None:
        text = str(error).removeprefix(f"{self._info.key}: ")
        position = _POSITION.search(text)
        self._report.damaged = True
        self._find("damage", None, None if position is None else int(position[1]), text)

    # --- index and metadata --------------------------------------------------------------------------------------

    def _open(self) -> Opened:
        for again in (False, True):
            try:
                return open_container(self._source, tail_length=tail_length(self._info.size), max_meta=_META_HELD)
            except NotAContainer:
                if again:
                    raise
        raise AssertionError("unreachable")

    def _meta(self, opened: Opened) -> Iterator[tuple[int, bytes]]:
        if opened.meta is not None:
            yield opened.index.footer.meta_start, opened.meta
            return
        for start, stop in meta_pieces(opened.index, _META_HELD):
            self._check_stopped()
            yield start, self._source.read(start, stop)

    # --- payloads in DATA ----------------------------------------------------------------------------------------

    def _check_payloads(self, index: Index, checksums: Checksums, rows: Rows) -> None:
        rows = rows[checksums.has_any()[rows]]
        compared = affordable(index, rows)
        if compared < len(rows):
            self._find("unverified", None, None, f"{len(rows) - compared} payloads share their bytes without end")
            rows = rows[:compared]
        footer = index.footer
        regions = [(0, HEADER.size), (footer.data_start, footer.data_start + footer.data_length)]
        wrong = self._compare(index, checksums, rows, plan_gets(regions, max_request=WINDOW))
        if not wrong:
            return
        suspects = np.array(sorted(wrong), np.int64)
        ranges = zip(*(column.tolist() for column in extents(index, suspects)), strict=True)
        still = self._compare(index, checksums, suspects, plan_gets(ranges, max_request=WINDOW), fresh=True)
        for row in suspects.tolist():
            offset = int(index.data_offset[row])
            if row in still:
                self._find_in(index, "damage", row, offset, f"payload at byte {offset}: {still[row]}")
            else:
                self._find_in(
                    index, "warning", row, offset, f"payload at byte {offset}: {wrong[row]}, but not the second time"
                )

    def _compare(
        self,
        index: Index,
        checksums: Checksums,
        rows: Rows,
        ranges: Sequence[tuple[int, int]],
        *,
        fresh: bool = False,
    ) -> dict[int, str]:
        """What is wrong with the payloads of rows, in data order, that lie in ranges. The ranges are ascending, and
        those of one payload follow each other without a gap. `fresh`: for the second time."""
        starts, stops = extents(index, rows)
        wanted_crc32c, has_sha256 = checksums.wanted_crc32c(rows), checksums.has_sha256[rows]
        wrong: dict[int, str] = {}
        running: dict[int, _Running] = {}  # by row: payloads that go on in the next window
        for low, data in self._windows(ranges, fresh=fresh):
            if low == 0 and not fresh:
                self._check_header(data)
            high = low + len(data)
            view = memoryview(data).toreadonly()
            for row, payload in list(running.items()):
                payload.update(view[: payload.stop - low])
                if payload.stop <= high:
                    del running[row]
                    text = checksums.mismatch(row, payload.crc32c, payload.digest())
                    if text is not None:
                        wrong[row] = text
            first, last = np.searchsorted(starts, (low, high)).tolist()
            ends = stops[first:last] <= high
            whole = first + np.flatnonzero(ends)
            _compare_whole(
                checksums, view, rows[whole], starts[whole] - low, stops[whole] - low, wanted_crc32c[whole],
                has_sha256[whole], wrong,
            )  # fmt: skip
            for place in (first + np.flatnonzero(~ends)).tolist():
                payload = _Running(
                    int(stops[place]),
                    with_crc32c=bool(wanted_crc32c[place] >= 0),
                    with_sha256=bool(has_sha256[place]),
                )
                payload.update(view[int(starts[place]) - low :])
                running[int(rows[place])] = payload
        return wrong

    def _windows(
        self, ranges: Sequence[tuple[int, int]], *, fresh: bool = False
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        """The bytes of ranges, each with its first byte's place."""
        calls = [partial(self._source.window, start, stop, fresh=fresh) for start, stop in ranges]
        answers = in_turn(self._gets, calls)
        for start, _ in ranges:
            self._check_stopped()
            self._doing = f"what follows byte {start}"
            data = next(answers)
            yield start, data
            if not fresh:
                self._count(len(data))

    def _check_header(self, data: bytes | memoryview) -> None:
        try:
            parse_header(data[: HEADER.size], self._info.key)
        except NotAContainer:
            try:
                parse_header(self._source.window(0, HEADER.size, fresh=True), self._info.key)
            except NotAContainer as error:  # nobody reads it before payloads: they are compared all the same
                self._refuse(error)

    # --- external objects ----------------------------------------------------------------------------------------

    def _check_externals(self, index: Index, checksums: Checksums) -> None:
        for row in overridden_external_rows(index).tolist():
            self._report.externals.update(self._keys(index, checksums, row))
        rows = external_rows(index).tolist()
        for number, row in enumerate(rows):
            try:
                self._check_external(index, checksums, row)
            except (NoSuchObject, ObjectReplaced):
                raise
            except StoreError as error:
                self._report.failure = error
                self._find_in(index, "unverified", row, None, f"its external object could not be read: {error}")
                unread = rows[number:] if isinstance(error, DeadlineExceeded) else [row]
                for each in unread:
                    self._report.externals.update(self._keys(index, checksums, each))
                if len(unread) > 1:
                    self._find("unverified", None, None, f"{len(unread) - 1} more external objects were not read")
                    return

    def _keys(self, index: Index, checksums: Checksums, row: int) -> list[str]:
        return external_keys(self._info.key, index.name(row).decode(), checksums.meta.external_key.get(row))

    def _check_external(self, index: Index, checksums: Checksums, row: int) -> None:
        """Raises: NoSuchObject, ObjectReplaced when the container is not there any more; StoreError."""
        before: list[tuple[int | None, str]] | None = None
        for _ in range(_ATTEMPTS):
            try:
                found = self._read_external(index, checksums, row)
            except (NoSuchObject, ObjectReplaced):
                continue  # between two of its ranges
            if not found and before:
                text = f"{before[0][1]}, but not the second time"
                self._find_in(index, "warning", row, before[0][0], text)
            if not found:
                return
            if before is None:
                before = found
                continue
            # Whoever deletes or merges containers may have taken it away: then this one has gone as well.
            self._store.get_range(self._info.key, 0, 1, if_match=self._info.etag)
            for offset, text in found:
                self._find_in(index, "damage", row, offset, text)
            return
        self._find_in(index, "unverified", row, None, f"its external object changed {_ATTEMPTS} times in a row")

    def _read_external(self, index: Index, checksums: Checksums, row: int) -> list[tuple[int | None, str]]:
        """What is wrong with an external object, and where in it. Raises: NoSuchObject, ObjectReplaced when it changes
        meanwhile; StoreError."""
        size = int(index.data_length[row])
        keys = self._keys(index, checksums, row)
        first, key = self._first_of(keys, size)
        self._report.externals.update(keys if first is None else [key])
        if first is None:
            return [(None, f"external object {' or '.join(map(repr, keys))} is missing")]
        if first.size != size:
            return [(None, f"external object {key!r}: found {first.size} bytes, want {size}")]
        running = _Running(
            size, with_crc32c=bool(checksums.meta.has_crc32c[row]), with_sha256=bool(checksums.has_sha256[row])
        )
        wanted = checksums.meta.external_blocks.get(row)
        blocks = None if wanted is None else _Blocks(wanted)
        for data in self._pieces_of(key, first, size):
            self._check_stopped()
            running.update(data)
            if blocks is not None:
                blocks.update(data)
            if row not in self._external_sizes:
                self._advance(len(data))
        self._external_sizes[row] = size
        if blocks is not None:
            blocks.finish()
            if blocks.wrong:
                return [(offset, f"external object {key!r}: {text}") for offset, text in blocks.wrong]
        text = checksums.mismatch(row, running.crc32c, running.digest())
        return [] if text is None else [(0, f"external object {key!r}: {text}")]

    def _first_of(self, keys: Sequence[str], size: int) -> tuple[Answer | None, str]:
        """The first bytes of the object that a reader finds under one of these keys, and its key; at least its size
        when it is not as long as it should be. None when there is none."""
        for key in keys:
            try:
                if size:
                    return self._store.get_range(key, 0, min(size, WINDOW)), key
                return self._store.get_tail(key, 1), key  # an HTTP range cannot be empty
            except NoSuchObject:
                continue
            except BadAnswer as error:
                if error.temporary:
                    raise
                return self._store.get_tail(key, 1), key
        return None, keys[0]

    def _pieces_of(self, key: str, first: Answer, size: int) -> Iterator[bytes | memoryview]:
        if not size:
            return
        if len(first.data) != min(size, WINDOW):  # it had another size when it was asked for
            raise ObjectReplaced(f"{key!r} was replaced while it was read")
        yield first.data
        starts = range(len(first.data), size, WINDOW)
        calls = [partial(self._store.get_range, key, at, min(at + WINDOW, size), if_match=first.etag) for at in starts]
        for answer in in_turn(self._gets, calls):
            yield answer.data

    # --- progress ------------------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        size = min(size, self._info.size - self._counted)
        self._counted += size
        self._advance(size)

    def _check_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _compare_whole(
    checksums: Checksums,
    view: memoryview,
    rows: Rows,
    starts: Rows,
    stops: Rows,
    wanted_crc32c: npt.NDArray[np.int64],
    has_sha256: npt.NDArray[np.bool_],
    wrong: dict[int, str],
) -> None:
    """Compare payloads that are in `view`, from `starts` to `stops`, and note what is wrong by row. Here most of the
    time is spent: SHA-256 lets the other threads run from 2 KiB on."""
    value, sha256, wanted_sha256 = google_crc32c.value, hashlib.sha256, checksums.wanted_sha256
    taken: tuple[int, int] | None = None
    array = payload = np.frombuffer(view, np.uint8)  # what the checksum takes without a copy: des_format.checksum
    found_crc32c: int | None = None
    found_sha256: bytes | None = None
    columns = (rows, starts, stops, wanted_crc32c, has_sha256)
    for row, start, stop, crc, with_sha256 in zip(*(column.tolist() for column in columns), strict=True):
        if taken != (start, stop):  # payloads may be stored once for several rows
            taken = (start, stop)
            found_crc32c = found_sha256 = None
            payload = array[start:stop]
        if crc >= 0 and found_crc32c is None:
            found_crc32c = value(payload)
        if with_sha256 and found_sha256 is None:
            found_sha256 = sha256(view[start:stop]).digest()
        if (crc >= 0 and found_crc32c != crc) or (with_sha256 and found_sha256 != wanted_sha256(row)):
            text = checksums.mismatch(row, found_crc32c, found_sha256)
            if text is not None:
                wrong[row] = text
