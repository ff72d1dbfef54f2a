"""Reading containers: from files and from S3, one interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from des_format.cache import IndexCache
from des_format.codec import decode_meta, parse_header
from des_format.errors import CorruptEntry, CorruptMeta, NoSuchEntry, ObjectReplaced
from des_format.index import TOMBSTONE, Index
from des_format.layout import EXTERNAL, FOOTER, HEADER
from des_format.meta import verify_payload
from des_format.plan import DEFAULT_MAX_GAP, DEFAULT_MAX_REQUEST, plan_gets
from des_format.source import DEFAULT_TAIL, FileSource, Opened, RangeSource, cut, open_container

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ContainerStats:
    """Sums over a container, bytes throughout. `dead_bytes` is DATA that no shown entry uses."""

    files: int
    external_files: int
    container_bytes: int
    payload_bytes: int
    external_bytes: int
    dead_bytes: int
    data_bytes: int
    meta_bytes: int
    index_bytes: int


class BaseReader:
    """What `DesReader` and `S3DesReader` share. Reads may come from any thread; every payload whose metadata has a
    checksum is verified before it is returned."""

    def __init__(self, source: RangeSource, cache: IndexCache | None, tail_length: int) -> None:
        self._source = source
        self._cache = cache
        self._tail_length = tail_length
        self._lock = threading.Lock()
        self._opened = open_container(source, cache=cache, tail_length=tail_length)
        self._confirmed = self._opened.confirmed

    def list_files(self) -> list[str]:
        """The names of all entries that a reader shows, in data order."""
        return list(self.get_index())

    def get_index(self) -> Index:
        """The index, as the container's current version has it."""
        self._confirm()
        return self._opened.index

    def get_meta(self, name: str) -> dict[str, Any]:
        """The metadata of an entry, `size` included; {} if it has none. Raises: NoSuchEntry, CorruptMeta."""
        self._confirm()
        return self._meta(self._opened, self._opened.index.find_shown(name))

    def get_file(self, name: str) -> bytes:
        """The payload of an entry, external ones included.

        Raises: NoSuchEntry; CorruptEntry (UnsupportedEntry) when it cannot be served; SourceError.
        """
        payloads = self.get_files_batch([name])
        if name not in payloads:
            raise NoSuchEntry(f"{self._source.key}: no entry {name!r}")
        return payloads[name]

    def get_files_batch(self, names: Iterable[str], max_gap: int = DEFAULT_MAX_GAP) -> dict[str, bytes]:
        """The payloads of many entries, by name in the order asked for; names that the container has not are left out.

        Entries with at most `max_gap` bytes between them share one read. Raises: CorruptEntry for the first entry that
        cannot be served; SourceError.
        """
        asked = list(dict.fromkeys(names))
        return self._on_current(lambda opened: self._batch(opened, asked, max_gap))

    def get_stats(self) -> ContainerStats:
        """Sums over the container, from its index alone."""
        index = self.get_index()
        rows = index.shown()
        external = (index.flags[rows] & EXTERNAL) != 0
        lengths = index.data_length[rows]
        inside = int(lengths[~external].sum(dtype=np.uint64))
        footer = index.footer
        return ContainerStats(
            files=len(rows),
            external_files=int(np.count_nonzero(external)),
            container_bytes=self._opened.size,
            payload_bytes=inside,
            external_bytes=int(lengths[external].sum(dtype=np.uint64)),
            dead_bytes=max(footer.data_length - inside, 0),
            data_bytes=footer.data_length,
            meta_bytes=footer.meta_length,
            index_bytes=footer.index_length,
        )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.get_index()

    def __len__(self) -> int:
        return len(self.get_index())

    def close(self) -> None:
        """Release what the reader holds open. Calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reload(self) -> None:
        with self._lock:
            if not self._confirmed:
                self._opened = open_container(
                    self._source, cache=self._cache, tail_length=self._tail_length, trust_cache=False
                )
                self._confirmed = True

    def _confirm(self) -> None:
        """Make sure that an index which came from a cache is that of the version in the store."""
        self._on_current(lambda opened: None)

    def _on_current(self, action: Callable[[Opened], T]) -> T:
        """The result of an action on the version that is in the store; it is run again when it worked on a version that
        came from a cache, and the store has another."""
        opened = self._opened
        if self._confirmed:
            return action(self._opened)
        try:
            result = action(opened)
        except ObjectReplaced:
            self._reload()
            if self._opened is opened:
                raise
        except CorruptEntry:
            if self._is_current(opened):
                raise
        else:
            if self._is_current(opened):  # also when nothing had to be read: an empty payload may not be empty any more
                return result
        return action(self._opened)

    def _is_current(self, opened: Opened) -> bool:
        """Whether this is the version in the store; if not, that one has been opened."""
        if not self._confirmed:
            try:
                self._read(opened, opened.size - FOOTER.size, opened.size)
            except ObjectReplaced:
                self._reload()
        return self._opened is opened

    def _read(self, opened: Opened, start: int, stop: int) -> bytes:
        """A range of the version that `opened` describes. Raises: ObjectReplaced, also when another thread has opened a
        newer one."""
        if self._confirmed and self._opened is opened:  # from now on the source's version does not change
            return self._source.read(start, stop)
        with self._lock:
            if self._opened is not opened:
                raise ObjectReplaced(f"{self._source.key}: version {opened.etag} was replaced by {self._opened.etag}")
            data = self._source.read(start, stop)
            self._confirmed = True
            return data

    def _meta(self, opened: Opened, row: int) -> dict[str, Any]:
        index = opened.index
        start, length = int(index.meta_offset[row]), int(index.meta_length[row])
        name = index.entry(row).name
        problem = index.problem(row)
        if problem is not None and length == 0:
            raise CorruptMeta(f"{index.container}: {problem}")
        if length == 0:
            return {}
        if opened.meta is None:
            raw = self._read(opened, start, start + length)
        else:
            raw = opened.meta[start - index.footer.meta_start :][:length]
        return decode_meta(raw, int(index.data_length[row]), f"{index.container}: {name!r}")

    def _batch(self, opened: Opened, names: list[str], max_gap: int) -> dict[str, bytes]:
        index = opened.index
        rows: dict[str, int] = {}
        for name in names:
            row = index.find(name.encode("utf-8", "surrogatepass"))
            if row is not None and not index.state[row] & TOMBSTONE:
                index.check_readable(row)
                rows[name] = row
        metas = {row: self._meta_if_sound(opened, row) for row in rows.values()}
        extents = {
            row: (int(index.data_offset[row]), int(index.data_offset[row]) + int(index.data_length[row]))
            for row in rows.values()
            if not index.flags[row] & EXTERNAL
        }
        gets = plan_gets(extents.values(), max_gap=max_gap)
        pieces = [(start, self._read(opened, start, stop)) for start, stop in gets]
        payloads = {}
        for name, row in rows.items():
            if row in extents:
                payloads[name] = self._verified(opened, row, metas[row], cut(pieces, *extents[row]))
            else:
                payloads[name] = self._external(index, row, metas[row])
        return payloads

    def _meta_if_sound(self, opened: Opened, row: int) -> dict[str, Any]:
        try:
            return self._meta(opened, row)
        except CorruptMeta:
            return {}  # its bytes are served all the same; get_meta reports the damage

    def _verified(self, opened: Opened, row: int, meta: dict[str, Any], payload: bytes) -> bytes:
        index = opened.index
        try:
            verify_payload(meta, payload, index, row)
        except CorruptEntry:
            start = int(index.data_offset[row])
            payload = self._read(
                opened, start, start + len(payload)
            )  # once more: the store may hold it, and the way not
            verify_payload(meta, payload, index, row)
        return payload

    def _external(self, index: Index, row: int, meta: dict[str, Any]) -> bytes:
        size = int(index.data_length[row])
        name = index.entry(row).name
        recorded = meta.get("external_key")
        pieces = [
            self._source.external(name, recorded, start, min(start + DEFAULT_MAX_REQUEST, size), size)
            for start in range(0, size, DEFAULT_MAX_REQUEST)
        ] or [self._source.external(name, recorded, 0, 0, 0)]
        payload = b"".join(pieces)
        verify_payload(meta, payload, index, row)
        return payload


class DesReader(BaseReader):
    """A container in a local file; its external files are beside it, in `_bigFiles/`."""

    def __init__(self, path: str | os.PathLike[str], cache: IndexCache | None = None) -> None:
        """Raises: NotAContainer naming the position; NoSuchObject, SourceUnavailable."""
        self._file = FileSource(path)
        try:
            super().__init__(self._file, cache, DEFAULT_TAIL)
            parse_header(self._file.read(0, HEADER.size), self._file.key)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()


class S3DesReader(BaseReader):
    """A container in S3: opened with one ranged GET of its tail (a second one only if that was too short), and no HEAD;
    every later GET carries If-Match, so bytes of another version are never returned.

    With a cache that has seen the container, opening costs no request: the first read shows whether it has been
    replaced, in which case it is opened afresh.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        client: S3Client | None = None,
        cache: IndexCache | None = None,
        *,
        tail_length: int = DEFAULT_TAIL,
    ) -> None:
        """`client` is boto3's; without one, it is made from the usual AWS environment.

        Raises: NotAContainer naming the position; NoSuchObject; SourceError.
        """
        from des_format.s3 import default_client
        from des_format.s3_source import S3RangeSource

        super().__init__(S3RangeSource(client or default_client(), bucket, key), cache, tail_length)
