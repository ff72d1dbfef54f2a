"""Payloads that are in no block: external objects, large ones, and those that share bytes with others. Trio.

They are read in units, ahead of a reader who walks forward. META of an external object may have the checksum of each of
its blocks: a unit is verified by itself then. Where it has a checksum of the whole alone, all of it is read once before
anybody sees a byte, and the CRC-32C of each unit is noted for the time when it is fetched again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import google_crc32c
import trio

from des_format.errors import CorruptEntry
from des_format.layout import EXTERNAL
from des_format.plan import plan_gets
from desfs import metrics
from desfs.blocks import LARGE_PAYLOAD
from desfs.container import read_external
from desfs.disk_cache import ObjectVersion
from desfs.errors import ObjectReplaced
from desfs.fetch import PIECE, Fetcher, Flight, OpenContainer, Piece, in_parallel

UNIT = 4 * 1024 * 1024  # bytes: as PIECE; a checksum's block where META says nothing else
_PASS = 8 * UNIT  # bytes fetched at a time by a pass over a payload
_VERIFIED = -1  # in the place of a unit: nothing, but that the payload has been verified
_READERS = 64  # payloads whose readers are followed; the one that was quiet longest is forgotten


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

    async def read(self, container: OpenContainer, row: int, offset: int, stop: int) -> bytes | memoryview:
        """The bytes [offset, stop) of a payload, which end at its end at the latest.

        Raises: CorruptEntry; ObjectReplaced and NoSuchObject when the container, or the external object, is not there
        any more; StoreError.
        """
        index = container.loaded.index
        size = int(index.data_length[row])
        unit = self._unit(container, row)
        by_pass = self._is_verified_by_pass(container, row)
        if by_pass and row not in container.verified:
            key = (container.slot, row, _VERIFIED)
            await self._fetcher.piece(key, partial(self._start_pass, container, row, key))
        self._walk(container, row, offset // unit, unit, -(-size // unit))
        parts: list[bytes | memoryview] = []
        version: str | None = None
        at = offset
        while True:
            number = at // unit
            key = (container.slot, row, number)
            piece = await self._fetcher.piece(key, partial(self._start, container, row, number))
            # What was verified may have been replaced since, and what takes its place not be verified yet.
            unverified = by_pass and row not in container.verified
            if unverified or (parts and container.externals.get(row) != version):
                raise ObjectReplaced(f"{container.info.key}: entry {row}: its external object was replaced")
            version = container.externals.get(row)
            parts.append(memoryview(piece.data)[at - piece.start : stop - piece.start])
            at = piece.start + len(piece.data)
            if at >= stop:
                return parts[0] if len(parts) == 1 else b"".join(parts)

    @staticmethod
    def _is_verified_by_pass(container: OpenContainer, row: int) -> bool:
        """Whether a checksum of the whole is all that there is for the units of a payload."""
        index, meta = container.loaded.index, container.loaded.meta
        if not index.flags[row] & EXTERNAL and index.data_length[row] <= LARGE_PAYLOAD:
            return False
        return row not in meta.external_blocks and meta.verifier(index, row) is not None

    def _unit(self, container: OpenContainer, row: int) -> int:
        index = container.loaded.index
        blocks = container.loaded.meta.external_blocks.get(row)
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
            walk.unit = unit_number
            walk.ahead = min(max(2 * walk.ahead, 1), max(self._max_ahead // unit, 1))
        self._walks[key] = walk
        if len(self._walks) > _READERS:
            self._walks.popitem(last=False)
        for number in range(unit_number + 1, min(unit_number + 1 + walk.ahead, units)):
            place = (container.slot, row, number)
            if place not in self._fetcher.cache and not self._fetcher.is_under_way(place):
                self._start(container, row, number)

    def _start(self, container: OpenContainer, row: int, number: int) -> Flight:
        async def bring() -> Piece:
            index = container.loaded.index
            unit = self._unit(container, row)
            start = number * unit
            stop = min(start + unit, int(index.data_length[row]))
            for again in (True, False):  # once more on a mismatch: it may be the way's fault, not the store's
                data = await self._bytes(container, row, start, stop)
                try:
                    await trio.to_thread.run_sync(_check, container, row, number, data)
                    break
                except CorruptEntry as error:
                    metrics.CHECKSUM_FAILURES.inc()
                    if not again:
                        self._problems.report(container.info.key, str(error))
                        raise
            return Piece(container.slot, row, number, number + 1, start, data)

        return self._fetcher.start([(container.slot, row, number)], bring)

    async def _bytes(self, container: OpenContainer, row: int, start: int, stop: int) -> bytes | memoryview:
        """[start, stop) of a payload as the store, or the disk cache, has it."""
        if start >= stop:
            if container.loaded.index.flags[row] & EXTERNAL:
                await self._external(container, row, start, stop)
            return b""
        if container.loaded.index.flags[row] & EXTERNAL:
            return await self._external(container, row, start, stop)
        low = int(container.loaded.index.data_offset[row])
        info = container.info
        gets = plan_gets([(low + start, low + stop)], max_request=PIECE)
        found: list[bytes | memoryview] = [b""] * len(gets)

        async def get(place: int, begin: int, end: int) -> None:
            answer = await self._threads.fetch(self._threads.store.get_range, info.key, begin, end, if_match=info.etag)
            found[place] = answer.data

        await in_parallel(partial(get, place, *each) for place, each in enumerate(gets))
        return found[0] if len(found) == 1 else b"".join(found)

    async def _external(self, container: OpenContainer, row: int, start: int, stop: int) -> bytes | memoryview:
        index, meta = container.loaded.index, container.loaded.meta
        pinned = container.externals.get(row)
        disk, store = self._fetcher.disk, self._threads.store
        # The container's version names the row; the object's own version pins the bytes.
        kept = None if pinned is None else ObjectVersion(store.url, f"{container.info.key}#{row}", pinned)
        if disk is not None and kept is not None and start < stop:
            (found,) = await self._threads.fetch(disk.get_many, kept, [(start, stop)])
            if found is not None:
                return found
        try:
            answer = await self._threads.fetch(
                read_external,
                store,
                container.info.key,
                index.entry(row).name,
                meta.external_key.get(row),
                start,
                stop,
                int(index.data_length[row]),
                if_match=pinned,
            )
        except CorruptEntry as error:
            self._problems.report(container.info.key, str(error))
            raise
        except ObjectReplaced:
            self._forget_external(container, row)
            raise
        # Two first reads at once name no version: the one that comes second must have seen the same.
        if container.externals.setdefault(row, answer.etag) != answer.etag:
            self._forget_external(container, row)
            raise ObjectReplaced(f"{container.info.key}: {index.entry(row).name!r}: its external object was replaced")
        if disk is not None and start < stop:
            kept = ObjectVersion(store.url, f"{container.info.key}#{row}", answer.etag)
            await self._threads.fetch(disk.put, kept, [(start, stop, answer.data)])
        return answer.data

    def _forget_external(self, container: OpenContainer, row: int) -> None:
        """Whoever reads the file next sees the version that is there then."""
        container.externals.pop(row, None)
        container.verified.pop(row, None)
        for number in range(-(-int(container.loaded.index.data_length[row]) // self._unit(container, row))):
            self._fetcher.cache.drop((container.slot, row, number))
        self._fetcher.cache.drop((container.slot, row, _VERIFIED))

    def _start_pass(self, container: OpenContainer, row: int, key: tuple[int, int, int]) -> Flight:
        async def bring() -> Piece:
            for again in (True, False):  # once more on a mismatch: it may be the way's fault, not the store's
                try:
                    container.verified[row] = await self._pass_over(container, row)
                    break
                except CorruptEntry as error:
                    metrics.CHECKSUM_FAILURES.inc()
                    if not again:
                        self._problems.report(container.info.key, str(error))
                        raise
            return Piece(container.slot, row, _VERIFIED, _VERIFIED + 1, 0, b"")

        return self._fetcher.start([key], bring)

    async def _pass_over(self, container: OpenContainer, row: int) -> list[int]:
        """Verify a payload as a whole, a few units in memory at a time; those that the cache keeps are read from there.
        The CRC-32C of each unit, which has to hold when it is fetched again."""
        index = container.loaded.index
        verifier = container.loaded.meta.verifier(index, row)
        assert verifier is not None
        checksums: list[int] = []
        size = int(index.data_length[row])
        for at in range(0, size, _PASS):
            gets = plan_gets([(at, min(at + _PASS, size))], max_request=UNIT)
            found: list[bytes | memoryview] = [b""] * len(gets)

            async def get(place: int, low: int, high: int, found: list[bytes | memoryview] = found) -> None:
                found[place] = await self._bytes(container, row, low, high)

            await in_parallel(partial(get, place, *each) for place, each in enumerate(gets))
            for (low, _), data in zip(gets, found, strict=True):
                await trio.to_thread.run_sync(verifier.update, data)
                checksums.append(await trio.to_thread.run_sync(_crc32c, data))
                number = low // UNIT
                self._fetcher.cache.put(Piece(container.slot, row, number, number + 1, low, data))
        try:
            verifier.check()
        except CorruptEntry:
            for number in range(len(checksums)):
                self._fetcher.cache.drop((container.slot, row, number))
            raise
        return checksums


def _check(container: OpenContainer, row: int, number: int, data: bytes | memoryview) -> None:
    """Raises: CorruptEntry for a unit that is not what its checksum says. Blocking."""
    index, meta = container.loaded.index, container.loaded.meta
    blocks = meta.external_blocks.get(row)
    if blocks is not None:
        if len(data):
            blocks.check(number, data, f"{container.info.key}: {index.entry(row).name!r}")
    elif row in container.verified:
        if _crc32c(data) != container.verified[row][number]:
            raise CorruptEntry(
                f"{container.info.key}: {index.entry(row).name!r}: unit {number} is not what was verified before"
            )
    elif not index.flags[row] & EXTERNAL and index.data_length[row] <= LARGE_PAYLOAD:
        meta.verify(index, row, bytes(data))


def _crc32c(data: bytes | memoryview) -> int:
    return int(google_crc32c.value(bytes(data)))
