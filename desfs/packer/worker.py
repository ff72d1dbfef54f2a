"""The packer: claims what is settled, publishes it, deletes it. Asyncio; files and store in threads.

The protocol of one batch. The catalog row is the commit; what comes before it can be repeated or thrown away.

    died before      a restart finds                   and does
    journal          claims                            assigns and packs them
    PUT              claims, journal                   packs them under a new key, with the days and ids of the journal
    catalog row      claims, journal, object           commits it, if the object is ours and nobody else has held the
                                                       shard since; else packs them under a new key, and leaves the
                                                       object to the collector
    unlink           claims, journal, object, row      unlinks the files, then the journal

A PUT that a dying packer has sent may take effect after the restart has looked: that object, too, is the collector's;
its files are packed again under the same names, days and ids, and a newer generation. So is what a file that changed
while its external payload was stored has left.

A journal names exactly the files that its objects hold: one that changed or could not be read while the container was
built is struck out before the PUT. A file that was written to after it was packed is not unlinked: it goes back to the
spool and is packed again. While an older version of a file is claimed, a newer one is not: versions are packed in
their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date

import structlog

from assignment.catalog import ContainerRecord, Lease
from assignment.client import (
    Assignment,
    AssignmentClient,
    AssignmentError,
    ContainerExists,
)
from des_format.errors import DesFormatError
from des_format.names import MAX_COMPONENT
from des_format.reader import BaseReader
from des_format.shards import hex_group, parse_container_name, part_name, placement_shard, shard_hex
from des_format.source import DEFAULT_TAIL
from desfs import metrics
from desfs.container import StoreSource
from desfs.errors import DesfsError, ObjectExists, StoreError
from desfs.file_lease import LeaseRefused
from desfs.layout import Layout
from desfs.packer.batch import Cut, Item, cut
from desfs.packer.build import Builder, Built
from desfs.packer.journal import VERSION, Journal, JournalContainer, JournalFile, new_batch_name
from desfs.packer.leases import LeaseBusy, Leases
from desfs.settings import PackerSettings
from desfs.spool import FileState, Found, Kind, Spool
from desfs.store.base import ObjectInfo
from desfs.store.retrying import Retrying

log = structlog.get_logger(__name__)

_ROUNDS = 2  # of --once: what came or changed while the first was packed gets one more chance
_GRACE_S = 0.5  # beyond the settle time: file times have the grain of the kernel's tick
_PARALLEL = 4  # containers built and put at a time: two cores' worth of hashing, and uploads beside it


@dataclass(slots=True)
class Summary:
    """What a packer has done so far. `left` are the files that it found and could not take, by why."""

    files: int = 0
    bytes: int = 0
    containers: int = 0
    external: int = 0
    rejected: int = 0
    left: dict[str, int] = field(default_factory=dict)
    failures: deque[str] = field(default_factory=lambda: deque(maxlen=100))


class Packer:
    """One spool, one store. `effect` is called before each change that others can see: tests die there."""

    def __init__(
        self,
        spool: Spool,
        store: Retrying,
        client: AssignmentClient,
        layout: Layout,
        settings: PackerSettings,
        *,
        effect: Callable[[str], None] = lambda name: None,
        progress: Callable[[Summary, int], None] = lambda summary, waiting: None,
    ) -> None:
        self.summary = Summary()
        self._spool = spool
        self._store = store
        self._client = client
        self._layout = layout
        self._settings = settings
        self._effect = effect
        self._progress = progress
        self._builder = Builder(
            spool, store, big_file_threshold=settings.big_file_threshold, naming=layout.naming, effect=effect
        )
        self._holder = settings.holder
        self._floors: dict[date, dict[str, int]] = {}
        self._emptied: set[str] = set()
        self._stop = asyncio.Event()
        self._journal_lock = asyncio.Lock()
        self._spool_lock = asyncio.Lock()  # a Spool is for one thread at a time
        self._oldest_settled: float | None = None

    def stop(self) -> None:
        """End after the batch at hand."""
        self._stop.set()

    async def run_once(self) -> Summary:
        """Pack all that is in the spool now, waiting for what was touched a moment ago to settle. What a writer holds
        open, and names that look temporary, are left."""
        await asyncio.to_thread(self._start)
        for _ in range(_ROUNDS):
            await self._recover()
            found = await self._scan_settled()
            self._progress(self.summary, sum(each.kind is Kind.SETTLED for each in found))
            await self._take(found)
            self.summary.left = _count_left(await asyncio.to_thread(self._scan))
            unfinished = await asyncio.to_thread(self._spool.batches)
            if self._stop.is_set() or not (self.summary.left or unfinished):
                break
        if unfinished and not self._stop.is_set():
            self._fail("some files could not be packed yet and stay claimed in .desfs/claims: run the packer again")
        await self._remove_emptied(wait=True)
        return self.summary

    async def _scan_settled(self) -> list[Found]:
        """What is in the spool when all of it has settled, or when that takes longer than it may: somebody keeps
        writing."""
        deadline = time.monotonic() + self._settings.settle + _GRACE_S
        while True:
            found = await asyncio.to_thread(self._scan)
            waiting = any(each.kind is Kind.WAITING for each in found)
            if not waiting or self._stop.is_set() or time.monotonic() >= deadline:
                return found
            await self._pause(self._settings.settle / 10)

    async def run(self) -> Summary:
        """Pack until stopped. A failure is logged, and tried again after a while: the files wait in the spool."""
        await asyncio.to_thread(self._start)
        delay = self._settings.scan_interval
        while not self._stop.is_set():
            try:
                await self._recover()
                found = await asyncio.to_thread(self._scan)
                if self._is_due(found):
                    before = self.summary.files, self.summary.containers
                    await self._take(found)
                    files, containers = self.summary.files - before[0], self.summary.containers - before[1]
                    log.info("packed", files=files, containers=containers)
                await self._remove_emptied(wait=False)
                delay = self._settings.scan_interval
            except (DesfsError, DesFormatError, AssignmentError, OSError) as error:
                delay = min(delay * 2, 60.0)
                log.error("packing failed, the files wait", error=str(error), next_try_s=round(delay, 1))
            await self._pause(delay)
        return self.summary

    def _start(self) -> None:
        self._spool.clear_work()
        self._emptied = self._spool.read_emptied()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _scan(self) -> list[Found]:
        """What is in the spool; the unsuitable is put aside at once."""
        found = []
        for each in self._spool.scan():
            if each.kind is Kind.UNSUITABLE:
                self._reject(each.path, each.reason)
            else:
                found.append(each)
        return found

    def _reject(self, path: str, reason: str, *, batch: str | None = None) -> None:
        try:
            self._spool.reject(path, reason, batch=batch)
        except OSError as error:
            self._fail(f"{path}: {reason}; it cannot be put aside: {error.strerror}")
            return
        self.summary.rejected += 1
        self._emptied.add(os.path.dirname(path))

    def _is_due(self, found: list[Found]) -> bool:
        """True when enough has settled for a container, or something has waited for `max_age`."""
        settled = [each for each in found if each.kind is Kind.SETTLED]
        if not settled:
            self._oldest_settled = None
            return False
        if self._oldest_settled is None:
            self._oldest_settled = time.monotonic()
        return (
            len(settled) >= self._settings.max_container_files
            or sum(each.size for each in settled) >= self._settings.max_container_bytes
            or time.monotonic() - self._oldest_settled >= self._settings.max_age
        )

    async def _take(self, found: list[Found]) -> int:
        """Claim and publish what has settled, batch by batch; how many files were claimed."""
        held = await asyncio.to_thread(self._held_paths)
        settled = [each.path for each in found if each.kind is Kind.SETTLED and each.path not in held]
        taken = 0
        for start in range(0, len(settled), self._settings.max_batch_files):
            if self._stop.is_set():
                break
            batch = new_batch_name()
            claimed = await asyncio.to_thread(
                self._claim, batch, settled[start : start + self._settings.max_batch_files]
            )
            taken += claimed
            if claimed:
                await self._publish(batch)
        self._oldest_settled = None
        return taken

    def _held_paths(self) -> set[str]:
        """Files of which an older version is still claimed."""
        return {path for batch in self._spool.batches() for path in self._spool.claims(batch)}

    def _claim(self, batch: str, paths: list[str]) -> int:
        # Written before: a packer that dies leaves no folder behind. A folder that nothing was taken from stays.
        self._spool.write_emptied(self._emptied | {os.path.dirname(path) for path in paths})
        claimed = 0
        for path in paths:
            try:
                if self._spool.claim(path, batch):
                    claimed += 1
                    self._emptied.add(os.path.dirname(path))
            except PermissionError as error:
                self._reject(path, f"cannot be taken: {error.strerror}")
            except LeaseRefused as error:
                self._fail(f"{path}: {error}")
            except OSError as error:
                self._fail(f"{path}: cannot be claimed: {error.strerror}")
        if not claimed:
            self._spool.finish(batch)
        return claimed

    async def _recover(self) -> None:
        """Finish the batches that a packer before us, or a failure, has left. Oldest first: a newer version of a file
        must get the newer generation."""
        for batch in await asyncio.to_thread(self._spool.batches):
            if self._stop.is_set():
                return
            try:
                await self._publish(batch)
            except (StoreError, AssignmentError):
                raise  # the next batch would fare no better
            except (DesfsError, DesFormatError, OSError) as error:
                self._fail(f"batch {batch} stays in .desfs: {error}")

    async def _publish(self, batch: str) -> None:
        """Bring a batch from whatever state it is in to its end."""
        old = await asyncio.to_thread(self._read_journal, batch)
        if old is not None:
            await self._settle_journal(batch, old)
        items = await self._plan_items(batch, old)
        if items:
            async with Leases(self._client, self._holder) as leases:
                await self._publish_items(batch, items, leases)
        await asyncio.to_thread(self._spool.finish, batch)

    def _read_journal(self, batch: str) -> Journal | None:
        try:
            return Journal.decode(self._spool.journal_path(batch).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DesfsError(f"{self._spool.journal_path(batch)}: {error}") from error

    async def _settle_journal(self, batch: str, journal: Journal) -> None:
        """Find out on which side of its commit each container of a journal is, and delete the files of those that are
        committed, or can be."""
        async with Leases(self._client, self._holder) as leases:
            for container in journal.containers:
                record = await self._client.find_container(container.key)
                if record is None:
                    info = await self._object(container.key)
                    if info is None or not await asyncio.to_thread(self._is_ours, container, info):
                        continue
                    if not await self._commit_found(batch, journal, container, info, leases):
                        continue
                await asyncio.to_thread(self._delete_packed, batch, container)

    async def _object(self, key: str) -> ObjectInfo | None:
        listing = await asyncio.to_thread(self._store.list, key)
        return next((info for info in listing.objects if info.key == key), None)

    def _is_ours(self, container: JournalContainer, info: ObjectInfo) -> bool:
        """Whether an object holds the files of a journal, by their ids: a packer with another catalog may have been
        faster with the key. A PUT is whole or not there, so ours holds all of them."""
        try:
            reader = BaseReader(StoreSource(self._store, info), None, DEFAULT_TAIL)
            return bool(container.files) and all(
                reader.get_meta(self._entry_name(path, file.id)).get("id") == file.id
                for path, file in container.files.items()
            )
        except DesFormatError as error:
            log.info("another object has the key", key=container.key, found=str(error))
            return False

    async def _commit_found(
        self, batch: str, journal: Journal, container: JournalContainer, info: ObjectInfo, leases: Leases
    ) -> bool:
        """Commit an object that was put before a crash, if its token is the last that was given for the shard."""
        lease = await leases.of(container.day, container.shard)
        if lease.token != container.token:
            if lease.previous_token != container.token:
                return False
            for each in journal.containers:
                if (each.day, each.shard, each.token) == (container.day, container.shard, lease.previous_token):
                    each.token = lease.token
            await self._write_journal(batch, journal)
        await self._commit(lease, _record(container, len(container.files), info.size, info.etag))
        self._count([file.size for file in container.files.values()])
        return True

    async def _plan_items(self, batch: str, old: Journal | None) -> list[Item]:
        """The files of a batch that are still to be packed, each with its day, shard and id: those of the journal
        again, so that a file that was packed twice has one name in one day."""
        states = await asyncio.to_thread(self._claimed_states, batch)
        planned = {path: old.file_of(path) for path in states} if old is not None else {}
        fresh = [path for path in states if planned.get(path) is None]
        assignments = dict(zip(fresh, await self._client.assign(fresh) if fresh else [], strict=True))
        items = []
        for path, state in states.items():
            known = planned.get(path)
            if known is not None:
                items.append(self._item(path, state, Assignment(path, known[0].day, known[0].shard, known[1].id)))
            else:
                items.append(self._item(path, state, assignments[path]))
        return items

    def _claimed_states(self, batch: str) -> dict[str, FileState]:
        return {path: FileState.of(os.lstat(self._spool.claimed(batch, path))) for path in self._spool.claims(batch)}

    def _item(self, path: str, state: FileState, assignment: Assignment) -> Item:
        name = self._entry_name(path, assignment.id)
        shard = shard_hex(placement_shard(name, self._layout.shard_bits), self._layout.shard_bits)
        return Item(path, name, assignment.id, assignment.day, shard, state)

    def _entry_name(self, path: str, assigned: str) -> str:
        if self._layout.naming == "path":
            return path
        name = assigned + os.path.splitext(path)[1]
        return name if len(name.encode()) <= MAX_COMPONENT else assigned

    async def _publish_items(self, batch: str, items: list[Item], leases: Leases) -> None:
        plans: list[tuple[Cut, JournalContainer]] = []
        for plan in cut(
            items,
            max_bytes=self._settings.max_container_bytes,
            max_files=self._settings.max_container_files,
            big_file_threshold=self._settings.big_file_threshold,
        ):
            try:
                lease = await leases.of(plan.day, plan.shard)
            except LeaseBusy as error:
                self._fail(str(error))
                continue
            generation = await self._next_generation(lease)
            files = {
                item.path: JournalFile(item.id, item.state.inode, item.state.size, item.state.mtime_ns)
                for item in plan.items
            }
            key = f"{plan.day.isoformat()}/{part_name(plan.shard, generation)}"
            plans.append((plan, JournalContainer(key, plan.day, plan.shard, generation, lease.token, files)))
        journal = Journal(VERSION, [container for _, container in plans])
        await self._write_journal(batch, journal)
        limit = asyncio.Semaphore(_PARALLEL)
        failures = await asyncio.gather(
            *(self._publish_container(batch, journal, plan, container, leases, limit) for plan, container in plans),
            return_exceptions=True,
        )
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure

    async def _publish_container(
        self,
        batch: str,
        journal: Journal,
        plan: Cut,
        container: JournalContainer,
        leases: Leases,
        limit: asyncio.Semaphore,
    ) -> None:
        async with limit:
            built = await asyncio.to_thread(self._builder.build, batch, plan, container.key)
            try:
                if built.changed or built.unreadable:
                    # A restart deletes what the journal says is in a committed container: it must not say too much.
                    container.files = {item.path: container.files[item.path] for item in built.items}
                    await self._write_journal(batch, journal)
                if built.path is not None:
                    size = built.path.stat().st_size
                    etag = await self._put(batch, journal, container, built, leases)
                    lease = await leases.of(plan.day, plan.shard)
                    await self._commit(lease, _record(container, len(built.items), size, etag))
                    self._count([item.state.size for item in built.items])
            finally:
                # Also when it was not put: the next try builds it anew, under another key.
                if built.path is not None:
                    built.path.unlink(missing_ok=True)
            async with self._spool_lock:
                await asyncio.to_thread(self._after_commit, batch, built)
            self._progress(self.summary, -1)

    async def _put(
        self, batch: str, journal: Journal, container: JournalContainer, built: Built, leases: Leases
    ) -> str:
        """Put a container, under the next generation if a packer with another catalog has taken its key; the ETag."""
        assert built.path is not None
        while True:
            self._effect(f"put {container.key}")
            try:
                return await asyncio.to_thread(self._store.put, container.key, built.path)
            except ObjectExists:
                self._floors.pop(container.day, None)
                lease = await leases.of(container.day, container.shard)
                container.generation = await self._next_generation(lease)
                container.key = f"{container.day.isoformat()}/{part_name(container.shard, container.generation)}"
                await self._write_journal(batch, journal)

    async def _commit(self, lease: Lease, record: ContainerRecord) -> None:
        self._effect(f"commit {record.object_key}")
        try:
            await self._client.commit_container(lease, record)
        except ContainerExists:
            log.info("an answer of the catalog was lost; the row is there", key=record.object_key)

    async def _next_generation(self, lease: Lease) -> int:
        """The next generation of a shard: above all that the catalog has given and all that the store has."""
        floors = self._floors.get(lease.day)
        if floors is None:
            floors = {}
            listing = await asyncio.to_thread(self._store.list, f"{lease.day.isoformat()}/", delimiter=True)
            for info in listing.objects:
                name = parse_container_name(info.key.rpartition("/")[2])
                if name is not None:
                    floors[name.group] = max(floors.get(name.group, 0), name.last)
            self._floors[lease.day] = floors
        at_least = max(floors.get(hex_group(lease.shard), 0) + 1, 1)
        return await self._client.next_generation(lease, at_least=at_least)

    async def _write_journal(self, batch: str, journal: Journal) -> None:
        async with self._journal_lock:  # the containers of a batch are published side by side
            await asyncio.to_thread(self._spool.write_durably, self._spool.journal_path(batch), journal.encode())

    def _after_commit(self, batch: str, built: Built) -> None:
        for item in built.items:
            self._delete_file(batch, item.path, item.state)
        for item in built.changed:
            self._give_back(batch, item.path)
        for item, reason in built.unreadable:
            self._reject(item.path, f"cannot be read: {reason}", batch=batch)

    def _delete_packed(self, batch: str, container: JournalContainer) -> None:
        for path, file in container.files.items():
            self._delete_file(batch, path, file.state)

    def _delete_file(self, batch: str, path: str, packed: FileState) -> None:
        if not self._spool.remove_claimed(batch, path, packed):
            self._give_back(batch, path)

    def _give_back(self, batch: str, path: str) -> None:
        if not self._spool.give_back(batch, path):
            log.info("changed while it was packed, and a newer file has its place: it is packed next", path=path)

    async def _remove_emptied(self, *, wait: bool) -> None:
        self._emptied.discard("")
        if not self._emptied:
            return
        before = set(self._emptied)
        deadline = time.monotonic() + self._settings.settle + _GRACE_S
        self._emptied = await asyncio.to_thread(self._spool.remove_emptied, self._emptied)
        while wait and self._emptied and time.monotonic() < deadline and not self._stop.is_set():
            await self._pause(self._settings.settle / 10)
            self._emptied = await asyncio.to_thread(self._spool.remove_emptied, self._emptied)
        if self._emptied != before:
            await asyncio.to_thread(self._spool.write_emptied, self._emptied)

    def _count(self, sizes: list[int]) -> None:
        self.summary.containers += 1
        self.summary.files += len(sizes)
        self.summary.bytes += sum(sizes)
        self.summary.external += sum(each >= self._settings.big_file_threshold for each in sizes)
        metrics.PACKED_FILES.inc(len(sizes))
        metrics.PACKED_BYTES.inc(sum(sizes))

    def _fail(self, message: str) -> None:
        if message not in self.summary.failures:
            self.summary.failures.append(message)
            log.warning("left for later", reason=message)


def _record(container: JournalContainer, files: int, size: int, etag: str) -> ContainerRecord:
    return ContainerRecord(
        object_key=container.key,
        day=container.day,
        shard=container.shard,
        generation=container.generation,
        size=size,
        files=files,
        etag=etag,
    )


def _count_left(found: list[Found]) -> dict[str, int]:
    reasons = {
        Kind.SETTLED: "held open by a writer, or not ours to take",
        Kind.WAITING: "still being written",
        Kind.TEMPORARY: "with a temporary name",
    }
    left: dict[str, int] = {}
    for each in found:
        left[reasons[each.kind]] = left.get(reasons[each.kind], 0) + 1
    return left
