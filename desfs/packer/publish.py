"""Publishing batches: from claimed files to committed containers. Asyncio; files and store in threads.

The protocol of one batch. The catalog's commit is the commit; what comes before it can be repeated or thrown away.

    died before      a restart finds                            and does
    begin            claims                                     assigns and packs them
    journal          claims, row `uploading`                    the same; the row is the collector's
    PUT              claims, journal, row                       packs them under a new key, with the days and ids of the
                                                                journal; the row is the collector's
    commit           claims, journal, row, object               commits it, if the object is ours and nobody else has
                                                                held the shard since; else packs them under a new key,
                                                                and leaves row and object to the collector
    unlink           claims, journal, row `committed`, object   unlinks the files, then the journal

A PUT that a dying packer has sent may take effect after the restart has looked: that object, too, is the collector's;
its files are packed again under the same names, days and ids, and a newer generation. So is what a file that changed
while its external payload was stored has left.

Whoever finishes a batch looks at its containers under their shards' leases. That the worker which wrote the journal is
still alive, and was only slow, does no harm: either its commit comes first, and is found, or its token has passed.

A journal names exactly the files that its objects hold: one that changed or could not be read while the container was
built is struck out before the PUT. A file that was written to after it was packed is not unlinked: it goes back to the
spool and is packed again. A file that is not where it was claimed was taken over by another worker: it is left to it.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from datetime import date

import msgspec
import structlog

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from assignment.client import Assignment, AssignmentClient, ContainerExists
from des_format.errors import DesFormatError
from des_format.names import MAX_COMPONENT
from des_format.reader import BaseReader
from des_format.shards import hex_group, parse_container_name, placement_shard, shard_hex
from des_format.source import DEFAULT_TAIL
from desfs import metrics
from desfs.adoption import adopt
from desfs.container import StoreSource
from desfs.errors import DesfsError, ObjectExists
from desfs.layout import Layout
from desfs.merging.leases import LeaseBusy
from desfs.packer.batch import Cut, Item, cut
from desfs.packer.build import Builder, Built
from desfs.packer.journal import VERSION, Journal, JournalContainer, JournalFile
from desfs.packer.leases import Leases
from desfs.packer.summary import Summary
from desfs.settings import PackerSettings
from desfs.spool import ClaimedFiles, FileState, Spool
from desfs.store.base import ObjectInfo
from desfs.store.retrying import Retrying

log = structlog.get_logger(__name__)

_PARALLEL = 4  # containers built and put at a time: two cores' worth of hashing, and uploads beside it


class BatchTaken(DesfsError):
    """Another worker took us for dead, and has the batch now: it is its to finish."""


class Publisher:
    """Brings the batches of one worker to their end. `effect` is called before each change that others can see: tests
    die there."""

    def __init__(
        self,
        spool: Spool,
        store: Retrying,
        client: AssignmentClient,
        layout: Layout,
        settings: PackerSettings,
        summary: Summary,
        *,
        holder: str,
        published: Callable[[date, str], None],
        effect: Callable[[str], None],
    ) -> None:
        """`holder` holds the leases; `published` hears of each container that was committed, by day and shard."""
        self._spool = spool
        self._store = store
        self._client = client
        self._catalog: Catalog = client.catalog
        self._layout = layout
        self._settings = settings
        self._summary = summary
        self._holder = holder
        self._published = published
        self._effect = effect
        self._builder = Builder(
            spool, store, big_file_threshold=settings.big_file_threshold, naming=layout.naming, effect=effect
        )
        self._floors: dict[date, dict[str, int]] = {}
        # Of files that no journal has yet: those that wait for a shard which others work on keep what they were given.
        self._assigned: dict[str, Assignment] = {}
        self._journal_lock = asyncio.Lock()
        self._spool_lock = asyncio.Lock()  # a Spool is for one thread at a time

    async def publish(self, batch: str, claimed: ClaimedFiles | None = None) -> bool:
        """Bring a batch from whatever state it is in to its end; False when it has to be tried again, because others
        hold some of its shards. `claimed` are its files when it has just been made.

        Raises: BatchTaken; StoreError, AssignmentError (LeaseLost is one): the batch stays, to be tried again;
        DesfsError for a journal that is damaged; DesFormatError; OSError.
        """
        old = await asyncio.to_thread(self._read_journal, batch) if claimed is None else None
        async with Leases(self._catalog, self._holder, self._settings.lease_ttl) as leases:
            undecided = await self._settle_journal(batch, old, leases) if old is not None else []
            left = {path for each in undecided for path in each.files}
            states = await asyncio.to_thread(self._claimed_states, batch, left) if claimed is None else claimed
            items = await self._plan_items(states, old)
            whole = await self._publish_items(batch, items, old, undecided, leases) if items else True
        await asyncio.to_thread(self._spool.finish, batch)
        return whole and not undecided

    def _read_journal(self, batch: str) -> Journal | None:
        try:
            return Journal.decode(self._spool.journal_path(batch).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DesfsError(f"{self._spool.journal_path(batch)}: {error}") from error

    async def _settle_journal(self, batch: str, journal: Journal, leases: Leases) -> list[JournalContainer]:
        """Find out on which side of its commit each container of a journal is, and delete the files of those that are
        committed, or can be. Those that cannot be decided yet, because others hold their shards, are returned."""
        undecided = []
        for container in journal.containers:
            try:
                lease = await leases.of(container.day, container.shard)
            except LeaseBusy as error:
                log.info("a batch waits", batch=batch, reason=str(error))
                undecided.append(container)
                continue
            record = await self._catalog.find_container(container.key)
            if await self._is_content(batch, journal, container, record, lease):
                await asyncio.to_thread(self._delete_packed, batch, container)
        return undecided

    async def _is_content(
        self,
        batch: str,
        journal: Journal,
        container: JournalContainer,
        record: ContainerRecord | None,
        lease: Lease,
    ) -> bool:
        """Whether the files of a container are safe: it was committed, or is now."""
        is_our_row = record is not None and bool(container.mark) and record.mark == container.mark
        if record is not None and is_our_row and record.state is not ContainerState.UPLOADING:
            return record.size > 0  # else it was never committed, and its row was collected
        # Not begun, begun and no more, or taken for content by somebody who found an object under its key: ours, or
        # another packer's with another catalog.
        info = await self._object(container.key)
        if info is None:
            return False
        if not await asyncio.to_thread(self._is_ours, container, info):
            if record is None or record.state in (ContainerState.UPLOADING, ContainerState.DELETED):
                await adopt(self._store, self._catalog, lease, [info], self._effect)
            return False
        if record is not None and record.state not in (ContainerState.UPLOADING, ContainerState.DELETED):
            return True
        return await self._commit_found(batch, journal, container, record, info, lease)

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
        self,
        batch: str,
        journal: Journal,
        container: JournalContainer,
        record: ContainerRecord | None,
        info: ObjectInfo,
        lease: Lease,
    ) -> bool:
        """Commit an object that was put before a crash, if its token is the last that was given for the shard."""
        if lease.token != container.token:
            if lease.previous_token != container.token:
                return False
            for each in journal.containers:
                if (each.day, each.shard, each.token) == (container.day, container.shard, lease.previous_token):
                    each.token = lease.token
            await self._write_journal(batch, journal)
        if record is None or record.token != lease.token:
            await self._catalog.begin_container(lease, container.key, container.generation, mark=container.mark)
        await self._commit(lease, _record(container, len(container.files), info.size, info.etag))
        self._count(container, [file.size for file in container.files.values()])
        return True

    async def _plan_items(self, states: ClaimedFiles, old: Journal | None) -> list[Item]:
        """The files of a batch that are still to be packed, each with its day, shard and id: those of the journal
        again, so that a file that was packed twice has one name in one day."""
        planned = {path: old.file_of(path) for path in states} if old is not None else {}
        fresh = [path for path in states if planned.get(path) is None and path not in self._assigned]
        self._assigned.update(zip(fresh, await self._client.assign(fresh) if fresh else [], strict=True))
        items = []
        for path, state in states.items():
            known = planned.get(path)
            if known is not None:
                items.append(self._item(path, state, Assignment(path, known[0].day, known[0].shard, known[1].id)))
            else:
                items.append(self._item(path, state, self._assigned[path]))
        return items

    def _claimed_states(self, batch: str, undecided: set[str]) -> ClaimedFiles:
        states = {}
        for path in self._spool.claims(batch):
            if path in undecided:
                continue
            try:
                states[path] = FileState.of(os.lstat(self._spool.claimed(batch, path)))
            except FileNotFoundError:
                continue  # taken over by another worker
        return states

    def _item(self, path: str, state: FileState, assignment: Assignment) -> Item:
        name = self._entry_name(path, assignment.id)
        shard = shard_hex(placement_shard(name, self._layout.shard_bits), self._layout.shard_bits)
        return Item(path, name, assignment.id, assignment.day, shard, state)

    def _entry_name(self, path: str, assigned: str) -> str:
        if self._layout.naming == "path":
            return path
        name = assigned + os.path.splitext(path)[1]
        return name if len(name.encode()) <= MAX_COMPONENT else assigned

    async def _publish_items(
        self, batch: str, items: list[Item], old: Journal | None, undecided: list[JournalContainer], leases: Leases
    ) -> bool:
        """Pack files; False when some have to wait for a shard that another packer works on."""
        plans: list[tuple[Cut, JournalContainer]] = []
        waiting: list[Item] = []
        for plan in cut(
            items,
            max_bytes=self._settings.max_container_bytes,
            max_files=self._settings.max_container_files,
            big_file_threshold=self._settings.big_file_threshold,
        ):
            try:
                lease = await leases.of(plan.day, plan.shard)
            except LeaseBusy as error:
                log.info("files wait", files=len(plan.items), reason=str(error))
                waiting += plan.items
                continue
            files = {
                item.path: JournalFile(item.id, item.state.inode, item.state.size, item.state.mtime_ns)
                for item in plan.items
            }
            begun = await self._begin(lease, plan.items[0].id)
            container = JournalContainer(
                begun.object_key, plan.day, plan.shard, begun.generation, lease.token, files, begun.mark
            )
            plans.append((plan, container))
        kept = undecided + ([] if old is None else _those_with(old, {item.path for item in waiting}))
        journal = Journal(VERSION, [*kept, *(container for _, container in plans)])
        await self._write_journal(batch, journal)
        for _, container in plans:
            for path in container.files:
                self._assigned.pop(path, None)
        limit = asyncio.Semaphore(_PARALLEL)
        left = Counter((container.day, container.shard) for _, container in plans)
        failures = await asyncio.gather(
            *(
                self._publish_container(batch, journal, plan, container, leases, limit, left)
                for plan, container in plans
            ),
            return_exceptions=True,
        )
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure
        return not waiting

    async def _publish_container(
        self,
        batch: str,
        journal: Journal,
        plan: Cut,
        container: JournalContainer,
        leases: Leases,
        limit: asyncio.Semaphore,
        left: Counter[tuple[date, str]],
    ) -> None:
        async with limit:
            built = await asyncio.to_thread(self._builder.build, batch, plan, container.key)
            try:
                if built.changed or built.unreadable or built.gone:
                    # A restart deletes what the journal says is in a committed container: it must not say too much.
                    container.files = {item.path: container.files[item.path] for item in built.items}
                    await self._write_journal(batch, journal)
                if built.path is not None:
                    size = (await asyncio.to_thread(built.path.stat)).st_size
                    etag = await self._put(batch, journal, container, built, leases)
                    lease = await leases.of(plan.day, plan.shard)
                    await self._commit(lease, _record(container, len(built.items), size, etag))
                    self._count(container, [item.state.size for item in built.items])
            finally:
                # Also when it was not put: the next try builds it anew, under another key.
                if built.path is not None:
                    await asyncio.to_thread(built.path.unlink, missing_ok=True)
            left[plan.day, plan.shard] -= 1
            if not left[plan.day, plan.shard]:
                await leases.done_with(plan.day, plan.shard)
            async with self._spool_lock:
                await asyncio.to_thread(self._after_commit, batch, built)

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
                info = await self._object(container.key)
                if info is not None:  # else it would be taken for an orphan of ours, and collected
                    await adopt(self._store, self._catalog, lease, [info], self._effect)
                begun = await self._begin(lease, next(iter(container.files.values())).id)
                container.generation, container.key, container.mark = begun.generation, begun.object_key, begun.mark
                await self._write_journal(batch, journal)

    async def _begin(self, lease: Lease, mark: str) -> ContainerRecord:
        """A part of the next generation of a shard: above all that the catalog has given and all that the store has.
        `mark` is the id of its first file."""
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
        self._effect(f"begin {lease.day}/{lease.shard}")
        return await self._catalog.begin_part(lease, at_least=at_least, mark=mark)

    async def _commit(self, lease: Lease, record: ContainerRecord) -> None:
        self._effect(f"commit {record.object_key}")
        try:
            await self._catalog.commit_container(lease, record)
        except ContainerExists:
            log.info("an answer of the catalog was lost; the row is there", key=record.object_key)

    async def _write_journal(self, batch: str, journal: Journal) -> None:
        path = self._spool.journal_path(batch)
        async with self._journal_lock:  # the containers of a batch are published side by side
            try:
                await asyncio.to_thread(self._spool.write_durably, path, journal.encode())
            except FileNotFoundError as error:
                raise BatchTaken(f"batch {batch}: another worker has taken it over") from error

    def _after_commit(self, batch: str, built: Built) -> None:
        for item in built.items:
            self._delete_file(batch, item.path, item.state)
        for item in built.changed:
            self.give_back(batch, item.path)
        for item, reason in built.unreadable:
            self.reject(item.path, f"cannot be read: {reason}", batch=batch)

    def _delete_packed(self, batch: str, container: JournalContainer) -> None:
        for path, file in container.files.items():
            self._delete_file(batch, path, file.state)

    def _delete_file(self, batch: str, path: str, packed: FileState) -> None:
        if not self._spool.remove_claimed(batch, path, packed):
            self.give_back(batch, path)

    def give_back(self, batch: str, path: str) -> None:
        """Put a claimed file where it was. Blocking."""
        if not self._spool.give_back(batch, path):
            log.info("changed while it was packed, and a newer file has its place: it is packed next", path=path)

    def reject(self, path: str, reason: str, *, batch: str | None = None) -> None:
        """Put a file aside for good. Blocking."""
        try:
            self._spool.reject(path, reason, batch=batch)
        except OSError as error:
            self._summary.fail(f"{path}: {reason}; it cannot be put aside: {error.strerror}")
            return
        self._summary.rejected += 1
        metrics.REJECTED_FILES.inc()
        self._summary.emptied.add(os.path.dirname(path))

    def _count(self, container: JournalContainer, sizes: list[int]) -> None:
        self._summary.count(sizes, self._settings.big_file_threshold)
        self._published(container.day, container.shard)


def _those_with(journal: Journal, paths: set[str]) -> list[JournalContainer]:
    """The containers of a journal that some of the files were planned for, with these files alone."""
    found = []
    for container in journal.containers:
        files = {path: file for path, file in container.files.items() if path in paths}
        if files:
            found.append(msgspec.structs.replace(container, files=files))
    return found


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
