"""The packer: claims what is settled, has it published, and keeps its shards in order. Asyncio; files in threads.

While an older version of a file is claimed, by whomever, a newer one is not: versions are packed in their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import structlog

from assignment.client import AssignmentClient, AssignmentError, LeaseLost
from des_format.errors import DesFormatError
from desfs import metrics
from desfs.errors import DesfsError, StoreError
from desfs.file_lease import LeaseRefused
from desfs.layout import Layout
from desfs.merging.compact import CompactionSettings, Compactor
from desfs.packer.announce import Announcer
from desfs.packer.leases import Leases
from desfs.packer.membership import Membership
from desfs.packer.publish import BatchTaken, Publisher
from desfs.packer.summary import Summary
from desfs.packer.wake import Waker
from desfs.settings import PackerSettings
from desfs.spool import ClaimedFiles, Found, Kind, Spool
from desfs.spool_workers import worker_number_of
from desfs.store.retrying import Retrying

log = structlog.get_logger(__name__)

_ROUNDS = 2  # of --once: what came or changed while the first was packed gets one more chance
_GRACE_S = 0.5  # beyond the settle time: file times have the grain of the kernel's tick
_BUSY_S = 0.1  # until shards that others work on are tried again, doubled each time: a container takes about so long
_LONGEST_S = 30.0  # between two tries of what fails
_TEND_S = 5.0  # between two looks at the shards that are ours to keep in order; each is a query for an open day
_DAYS_S = 60.0  # how long it is known which days are the latest
_OPEN_DAYS = 2  # of them: a day is fed for a while after its end, by files that were assigned before it


class Packer:
    """One worker of a spool, one store. `effect` is called before each change that others can see: tests die there."""

    def __init__(
        self,
        spool: Spool,
        store: Retrying,
        client: AssignmentClient,
        layout: Layout,
        settings: PackerSettings,
        *,
        shared: bool = False,
        announcer: Announcer | None = None,
        effect: Callable[[str], None] = lambda name: None,
        progress: Callable[[Summary, int], None] = lambda summary, waiting: None,
    ) -> None:
        """The spool has been joined, `shared` or not."""
        self.summary = Summary()
        self._spool = spool
        self._settings = settings
        self._progress = progress
        self._announcer = announcer
        self._membership = Membership(
            client.catalog,
            spool.place,
            shared=shared,
            shard_bits=layout.shard_bits,
            ttl_s=settings.lease_ttl,
            details=self._details,
        )
        self._holder = spool.place.name
        self._publisher = Publisher(
            spool,
            store,
            client,
            layout,
            settings,
            self.summary,
            holder=self._holder,
            published=self._published,
            effect=effect,
        )
        self._client = client
        self._compactor = Compactor(
            store,
            client.catalog,
            CompactionSettings(
                max_parts=settings.max_parts,
                max_container_bytes=settings.max_container_bytes,
                max_container_files=settings.max_container_files,
                delete_grace=settings.delete_grace,
                lease_ttl=settings.lease_ttl,
            ),
            effect,
        )
        self._fresh_days: set[date] = set()
        self._latest_days: list[date] = []
        self._tended_at = self._days_at = -math.inf
        self._stop = asyncio.Event()
        self._waker = Waker(spool.root)
        self._oldest: tuple[float, float] | None = None  # age of the oldest file that waits, and when that was known
        self._waiting = (0, 0)  # files and bytes
        metrics.SPOOL_OLDEST.set_function(self._oldest_now)

    def stop(self) -> None:
        """End after the batch at hand."""
        self._stop.set()
        self._waker.wake()

    async def run_once(self) -> Summary:
        """Pack all that is in the spool now, waiting for what was touched a moment ago to settle. What a writer holds
        open, and names that look temporary, are left."""
        async with self._membership:
            await self._membership.beat()
            await asyncio.to_thread(self._start)
            for _ in range(_ROUNDS):
                await self._recover()
                found = await self._scan_settled()
                self._progress(self.summary, sum(each.kind is Kind.SETTLED for each in found))
                await self._take(found)
                self.summary.left = _count_left(await asyncio.to_thread(self._scan))
                unfinished = await asyncio.to_thread(self._batches_for_us)
                if self._stop.is_set() or not (self.summary.left or unfinished):
                    break
            if unfinished and not self._stop.is_set():
                self.summary.fail(
                    "some files could not be packed yet and stay claimed in .desfs/claims: run the packer again"
                )
            await self._tend()
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
        async with self._membership:
            await self._repeat()
        return self.summary

    async def _repeat(self) -> None:
        interval_s = self._settings.scan_interval
        delay_s, busy_s, is_started, has_failed = interval_s, _BUSY_S, False, False
        while not self._stop.is_set():
            try:
                # First of all: what waits is known also while catalog and store are away.
                found = await asyncio.to_thread(self._scan)
                await asyncio.to_thread(self._note_waiting, found)
                if not is_started or has_failed:
                    await self._membership.beat()
                if not is_started:
                    await asyncio.to_thread(self._start)
                    is_started = True
                before = self.summary.files, self.summary.containers
                is_whole = await self._recover()
                if self._is_due(found):
                    is_whole &= await self._take(found)
                files, containers = self.summary.files - before[0], self.summary.containers - before[1]
                if containers:
                    log.info("packed", files=files, containers=containers)
                await self._remove_emptied(wait=False)
                await self._tend()
                busy_s = _BUSY_S if is_whole else min(busy_s * 2, interval_s)
                delay_s, has_failed = interval_s if is_whole else busy_s, False
                if is_whole and not found and not self.summary.emptied:
                    delay_s = max(interval_s, self._settings.rescan_interval)
            except (DesfsError, DesFormatError, AssignmentError, OSError) as error:
                delay_s, has_failed = min(max(delay_s, interval_s) * 2, _LONGEST_S), True
                log.error("packing failed, the files wait", error=str(error), next_try_s=round(delay_s, 1))
                self._failed(error)
            # Packers that failed together, or wait for one another, do not come back together.
            await self._pause(delay_s * random.uniform(0.8, 1.2), until_woken=delay_s > interval_s and not has_failed)

    def _start(self) -> None:
        self._spool.clear_work()
        self.summary.emptied |= self._spool.read_emptied()

    async def _pause(self, seconds: float, *, until_woken: bool = False) -> None:
        """Wait, until stopped; with `until_woken` until a program does something in the spool."""
        if until_woken:
            await self._waker.wait(seconds)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _scan(self) -> list[Found]:
        """What is in the spool of our share; the unsuitable is put aside at once."""
        found = []
        for each in self._spool.scan():
            if not self._membership.takes(each.path):
                continue
            if each.kind is Kind.UNSUITABLE:
                self._publisher.reject(each.path, each.reason)
            else:
                found.append(each)
        return found

    def _note_waiting(self, found: list[Found]) -> None:
        """What waits: in the spool, and in batches of ours that could not be finished yet."""
        waiting = [(each.age_s, each.size) for each in found] + self._spool.claimed_files(self._membership.is_ours)
        oldest_s = max((age_s for age_s, _ in waiting), default=None)
        self._oldest = None if oldest_s is None else (oldest_s, time.monotonic())
        self._waiting = len(waiting), sum(size for _, size in waiting)
        metrics.SPOOL_FILES.set(self._waiting[0])
        metrics.SPOOL_BYTES.set(self._waiting[1])

    def _oldest_now(self) -> float:
        """Age of the oldest file that waits: it goes on while we are busy, or wait for the store. Any thread."""
        oldest = self._oldest
        return 0.0 if oldest is None else oldest[0] + time.monotonic() - oldest[1]

    def _details(self) -> dict[str, Any]:
        """What the worker says of itself to the others."""
        return {
            "host": os.uname().nodename,
            "spool": str(self._spool.root),
            "waiting_files": self._waiting[0],
            "waiting_bytes": self._waiting[1],
            "oldest_waiting_s": round(self._oldest_now(), 1) if self._waiting[0] else None,
            "packed_files": self.summary.files,
            "packed_bytes": self.summary.bytes,
            "failures": [
                {"at": each.at.isoformat(timespec="seconds"), "what": each.what} for each in self.summary.recent
            ],
        }

    def _is_due(self, found: list[Found]) -> bool:
        """True when enough has settled for a container, or something was written `max_age` ago."""
        settled = [each for each in found if each.kind is Kind.SETTLED]
        return bool(settled) and (
            len(settled) >= self._settings.max_container_files
            or sum(each.size for each in settled) >= self._settings.max_container_bytes
            or max(each.age_s for each in settled) >= self._settings.max_age
        )

    async def _take(self, found: list[Found]) -> bool:
        """Claim and publish what has settled, batch by batch; False when something waits for others."""
        held = await asyncio.to_thread(self._held_paths)
        settled = [each.path for each in found if each.kind is Kind.SETTLED and each.path not in held]
        is_whole = True
        for start in range(0, len(settled), self._settings.max_batch_files):
            if self._stop.is_set():
                break
            batch = self._spool.new_batch()
            paths = settled[start : start + self._settings.max_batch_files]
            claimed = await asyncio.to_thread(self._claim, batch, paths)
            if claimed:
                is_whole &= await self._publish(batch, claimed)
                self._progress(self.summary, -1)
        return is_whole

    async def _publish(self, batch: str, claimed: ClaimedFiles | None = None) -> bool:
        """Bring a batch to its end; False when it has to be tried again."""
        began, before = time.monotonic(), self.summary.containers
        try:
            is_whole = await self._publisher.publish(batch, claimed)
            if self.summary.containers > before:  # else it waits for others
                metrics.PUBLISH_SECONDS.observe(time.monotonic() - began)
                metrics.LAST_PUBLISH.set_to_current_time()
            return is_whole
        except LeaseLost as error:
            self._failed(error)
            log.warning("a lease passed while its shard was packed: the batch is tried again", reason=str(error))
            return False
        except BatchTaken as error:
            self._failed(error)
            log.warning("this worker was taken for dead", reason=str(error))
            return True

    def _failed(self, error: Exception) -> None:
        metrics.PUBLISH_FAILURES.labels(_reason(error)).inc()
        self.summary.note_failure(str(error))

    def _held_paths(self, *, but: str = "") -> set[str]:
        """Files of which an older version is still claimed."""
        return {path for batch in self._spool.batches() if batch != but for path in self._spool.claims(batch)}

    def _claim(self, batch: str, paths: list[str]) -> ClaimedFiles:
        # Written before: a packer that dies leaves no folder behind. A folder that nothing was taken from stays.
        self._spool.write_emptied(self.summary.emptied | {os.path.dirname(path) for path in paths})
        claimed = self._spool.claim(paths, batch, self._refused)
        # Another worker may have claimed an older version since we looked, while the shares changed.
        older = self._held_paths(but=batch).intersection(claimed)
        for path in older:
            self._publisher.give_back(batch, path)
            del claimed[path]
        self.summary.emptied.update(os.path.dirname(path) for path in claimed)
        if not claimed:
            self._spool.finish(batch)
        return claimed

    def _refused(self, path: str, error: OSError | LeaseRefused) -> None:
        if isinstance(error, PermissionError):
            self._publisher.reject(path, f"cannot be taken: {error.strerror}")
        elif isinstance(error, LeaseRefused):
            self.summary.fail(f"{path}: {error}")
        else:
            self.summary.fail(f"{path}: cannot be claimed: {error.strerror}")

    def _batches_for_us(self) -> list[str]:
        """The batches that are ours to finish, oldest first."""
        ours, dead = self._membership.is_ours, self._membership.may_take_over
        return [batch for batch in self._spool.batches() if ours(batch) or dead(batch)]

    async def _recover(self) -> bool:
        """Finish the batches that a packer before us, a dead one or a failure has left; False when something waits for
        others. Oldest first: a newer version of a file must get the newer generation."""
        is_whole = True
        for batch in await asyncio.to_thread(self._batches_for_us):
            if self._stop.is_set():
                break
            mine: str | None = batch
            if not self._membership.is_ours(batch):
                mine = await asyncio.to_thread(self._take_over, batch)
            if mine is None:
                continue
            try:
                is_whole &= await self._publish(mine)
            except (StoreError, AssignmentError):
                raise  # the next batch would fare no better
            except (DesfsError, DesFormatError, OSError) as error:
                metrics.PUBLISH_FAILURES.labels(_reason(error)).inc()
                self.summary.fail(f"batch {mine} stays in .desfs: {error}")
        return is_whole

    def _take_over(self, batch: str) -> str | None:
        mine = self._spool.take_over(batch)
        if mine is not None:
            log.info("took over the batch of a worker that has died", batch=batch, now=mine)
            self.summary.emptied |= self._spool.read_emptied(worker_number_of(batch))
        return mine

    async def _tend(self) -> None:
        """Compact the shards of the open days that are ours to keep in order, now and then."""
        now = time.monotonic()
        if now - self._tended_at < _TEND_S or self._stop.is_set():
            return
        if now - self._days_at > _DAYS_S:
            self._latest_days = await self._client.catalog.list_days(latest=_OPEN_DAYS)
            self._fresh_days.clear()
            self._days_at = now
        self._tended_at = now
        days = sorted({*self._latest_days, *self._fresh_days})
        async with Leases(self._client.catalog, self._holder, self._settings.lease_ttl) as leases:
            done = await self._compactor.run_due(leases, days, self._membership.tends)
        merged = sum(len(merged.inputs) for each in done for merged in each.merged)
        self.summary.merged += merged
        metrics.MERGED_CONTAINERS.inc(merged)
        for day in {each.day for each in done}:
            self._announce(day)

    def _published(self, day: date, shard: str) -> None:
        self._fresh_days.add(day)
        self._announce(day)

    def _announce(self, day: date) -> None:
        if self._announcer is not None:
            self._announcer.announce(day)

    async def _remove_emptied(self, *, wait: bool) -> None:
        emptied = self.summary.emptied
        emptied.discard("")
        if not emptied:
            return
        before = set(emptied)
        deadline = time.monotonic() + self._settings.settle + _GRACE_S
        emptied = await asyncio.to_thread(self._spool.remove_emptied, emptied)
        while wait and emptied and time.monotonic() < deadline and not self._stop.is_set():
            await self._pause(self._settings.settle / 10)
            emptied = await asyncio.to_thread(self._spool.remove_emptied, emptied)
        self.summary.emptied = emptied
        if emptied != before:
            await asyncio.to_thread(self._spool.write_emptied, emptied)


def _reason(error: Exception) -> str:
    """Who has to be looked at when packing fails."""
    if isinstance(error, LeaseLost | BatchTaken):
        return "lease"
    if isinstance(error, AssignmentError):
        return "catalog"
    if isinstance(error, StoreError):
        return "store"
    if isinstance(error, DesFormatError):
        return "damage"
    return "other" if isinstance(error, DesfsError) else "spool"


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
