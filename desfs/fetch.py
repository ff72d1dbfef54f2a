"""Getting payloads: single flight, verification, a bounded cache. Trio.

Whole payloads of internal entries are fetched with their neighbours, verified against the checksum in META, and only
then seen by anybody; external objects are read in blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import google_crc32c
import trio

from des_format.errors import CorruptEntry
from des_format.layout import EXTERNAL
from des_format.plan import plan_gets
from desfs import metrics
from desfs.container import LoadedContainer, read_external
from desfs.errors import DeadlineExceeded, ObjectReplaced
from desfs.problems import Problems
from desfs.store.base import ObjectInfo, Store
from desfs.window import neighbourhood

T = TypeVar("T")

BLOCK = 4 * 1024 * 1024  # bytes: long enough that its round trip costs little, short enough to wait for
MAX_REQUEST = 8 * 1024 * 1024  # bytes: larger payloads come in parallel ranges
MAX_INFLIGHT = 256 * 1024 * 1024  # bytes being fetched at a time
STORE_THREADS = 32

# Larger internal payloads are verified in one pass and served in blocks: they need not fit into the cache as a whole.
LARGE_PAYLOAD = 16 * 1024 * 1024

# slot; row; block of a large payload, or one of the values below. META: slot, _META, first byte.
_BlockKey = tuple[int, int, int]
_META = -1  # for a row
_WHOLE = -1  # for a block: the payload, verified
_VERIFIED = -2  # for a block: nothing, but that the payload has been verified


@dataclass(eq=False, slots=True)
class OpenContainer:
    """A container with a slot. `externals` has the ETag of each external object that has been read, `verified` the
    CRC-32C of each block of the large internal payloads that matched their checksum, by row."""

    loaded: LoadedContainer
    slot: int
    externals: dict[int, str] = field(default_factory=dict)
    verified: dict[int, list[int]] = field(default_factory=dict)

    @property
    def info(self) -> ObjectInfo:
        return self.loaded.info


class StoreThreads:
    """Runs the blocking store in threads. Listings and indexes have threads of their own: they never wait for payloads.
    A cancelled call goes on in its thread: a GET's answer is thrown away."""

    def __init__(self, store: Store, deadline_s: float = 60.0, limit: int = STORE_THREADS) -> None:
        self.store = store
        # The store ends its tries by the deadline, and a try by its time-outs. A server that sends a byte now and then
        # escapes both: twice the deadline ends any call.
        self._limit_s = 2 * deadline_s
        self._metadata = trio.CapacityLimiter(limit)
        self._payloads = trio.CapacityLimiter(limit)

    async def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a blocking function that lists or opens. Raises: DeadlineExceeded; what the function raises."""
        return await self._call(self._metadata, partial(function, *arguments, **options))

    async def fetch(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a blocking function that brings payloads. Raises: as run."""
        return await self._call(self._payloads, partial(function, *arguments, **options))

    async def _call(self, limiter: trio.CapacityLimiter, call: Callable[[], T]) -> T:
        with trio.move_on_after(self._limit_s):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
        raise DeadlineExceeded(f"{self.store.url}: no answer within {self._limit_s:g} s")


class ByteBudget:
    """At most so many bytes at a time; one request larger than all is let in alone. Trio thread only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._freed = trio.Condition()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        async with self._freed:
            while self._used and self._used + size > self._limit:
                await self._freed.wait()
            self._used += size
        try:
            yield
        finally:
            self._used -= size
            with trio.CancelScope(shield=True):
                async with self._freed:
                    self._freed.notify_all()


class BlockCache:
    """Verified bytes by key, least recently used first to go; bounded in bytes. Trio thread only, no locks."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[_BlockKey, bytes] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: _BlockKey) -> bool:
        return key in self._blocks

    def get(self, key: _BlockKey) -> bytes | None:
        """The block, which counts as used now."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def drop(self, key: _BlockKey) -> None:
        """Forget a block, if it is there."""
        self.bytes -= len(self._blocks.pop(key, b""))

    def put(self, key: _BlockKey, block: bytes) -> None:
        """Keep a block; older ones make room. A block larger than the whole cache is not kept."""
        if len(block) > self._max_bytes:
            return
        self.bytes += len(block) - len(self._blocks.pop(key, b""))
        self._blocks[key] = block
        while self.bytes > self._max_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self.bytes -= len(dropped)


class _Flight:
    """One fetch under way. `error` is for those who wait; a leader that was cancelled leaves none, and one of them
    leads again."""

    __slots__ = ("done", "error", "found", "wanted")

    def __init__(self, wanted: _BlockKey) -> None:
        self.wanted = wanted
        self.done = trio.Event()
        self.error: Exception | None = None
        self.found: dict[_BlockKey, bytes] = {}


# container, row, key, start, stop within the payload -> the keys that a fetch brings, and the fetch
_BlockPlan = Callable[[OpenContainer, int, _BlockKey, int, int], tuple[list[_BlockKey], Callable[[], Any]]]
_PASS = 8 * BLOCK  # bytes fetched at a time by a pass over a large payload


class Fetcher:
    """Payloads of open containers. Trio thread only, no locks.

    Invariant: a key is in `_flights` exactly while its leader fetches. There is no await between finding no key and
    inserting it: keep it so. A cancelled or failed leader wakes its followers in `finally`.
    """

    def __init__(self, threads: StoreThreads, problems: Problems, cache_bytes: int) -> None:
        self.cache = BlockCache(cache_bytes)
        self._threads = threads
        self._problems = problems
        self._flights: dict[_BlockKey, _Flight] = {}
        self._budget = ByteBudget(MAX_INFLIGHT)

    async def read(self, container: OpenContainer, row: int, offset: int, size: int) -> bytes | memoryview:
        """The bytes [offset, offset + size) of an entry, all of them up to the end of the file.

        Raises: CorruptEntry; ObjectReplaced and NoSuchObject when the container is not there any more; StoreError.
        """
        index = container.loaded.index
        index.check_readable(row)
        stop = min(offset + size, int(index.data_length[row]))
        if index.flags[row] & EXTERNAL:
            return await self._read_blocks(self._fetch_external, container, row, offset, stop)
        if offset >= stop:
            return b""
        if index.data_length[row] > LARGE_PAYLOAD:
            if row not in container.verified:
                key = (container.slot, row, _VERIFIED)
                await self._block(key, partial(self._verify_large, container, row, key))
            return await self._read_blocks(self._fetch_internal, container, row, offset, stop)
        payload = await self._block((container.slot, row, _WHOLE), lambda: self._fetch_payloads(container, row))
        return memoryview(payload)[offset:stop]

    async def meta(self, container: OpenContainer, start: int, stop: int, window: int) -> bytes:
        """[start, stop) of the META region, fetched in windows of that many bytes. Raises: as read."""
        footer = container.loaded.index.footer
        first = footer.meta_start + (start - footer.meta_start) // window * window
        pieces = []
        for begin in range(first, stop, window):
            end = min(begin + window, footer.meta_start + footer.meta_length)
            key = (container.slot, _META, begin)
            block = await self._block(key, partial(self._fetch_meta, container, key, end))
            pieces.append(block[max(start - begin, 0) : stop - begin])
        return b"".join(pieces)

    def _fetch_meta(
        self, container: OpenContainer, key: _BlockKey, stop: int
    ) -> tuple[list[_BlockKey], Callable[[], Any]]:
        async def fetch() -> dict[_BlockKey, bytes]:
            return {key: await self._range(container, key[2], stop)}

        return [key], fetch

    async def _block(self, key: _BlockKey, plan: Callable[[], tuple[list[_BlockKey], Callable[[], Any]]]) -> bytes:
        """A block from the cache, from somebody's fetch under way, or from our own. `plan` gives the keys that our
        fetch would bring and the coroutine function that fetches them."""
        while True:
            block = self.cache.get(key)
            if block is not None:
                return block
            flight = self._flights.get(key)
            if flight is None:
                return await self._lead(key, *plan())
            await flight.done.wait()
            if key in flight.found:
                return flight.found[key]
            # Damage is that of the row which the leader wanted; a neighbour's reader looks for itself.
            if flight.error is not None and (key == flight.wanted or not isinstance(flight.error, CorruptEntry)):
                raise flight.error

    async def _lead(self, key: _BlockKey, keys: list[_BlockKey], fetch: Callable[[], Any]) -> bytes:
        flight = _Flight(key)
        for each in keys:
            self._flights[each] = flight
        try:
            flight.found = await fetch()
            for each, block in flight.found.items():
                self.cache.put(each, block)
            return flight.found[key]
        except Exception as error:
            flight.error = error
            raise
        finally:
            for each in keys:
                del self._flights[each]
            flight.done.set()

    def _fetch_payloads(self, container: OpenContainer, row: int) -> tuple[list[_BlockKey], Callable[[], Any]]:
        rows = [row]
        for neighbour in neighbourhood(container.loaded.index, row)[1:]:
            key = (container.slot, neighbour, _WHOLE)
            if key in self._flights or key in self.cache:
                break
            rows.append(neighbour)

        async def fetch() -> dict[_BlockKey, bytes]:
            payloads = await self._payloads(container, rows)
            return {(container.slot, each, _WHOLE): payload for each, payload in payloads.items()}

        return [(container.slot, each, _WHOLE) for each in rows], fetch

    async def _payloads(self, container: OpenContainer, rows: list[int]) -> dict[int, bytes]:
        """The verified payloads of adjacent rows. The first is wanted, and its damage an error; the others are a
        gift."""
        index = container.loaded.index
        start = int(index.data_offset[rows[0]])
        stop = int(index.data_offset[rows[-1]]) + int(index.data_length[rows[-1]])
        data = await self._range(container, start, stop)
        payloads: dict[int, bytes] = {}
        for row in rows:
            begin = int(index.data_offset[row]) - start
            payload = data[begin : begin + int(index.data_length[row])] if len(rows) > 1 else data
            try:
                await self._verify(container, row, payload)
            except CorruptEntry as error:
                if row != rows[0]:
                    continue  # its own read will fetch it, and say so
                metrics.CHECKSUM_FAILURES.inc()
                # Once more: it may be the way's fault, not the store's.
                payload = await self._range(container, start, start + len(payload))
                try:
                    await self._verify(container, row, payload)
                except CorruptEntry:
                    self._problems.report(container.info.key, str(error))
                    raise
            payloads[row] = payload
        return payloads

    async def _verify(self, container: OpenContainer, row: int, payload: bytes) -> None:
        meta, index = container.loaded.meta, container.loaded.index
        if len(payload) > 1024 * 1024:  # a checksum of 1 MiB takes 0.1 ms or more: not on the loop
            await trio.to_thread.run_sync(meta.verify, index, row, payload)
        else:
            meta.verify(index, row, payload)

    async def _range(self, container: OpenContainer, start: int, stop: int) -> bytes:
        gets = plan_gets([(start, stop)], max_request=MAX_REQUEST)
        pieces: list[bytes] = [b""] * len(gets)

        async def get(place: int, low: int, high: int) -> None:
            answer = await self._threads.fetch(
                self._threads.store.get_range, container.info.key, low, high, if_match=container.info.etag
            )
            pieces[place] = bytes(answer.data)

        async with self._budget.taken(stop - start):
            await _in_parallel(partial(get, place, *each) for place, each in enumerate(gets))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _read_blocks(
        self, plan: _BlockPlan, container: OpenContainer, row: int, offset: int, stop: int
    ) -> bytes | memoryview:
        size = int(container.loaded.index.data_length[row])
        parts: list[bytes | memoryview] = []
        at = offset
        version: str | None = None
        while True:
            number = at // BLOCK
            start = number * BLOCK
            end = min(start + BLOCK, size)
            key = (container.slot, row, number)
            block = await self._block(key, partial(plan, container, row, key, start, end))
            if parts and container.externals.get(row) != version:
                raise ObjectReplaced(f"{container.info.key}: entry {row}: its external object was replaced")
            version = container.externals.get(row)
            parts.append(memoryview(block)[at - start : stop - start])
            at = end
            if at >= stop:
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _verify_large(
        self, container: OpenContainer, row: int, key: _BlockKey
    ) -> tuple[list[_BlockKey], Callable[[], Any]]:
        async def fetch() -> dict[_BlockKey, bytes]:
            try:
                blocks = await self._pass_over(container, row)
            except CorruptEntry as error:
                metrics.CHECKSUM_FAILURES.inc()
                try:
                    blocks = await self._pass_over(container, row)  # once more: it may be the way's fault
                except CorruptEntry:
                    self._problems.report(container.info.key, str(error))
                    raise
            container.verified[row] = blocks
            return {key: b""}

        return [key], fetch

    async def _pass_over(self, container: OpenContainer, row: int) -> list[int]:
        """Verify a large payload, a few blocks in memory at a time; those that the cache keeps are read from there. The
        CRC-32C of each block, which has to hold when it is fetched again; none where META has no checksum."""
        index = container.loaded.index
        verifier = container.loaded.meta.verifier(index, row)
        if verifier is None:
            return []
        checksums: list[int] = []
        start = int(index.data_offset[row])
        size = int(index.data_length[row])
        for at in range(0, size, _PASS):
            data = await self._range(container, start + at, start + min(at + _PASS, size))
            await trio.to_thread.run_sync(verifier.update, data)
            for low in range(0, len(data), BLOCK):
                block = data[low : low + BLOCK]
                checksums.append(await trio.to_thread.run_sync(google_crc32c.value, block))
                self.cache.put((container.slot, row, (at + low) // BLOCK), block)
        verifier.check()
        return checksums

    def _fetch_internal(
        self, container: OpenContainer, row: int, key: _BlockKey, start: int, stop: int
    ) -> tuple[list[_BlockKey], Callable[[], Any]]:
        async def fetch() -> dict[_BlockKey, bytes]:
            offset = int(container.loaded.index.data_offset[row])
            checksums = container.verified[row]
            for _ in range(2):  # once more on a mismatch: it may be the way's fault, not the store's
                block = await self._range(container, offset + start, offset + stop)
                if not checksums or await trio.to_thread.run_sync(google_crc32c.value, block) == checksums[key[2]]:
                    return {key: block}
                metrics.CHECKSUM_FAILURES.inc()
            name = container.loaded.index.entry(row).name
            problem = f"{container.info.key}: {name!r}: bytes {start} to {stop} are not what was verified before"
            self._problems.report(container.info.key, problem)
            raise CorruptEntry(problem)

        return [key], fetch

    def _fetch_external(
        self, container: OpenContainer, row: int, key: _BlockKey, start: int, stop: int
    ) -> tuple[list[_BlockKey], Callable[[], Any]]:
        async def fetch() -> dict[_BlockKey, bytes]:
            index = container.loaded.index
            recorded = container.loaded.meta.external_key.get(row)
            async with self._budget.taken(stop - start):
                try:
                    answer = await self._threads.fetch(
                        read_external,
                        self._threads.store,
                        container.info.key,
                        index.entry(row).name,
                        recorded,
                        start,
                        stop,
                        int(index.data_length[row]),
                        if_match=container.externals.get(row),
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
                raise ObjectReplaced(
                    f"{container.info.key}: {index.entry(row).name!r}: its external object was replaced"
                )
            return {key: bytes(answer.data)}

        return [key], fetch

    def _forget_external(self, container: OpenContainer, row: int) -> None:
        """Whoever reads the file next sees the version that is there then."""
        container.externals.pop(row, None)
        for number in range(-(-int(container.loaded.index.data_length[row]) // BLOCK)):
            self.cache.drop((container.slot, row, number))


async def _in_parallel(calls: Iterable[Callable[[], Any]]) -> None:
    """Run all; the first failure cancels the rest and is raised as itself, not in a group."""
    jobs = list(calls)
    if len(jobs) == 1:
        await jobs[0]()
        return
    try:
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
    except ExceptionGroup as group:
        raise first_of(group) from None


def first_of(group: ExceptionGroup[Exception]) -> Exception:
    """One plain exception out of a group."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
