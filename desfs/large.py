"""Payloads that are in no block: external objects, large ones, and those that share bytes with others. Trio.

They are read in units, ahead of a reader who walks forward. META of an external object may have the checksum of each of
its blocks: a unit is verified by itself then. Where it has a checksum of the whole alone, all of it is read once before
anybody sees a byte, and the CRC-32C of each unit is noted for the time when it is fetched again.

An external object may be replaced at any time: every unit in memory knows its version, and a read gives those of the
version alone that the container has pinned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from des_format.checksum import crc32c
from des_format.errors import CorruptEntry
from des_format.layout import EXTERNAL
from des_format.plan import plan_gets
from desfs import metrics
from desfs.blocks import LARGE_PAYLOAD
from desfs.container import OpenContainer, read_external
from desfs.disk_cache import ObjectVersion
from desfs.errors import ObjectReplaced
from desfs.fetch import UNIT, Fetcher, Flight
from desfs.pieces import Piece
from desfs.store.link import on_its_way
from desfs.tasks import in_parallel

_GET = 3 * UNIT  # bytes fetched ahead in one request: with 4 MiB the server was half as busy again (measured)
_REACH = 2  # round trips that a reader who goes on is given ahead: what is on its way, and what has come
_PASS = 8 * UNIT  # bytes fetched at a time by a pass over a payload
_VERIFIED = -1  # in the place of a unit: nothing, but that the payload has been verified
_ALONE = 1024  # units that are not fetched ahead
_READERS = 64  # payloads whose readers are followed; the one that was quiet longest is forgotten


class _NotAllSound(CorruptEntry):
    """One of the units that came together is damaged: nobody knows more before they are fetched one by one."""


@dataclass(slots=True)
class _Walk:
    """A reader of one payload: the unit it is in, and how many it is given ahead."""

    unit: int
    ahead: int


class LargePayloads:
    """Reads by units. Trio thread only, no locks; the fetcher has to be running."""

    def __init__(self, fetcher: Fetcher, max_ahead: int) -> None:
        """`max_ahead` bounds what is fetched ahead of a reader, in bytes."""
        self._fetcher = fetcher
        self._threads = fetcher.threads
        self._problems = fetcher.problems
        self._max_ahead = max_ahead
        self._walks: OrderedDict[tuple[int, int], _Walk] = OrderedDict()
        # Units that came with a damaged one, or are: nobody gets them ahead any more.
        self._alone: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        self._pinning: dict[tuple[int, int], trio.Lock] = {}

    async def read(self, container: OpenContainer, row: int, offset: int, stop: int) -> bytes | memoryview:
        """The bytes [offset, stop) of a payload, which end at its end at the latest.

        Raises: CorruptEntry; ObjectReplaced and NoSuchObject when the container, or the external object, is not there
        any more; StoreError.
        """
        index = container.loaded.index
        size = int(index.data_length[row])
        if size and offset >= stop:
            return b""
        unit = self._unit(container, row)
        by_pass = self._is_verified_by_pass(container, row)
        if by_pass and row not in container.verified:
            key = (container.number, row, _VERIFIED)
            await self._fetcher.piece(key, partial(self._start_pass, container, row, key))
        self._walk(container, row, offset // unit, unit, -(-size // unit))
        parts: list[bytes | memoryview] = []
        versions: set[str | None] = set()
        at = offset
        while True:
            number = at // unit
            key = (container.number, row, number)
            start = partial(self._start, container, row, number)
            try:
                piece = await self._fetcher.piece(key, start)
            except _NotAllSound:  # another unit may be the damaged one
                piece = await self._fetcher.piece(key, start)
            versions.add(piece.version)
            parts.append(memoryview(piece.data)[at - piece.start : stop - piece.start])
            at = piece.start + len(piece.data)
            if at >= stop:
                break
        # What was verified may have been replaced since, and what takes its place not be verified yet.
        if versions != {container.externals.get(row)} or (by_pass and row not in container.verified):
            self._forget(container, row)
            raise ObjectReplaced(f"{container.info.key}: {index.entry(row).name!r}: its external object was replaced")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @staticmethod
    def _is_verified_by_pass(container: OpenContainer, row: int) -> bool:
        """Whether a checksum of the whole is all that there is for the units of a payload."""
        index, meta = container.loaded.index, container.loaded.meta
        if not index.flags[row] & EXTERNAL and index.data_length[row] <= LARGE_PAYLOAD:
            return False
        return meta.block_checksums(index, row) is None and meta.verifier(index, row) is not None

    def _unit(self, container: OpenContainer, row: int) -> int:
        index = container.loaded.index
        blocks = container.loaded.meta.block_checksums(index, row)
        if blocks is not None:
            return blocks.block_size
        size = int(index.data_length[row])
        return UNIT if index.flags[row] & EXTERNAL or size > LARGE_PAYLOAD else max(size, 1)

    def _walk(self, container: OpenContainer, row: int, unit_number: int, unit: int, units: int) -> None:
        """Fetch ahead of a reader who goes on from one unit to the next: twice as much with each."""
        key = (container.slot, row)
        walk = self._walks.pop(key, None)
        if walk is None or not walk.unit <= unit_number <= walk.unit + 1:
            # The kernel reads ahead in several requests at a time: one of them may come before its predecessor.
            walk = _Walk(unit_number, 1 if unit_number == 0 else 0)
        elif unit_number > walk.unit:
            if walk.ahead:  # the kernel has what lies behind, and may have it again in the middle of the last unit
                behind = self._fetcher.cache.get((container.number, row, unit_number - 2))
                if behind is not None and behind.last < unit_number:
                    self._fetcher.cache.discard((container.number, row, unit_number - 2))
            walk.unit = unit_number
            at_a_time = _REACH * on_its_way(self._threads.meter.link()) // unit
            walk.ahead = min(max(2 * walk.ahead, at_a_time, 1), max(self._max_ahead // unit, 1))
        self._walks[key] = walk
        if len(self._walks) > _READERS:
            self._walks.popitem(last=False)
        most = max(min(_GET, self._max_ahead // 2) // unit, 1)
        number, last = unit_number + 1, unit_number + 1 + walk.ahead
        if walk.ahead >= most:  # whole GETs
            last += -last % most
        last = min(last, units)
        while number < last:
            after = number
            while after < min(last, (number // most + 1) * most) and self._is_missing(container, row, after):
                after += 1
            if after > number:
                self._start(container, row, number, after)
            number = max(after, number + 1)

    def _leave_alone(self, places: Iterable[tuple[int, int, int]]) -> None:
        for place in places:
            self._alone[place] = None
        while len(self._alone) > _ALONE:
            self._alone.popitem(last=False)

    def _is_missing(self, container: OpenContainer, row: int, number: int) -> bool:
        place = (container.number, row, number)
        return place not in self._fetcher.cache and not self._fetcher.is_under_way(place) and place not in self._alone

    def _start(self, container: OpenContainer, row: int, number: int, after: int | None = None) -> Flight:
        """Fetch a unit, or those up to `after`, in one GET."""
        unit = self._unit(container, row)
        after = number + 1 if after is None else after
        start = number * unit
        stop = min(after * unit, int(container.loaded.index.data_length[row]))

        async def bring() -> Piece:
            for again in (False, True):  # once more on a mismatch: it may be the way's fault, not the store's
                data, version = await self._bytes(container, row, start, stop, past_disk=again)
                try:
                    await trio.to_thread.run_sync(_check_all, container, row, number, unit, data)
                    break
                except CorruptEntry as error:
                    self._leave_alone((container.number, row, each) for each in range(number, after))
                    if after > number + 1:
                        raise _NotAllSound(str(error)) from error
                    metrics.CHECKSUM_FAILURES.inc()
                    if again:
                        self._problems.report(container.info.key, str(error))
                        raise
            view = memoryview(data)
            units = [(at, min(at + unit, stop)) for at in range(start, stop, unit)]
            await self._keep(
                container, row, version, [(low, high, view[low - start : high - start]) for low, high in units]
            )
            return Piece(container.number, row, number, after, start, data, version=version)

        return self._fetcher.start(
            [(container.number, row, each) for each in range(number, after)], stop - start, bring
        )

    async def _bytes(
        self, container: OpenContainer, row: int, start: int, stop: int, *, past_disk: bool
    ) -> tuple[bytes | memoryview, str | None]:
        """[start, stop) of a payload as the disk cache, or the store, has it, and the version of the external object.
        `past_disk`: what is kept has turned out to be wrong."""
        external = bool(container.loaded.index.flags[row] & EXTERNAL)
        disk = self._fetcher.disk
        if disk is not None and external and row not in container.externals:
            # The first bytes that come from the store say which version it has; the others may be on disk then.
            place = (container.number, row)
            async with self._pinning.setdefault(place, trio.Lock()):
                if row not in container.externals:
                    try:
                        return await self._external(container, row, start, stop)
                    finally:
                        self._pinning.pop(place, None)
        version = container.externals.get(row) if external else None
        if disk is not None and start < stop and not past_disk:
            kept = _kept_as(self._threads.store.url, container, row, version)
            unit = self._unit(container, row)
            bounds = [(at, min(at + unit, stop)) for at in range(start, stop, unit)]
            found = [block for block in await self._threads.fetch(disk.get_many, kept, bounds) if block is not None]
            if len(found) == len(bounds):
                return found[0] if len(found) == 1 else b"".join(found), version
        if external:
            return await self._external(container, row, start, stop)
        low, info = int(container.loaded.index.data_offset[row]), container.info
        answer = await self._threads.fetch(
            self._threads.store.get_range, info.key, low + start, low + stop, if_match=info.etag
        )
        return answer.data, None

    async def _keep(
        self,
        container: OpenContainer,
        row: int,
        version: str | None,
        found: Sequence[tuple[int, int, bytes | memoryview]],
    ) -> None:
        """Give ranges of a payload to the disk cache, if there is one."""
        disk = self._fetcher.disk
        blocks = [block for block in found if block[0] < block[1]]
        if disk is not None and blocks:
            await self._threads.fetch(disk.put, _kept_as(self._threads.store.url, container, row, version), blocks)

    async def _external(
        self, container: OpenContainer, row: int, start: int, stop: int
    ) -> tuple[bytes | memoryview, str]:
        """[start, stop) of an external object, and its version, which is the one of all that has been read of it."""
        index, meta = container.loaded.index, container.loaded.meta
        try:
            answer, key = await self._threads.fetch(
                read_external,
                self._threads.store,
                container.info.key,
                index.entry(row).name,
                meta.external_key.get(row),
                start,
                stop,
                int(index.data_length[row]),
                if_match=container.externals.get(row),
                known=container.external_keys.get(row),
            )
            container.external_keys[row] = key
        except CorruptEntry as error:
            self._problems.report(container.info.key, str(error))
            raise
        except ObjectReplaced:
            self._forget(container, row)
            raise
        # Two first reads at once name no version: the one that comes second must have seen the same.
        if container.externals.setdefault(row, answer.etag) != answer.etag:
            self._forget(container, row)
            raise ObjectReplaced(f"{container.info.key}: {index.entry(row).name!r}: its external object was replaced")
        return answer.data if start < stop else b"", answer.etag

    def _forget(self, container: OpenContainer, row: int) -> None:
        """Whoever reads the file next sees the version that is there then, under another inode."""
        container.outdated = True
        container.externals.pop(row, None)
        container.verified.pop(row, None)
        self._fetcher.cache.drop(container.number, row)

    def _start_pass(self, container: OpenContainer, row: int, key: tuple[int, int, int]) -> Flight:
        async def bring() -> Piece:
            for again in (False, True):  # once more on a mismatch: it may be the way's fault, not the store's
                try:
                    container.verified[row] = await self._pass_over(container, row, past_disk=again)
                    break
                except CorruptEntry as error:
                    metrics.CHECKSUM_FAILURES.inc()
                    if again:
                        self._problems.report(container.info.key, str(error))
                        raise
            return Piece(container.number, row, _VERIFIED, _VERIFIED + 1, 0, b"")

        size = int(container.loaded.index.data_length[row])
        return self._fetcher.start([key], min(size, _PASS), bring)

    async def _pass_over(self, container: OpenContainer, row: int, *, past_disk: bool) -> list[int]:
        """Verify a payload as a whole, a few units in memory at a time; those that the cache keeps are read from there.
        The CRC-32C of each unit, which has to hold when it is fetched again."""
        index = container.loaded.index
        verifier = container.loaded.meta.verifier(index, row)
        assert verifier is not None
        checksums: list[int] = []
        size = int(index.data_length[row])
        for at in range(0, size, _PASS):
            gets = plan_gets([(at, min(at + _PASS, size))], max_request=UNIT)
            found: list[tuple[bytes | memoryview, str | None]] = [(b"", None)] * len(gets)

            async def get(
                place: int, low: int, high: int, found: list[tuple[bytes | memoryview, str | None]] = found
            ) -> None:
                found[place] = await self._bytes(container, row, low, high, past_disk=past_disk)

            await in_parallel(partial(get, place, *each) for place, each in enumerate(gets))
            for (low, high), (data, version) in zip(gets, found, strict=True):
                await trio.to_thread.run_sync(verifier.update, data)
                checksums.append(await trio.to_thread.run_sync(crc32c, data))
                number = low // UNIT
                # Not verified yet: where the pass fails, the next try looks past it and puts other bytes in its place.
                await self._keep(container, row, version, [(low, high, data)])
                self._fetcher.cache.put(Piece(container.number, row, number, number + 1, low, data, version=version))
        try:
            verifier.check()
        except CorruptEntry:
            self._fetcher.cache.drop(container.number, row)
            raise
        return checksums


def _kept_as(store: str, container: OpenContainer, row: int, version: str | None) -> ObjectVersion:
    """What the disk cache knows a payload by. The container's key names an external one; its own version pins the
    bytes. The others are apart from the blocks of the small payloads, which have other bounds."""
    return ObjectVersion(store, f"{container.info.key}#{row}", container.info.etag if version is None else version)


def _check_all(container: OpenContainer, row: int, number: int, unit: int, data: bytes | memoryview) -> None:
    """Check units that are one behind the other. Raises: CorruptEntry. Blocking."""
    view = memoryview(data)
    for place, at in enumerate(range(0, max(len(view), 1), unit)):
        _check(container, row, number + place, view[at : at + unit])


def _check(container: OpenContainer, row: int, number: int, data: bytes | memoryview) -> None:
    """Raises: CorruptEntry for a unit that is not what its checksum says. Blocking."""
    index, meta = container.loaded.index, container.loaded.meta
    blocks = meta.block_checksums(index, row)
    if not len(data):
        return
    if blocks is not None:
        blocks.check(number, data, f"{container.info.key}: {index.entry(row).name!r}")
    elif row in container.verified:
        if crc32c(data) != container.verified[row][number]:
            raise CorruptEntry(
                f"{container.info.key}: {index.entry(row).name!r}: unit {number} is not what was verified before"
            )
    elif not index.flags[row] & EXTERNAL and index.data_length[row] <= LARGE_PAYLOAD:
        meta.verify(index, row, bytes(data))
