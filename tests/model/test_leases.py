"""Random histories of leases, containers and ids: a catalog beside a dict that says what is right.

Time passes by renewing or acquiring with a time to live of 0: expiry is by the database's clock alone.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from assignment.catalog import LIVE, ContainerRecord, ContainerState, Lease
from assignment.errors import ContainerExists, ContainersChanged, InvalidRequest, LeaseLost
from assignment.opening import catalog_at
from tests.servers import PostgresServer

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
    next_generation: int = 1


@dataclass
class ContainerModel:
    """What the catalog has to know of one container."""

    state: ContainerState
    token: int
    size: int = 0


class LeaseHistories(RuleBasedStateMachine):
    """Two openings of one catalog, as two processes have; each step goes through one of them."""

    leases = Bundle("leases")
    catalogs = st.integers(0, 1)
    generations = st.integers(1, 4)
    some_generations = st.frozensets(st.integers(1, 4), max_size=3)

    def new_catalog(self) -> AbstractContextManager[str]:
        """The URL of an empty catalog for one history."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.place = self.new_catalog()
        url = self.place.__enter__()
        self.openings = [catalog_at(url) for _ in range(2)]
        for catalog in self.openings:
            self.run(catalog.open())
        self.shards = {(day, shard): ShardModel() for day in DAYS for shard in SHARDS}
        self.containers: dict[str, ContainerModel] = {}
        self.ids: dict[tuple[int, date], int] = {}

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def model(self, lease: Lease) -> ShardModel:
        return self.shards[lease.day, lease.shard]

    def holds(self, lease: Lease) -> bool:
        shard = self.model(lease)
        return shard.holds and shard.token == lease.token

    def record(self, lease: Lease, generation: int, state: ContainerState) -> ContainerRecord:
        return ContainerRecord(
            object_key=self.key(lease, generation),
            day=lease.day,
            shard=lease.shard,
            generation=generation,
            size=len(self.containers),
            files=1,
            etag="e",
            state=state,
        )

    def key(self, lease: Lease, generation: int) -> str:
        return f"{lease.day}/{lease.shard}-{generation:06d}.des"

    def go_on_behind(self, lease: Lease, generation: int) -> None:
        known = self.model(lease)
        known.next_generation = max(known.next_generation, generation + 1)

    def teardown(self) -> None:
        for catalog in self.openings:
            self.run(catalog.close())
        self.runner.close()
        self.place.__exit__(None, None, None)

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
        known.next_generation = max(known.next_generation, first_generation)
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
    def begin_part(self, at: int, lease: Lease, at_least: int) -> None:
        known = self.model(lease)
        if not self.holds(lease):
            with pytest.raises(LeaseLost):
                self.run(self.openings[at].begin_part(lease, at_least=at_least))
            return
        part = self.run(self.openings[at].begin_part(lease, at_least=at_least))
        assert part.generation == max(known.next_generation, at_least)
        assert part.object_key == self.key(lease, part.generation)
        assert part.object_key not in self.containers
        self.go_on_behind(lease, part.generation)
        self.containers[part.object_key] = ContainerModel(ContainerState.UPLOADING, lease.token)

    @rule(at=catalogs, lease=leases, generation=generations)
    def begin_container(self, at: int, lease: Lease, generation: int) -> None:
        key = self.key(lease, generation)
        call = self.openings[at].begin_container(lease, key, generation)
        there = self.containers.get(key)
        if not self.holds(lease):
            with pytest.raises(LeaseLost):
                self.run(call)
        elif there is not None and there.state in (*LIVE, ContainerState.SUPERSEDED):
            with pytest.raises(ContainerExists):
                self.run(call)
        else:
            self.run(call)
            self.go_on_behind(lease, generation)
            self.containers[key] = ContainerModel(ContainerState.UPLOADING, lease.token)

    @rule(
        at=catalogs,
        lease=leases,
        generation=generations,
        state=st.sampled_from(sorted(LIVE)),
        superseded=some_generations,
    )
    def commit(self, at: int, lease: Lease, generation: int, state: ContainerState, superseded: frozenset[int]) -> None:
        record = self.record(lease, generation, state)
        keys = [self.key(lease, other) for other in sorted(superseded - {generation})]
        call = self.openings[at].commit_container(lease, record, supersedes=keys)
        there = self.containers.get(record.object_key)
        refusal: type[Exception] | None = None
        if not self.holds(lease):
            refusal = LeaseLost
        elif there is None or there.state is ContainerState.DELETED:
            refusal = InvalidRequest
        elif there.state is not ContainerState.UPLOADING:
            refusal = ContainerExists
        elif there.token != lease.token:
            refusal = InvalidRequest
        elif any(key not in self.containers or self.containers[key].state not in LIVE for key in keys):
            refusal = ContainersChanged
        if refusal is not None:
            with pytest.raises(refusal):
                self.run(call)
            return
        self.run(call)
        self.containers[record.object_key] = ContainerModel(state, lease.token, record.size)
        for key in keys:
            self.containers[key].state = ContainerState.SUPERSEDED

    @rule(at=catalogs, lease=leases, gone=some_generations)
    def delete(self, at: int, lease: Lease, gone: frozenset[int]) -> None:
        keys = [self.key(lease, generation) for generation in gone]
        call = self.openings[at].delete_containers(lease, keys)
        if not self.holds(lease):
            with pytest.raises(LeaseLost):
                self.run(call)
            return
        self.run(call)
        for key in keys:
            if key in self.containers:
                self.containers[key].state = ContainerState.DELETED

    @rule(at=catalogs, lease=leases, found=some_generations, state=st.sampled_from(ContainerState))
    def adopt(self, at: int, lease: Lease, found: frozenset[int], state: ContainerState) -> None:
        records = [self.record(lease, generation, state) for generation in found]
        call = self.openings[at].adopt_containers(lease, records)
        if not self.holds(lease):
            with pytest.raises(LeaseLost):
                self.run(call)
            return
        self.run(call)
        for record in records:
            self.go_on_behind(lease, record.generation)
            there = self.containers.get(record.object_key)
            if there is None or there.state in (ContainerState.UPLOADING, ContainerState.DELETED):
                self.containers[record.object_key] = ContainerModel(state, lease.token, record.size)

    @rule(at=catalogs)
    def forget(self, at: int) -> None:
        gone = [key for key, known in self.containers.items() if known.state is ContainerState.DELETED]
        assert self.run(self.openings[at].forget_deleted(0)) == len(gone)
        for key in gone:
            del self.containers[key]

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
    def the_containers_are_those_that_were_written(self) -> None:
        listed = self.run(self.openings[0].list_containers())
        assert {c.object_key: ContainerModel(c.state, c.token, c.size) for c in listed} == self.containers


# A step is one to three transactions, each of several fsyncs: some 200 steps a second.
HISTORIES = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class SqliteHistories(LeaseHistories):
    @contextmanager
    def new_catalog(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            yield str(Path(folder) / "catalog.sqlite")


SqliteHistories.TestCase.settings = HISTORIES
TestSqliteHistories = SqliteHistories.TestCase


def test_histories_of_a_postgres_catalog(postgres_session: PostgresServer) -> None:
    class PostgresHistories(LeaseHistories):
        @contextmanager
        def new_catalog(self) -> Iterator[str]:
            database = postgres_session.new_database("catalog")
            yield postgres_session.url(database)
            postgres_session.drop_database(database)

    run_state_machine_as_test(PostgresHistories, settings=HISTORIES)
