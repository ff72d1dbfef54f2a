"""Random histories of leases, generations, commits and ids: a SQLite catalog beside a dict that says what is right.

Time passes by renewing or acquiring with a time to live of 0: expiry is by the database's clock alone.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from assignment.catalog import ContainerRecord, Lease
from assignment.errors import ContainerExists, LeaseLost
from assignment.sqlite import SqliteCatalog

T = TypeVar("T")

DAYS = [date(2026, 11, 20), date(2026, 11, 21)]
SHARDS = ["0", "f"]
HOUR_S = 3600.0
NOW_MS = 1_795_000_000_000


@dataclass
class ShardModel:
    """What the catalog has to know of one shard of a day."""

    token: int = 0
    holder: str | None = None
    holds: bool = False
    used: set[int] = field(default_factory=set)
    least: int = 1


class LeaseHistories(RuleBasedStateMachine):
    """Two openings of one catalog, as two processes have; each step goes through one of them."""

    leases = Bundle("leases")
    catalogs = st.integers(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.openings: list[SqliteCatalog] = []
        self.shards = {(day, shard): ShardModel() for day in DAYS for shard in SHARDS}
        self.containers: dict[str, tuple[int, int]] = {}
        self.ids: dict[tuple[int, date], int] = {}

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def model(self, lease: Lease) -> ShardModel:
        return self.shards[lease.day, lease.shard]

    def holds(self, lease: Lease) -> bool:
        shard = self.model(lease)
        return shard.holds and shard.token == lease.token

    @initialize()
    def open(self) -> None:
        for _ in range(2):
            catalog = SqliteCatalog(Path(self.folder.name) / "catalog.sqlite")
            self.run(catalog.open())
            self.openings.append(catalog)

    def teardown(self) -> None:
        for catalog in self.openings:
            self.run(catalog.close())
        self.runner.close()
        self.folder.cleanup()

    @rule(
        target=leases,
        at=catalogs,
        day=st.sampled_from(DAYS),
        shard=st.sampled_from(SHARDS),
        holder=st.sampled_from("abc"),
        ttl_s=st.sampled_from([HOUR_S, HOUR_S, 0.0]),
        first_generation=st.sampled_from([1, 1, 4]),
    )
    def acquire(self, at: int, day: date, shard: str, holder: str, ttl_s: float, first_generation: int) -> Any:
        known = self.shards[day, shard]
        lease = self.run(self.openings[at].acquire(day, shard, holder, ttl_s, first_generation=first_generation))
        if known.holds and known.holder != holder:
            assert lease is None
            return multiple()
        assert lease is not None
        assert (lease.day, lease.shard, lease.holder, lease.token) == (day, shard, holder, known.token + 1)
        assert (lease.previous_token or 0, lease.previous_holder) == (known.token, known.holder)
        known.token, known.holder, known.holds = lease.token, holder, ttl_s > 0
        known.least = max(known.least, first_generation)
        return lease

    @rule(at=catalogs, lease=leases, ttl_s=st.sampled_from([HOUR_S, 0.0]))
    def renew(self, at: int, lease: Lease, ttl_s: float) -> None:
        renewed = self.run(self.openings[at].renew(lease, ttl_s))
        assert (renewed is not None) == self.holds(lease)
        if renewed is not None:
            assert (renewed.token, renewed.holder) == (lease.token, lease.holder)
            self.model(lease).holds = ttl_s > 0

    @rule(at=catalogs, lease=consumes(leases))
    def release_and_forget(self, at: int, lease: Lease) -> None:
        self.release(at, lease)

    @rule(at=catalogs, lease=leases)
    def release(self, at: int, lease: Lease) -> None:
        held = self.holds(lease)
        self.run(self.openings[at].release(lease))
        if held:
            self.model(lease).holds = False

    @rule(at=catalogs, lease=leases, at_least=st.integers(1, 6))
    def next_generation(self, at: int, lease: Lease, at_least: int) -> None:
        known = self.model(lease)
        if not self.holds(lease):
            with pytest.raises(LeaseLost):
                self.run(self.openings[at].next_generation(lease, at_least=at_least))
            return
        generation = self.run(self.openings[at].next_generation(lease, at_least=at_least))
        assert generation == max(known.least, at_least, max(known.used, default=0) + 1)
        known.used.add(generation)

    @rule(at=catalogs, lease=leases, generation=st.integers(1, 4))
    def commit(self, at: int, lease: Lease, generation: int) -> None:
        key = f"{lease.day}/{lease.shard}-{generation:06d}.des"
        size = len(self.containers)
        record = ContainerRecord(
            object_key=key, day=lease.day, shard=lease.shard, generation=generation, size=size, files=1, etag="e"
        )
        if not self.holds(lease):
            with pytest.raises(LeaseLost):
                self.run(self.openings[at].commit_container(lease, record))
        elif key in self.containers:
            with pytest.raises(ContainerExists):
                self.run(self.openings[at].commit_container(lease, record))
        else:
            self.run(self.openings[at].commit_container(lease, record))
            self.containers[key] = (lease.token, size)

    @rule(
        at=catalogs,
        node_id=st.integers(0, 1),
        day=st.sampled_from(DAYS),
        count=st.integers(1, 600),
        step_ms=st.integers(-5000, 5000),
    )
    def reserve_ids(self, at: int, node_id: int, day: date, count: int, step_ms: int) -> None:
        block = self.run(self.openings[at].reserve_ids(node_id, day, count, NOW_MS + step_ms))
        start = block.first_ms * 256 + block.first_sequence
        assert (block.node_id, block.day, block.count) == (node_id, day, count)
        assert start == max((NOW_MS + step_ms) * 256, self.ids.get((node_id, day), 0))
        self.ids[node_id, day] = start + count

    @rule(at=catalogs)
    def reopen(self, at: int) -> None:
        self.run(self.openings[at].close())
        self.run(self.openings[at].open())

    @invariant()
    def each_commit_is_there_under_the_token_it_was_made_with(self) -> None:
        if self.openings:
            listed = self.run(self.openings[0].list_containers())
            assert {c.object_key: (c.token, c.size) for c in listed} == self.containers


# A step is one to three transactions, each of several fsyncs: some 200 steps a second.
LeaseHistories.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLeaseHistories = LeaseHistories.TestCase
