"""Names never repeat: several replicas over one Postgres, many clients, and a replica that loses its node id."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from assignment.connect import open_client
from assignment.opening import open_catalog
from des_format.assigned_names import parse_name
from tests.service.serving import LIMIT_S, TOKEN, Replica, replica

REPLICAS = 4
CLIENTS = 32
BATCHES = 100
BATCH = 10_000
SINGLES = 25  # of each client


@pytest.mark.timeout(240)
def test_a_million_assignments_without_a_repeat(
    postgres: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 replicas, 32 clients, batches of 10,000; then single ones, which share transactions."""
    with ExitStack() as stack:
        replicas = [stack.enter_context(replica(postgres, tmp_path / f"{n}")) for n in range(REPLICAS)]
        ids, batches_s = asyncio.run(assign_batches(postgres, [each.url for each in replicas]))
        singles, singles_s = asyncio.run(assign_singles([each.url for each in replicas]))
        transactions = sum(count(each, 'desfs_assignment_transactions_total{outcome="ok"}') for each in replicas)
    assert len(ids) == BATCHES * BATCH
    assert len(singles) == CLIENTS * SINGLES
    assert len({*ids, *singles}) == len(ids) + len(singles)
    assert len({parse_name(each).node_id for each in singles}) == REPLICAS
    assert transactions < BATCHES + CLIENTS * SINGLES
    with capsys.disabled():
        print(
            f"\n{len(ids) / batches_s:,.0f} assignments/s in batches of {BATCH:,}, "
            f"{len(singles) / singles_s:,.0f} requests/s one by one, in {transactions:,.0f} transactions"
        )


async def assign_batches(catalog: str, urls: list[str]) -> tuple[list[str], float]:
    """The ids of a million files, and how long it took."""
    todo = iter(range(BATCHES))
    ids: list[str] = []

    async def work(number: int) -> None:
        url = urls[number % len(urls)]
        opened = await open_client(catalog, shard_bits=4, holder=f"{number}", service_url=url, token=TOKEN)
        async with opened as client:
            for batch in todo:
                paths = [f"folder {batch}/{n}" for n in range(BATCH)]
                ids.extend(each.id for each in await client.assign(paths))

    started = time.monotonic()
    await asyncio.gather(*map(work, range(CLIENTS)))
    return ids, time.monotonic() - started


async def assign_singles(urls: list[str]) -> tuple[list[str], float]:
    ids: list[str] = []

    async def work(number: int) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=urls[number % len(urls)], headers=headers, timeout=LIMIT_S) as client:
            for n in range(SINGLES):
                answer = await client.post("/v1/assign", json={"path": f"{number}/{n}"})
                ids.append(answer.raise_for_status().json()["assignments"][0]["id"])

    started = time.monotonic()
    await asyncio.gather(*map(work, range(CLIENTS)))
    return ids, time.monotonic() - started


def count(one: Replica, metric: str) -> float:
    with one.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric))


_LOAD = 4  # clients


@dataclass
class Load:
    """Clients that ask one replica on and on, and what they hear."""

    one: Replica
    answers: list[tuple[int, str | None]] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)
    heard: threading.Condition = field(default_factory=threading.Condition)

    def ask(self) -> None:
        with self.one.client() as client:
            while not self.ending.is_set():
                answer = client.post("/v1/assign", json={"path": "a"})
                name = answer.json()["assignments"][0]["id"] if answer.status_code == 200 else None
                with self.heard:
                    self.answers.append((answer.status_code, name))
                    self.heard.notify_all()

    def wait_more(self, more: int) -> list[tuple[int, str | None]]:
        """The answers of now and on, that many at least."""
        with self.heard:
            start = len(self.answers)
            assert self.heard.wait_for(lambda: len(self.answers) >= start + more, LIMIT_S)
            return self.answers[start:]

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.ask) for _ in range(_LOAD)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.ending.set()
            for thread in threads:
                thread.join(LIMIT_S)


def test_a_replica_that_lost_its_node_id_stops_answering(postgres: str, tmp_path: Path) -> None:
    """One node id is left for two replicas. The one that has it is stopped past its time; when it goes on, the other
    one has the node id, and it answers 503 to those who asked it meanwhile and to all that come, until it has another.
    """

    async def take_the_others() -> None:
        catalog = await open_catalog(postgres)
        assert None not in [await catalog.lease_node_id("the test", 3600) for _ in range(255)]
        await catalog.close()

    asyncio.run(take_the_others())
    with ExitStack() as stack:
        first = stack.enter_context(replica(postgres, tmp_path / "first", "--node-ttl", "2"))
        second_stack = stack.enter_context(ExitStack())
        second = second_stack.enter_context(replica(postgres, tmp_path / "second", "--node-ttl", "2", ready=503))
        load = Load(first)
        stack.enter_context(load.going())
        before = load.wait_more(20)
        assert {status for status, _ in before} == {200}
        os.kill(first.pid, signal.SIGSTOP)
        stack.callback(os.kill, first.pid, signal.SIGCONT)
        second.wait_ready()
        with second.client() as client:
            taken = [client.post("/v1/assign", json={"path": "a"}).json()["assignments"][0]["id"] for _ in range(20)]
        at = len(load.answers)
        os.kill(first.pid, signal.SIGCONT)
        load.wait_more(50)
        late = [status for status, _ in load.answers[at:]]
        # What a client waited for when the replica was stopped may have been reserved before: it is its, and nobody's.
        assert late.count(200) <= _LOAD
        assert set(late) - {200} == {503}
        first.wait_ready(503)
        names = [name for _, name in load.answers if name is not None]
        assert {parse_name(name).node_id for name in (*names, *taken)} == {parse_name(names[0]).node_id}
        second_stack.close()  # it gives the node id back
        first.wait_ready()
        load.wait_more(1)
    names = [name for _, name in load.answers if name is not None]
    assert len({*names, *taken}) == len(names) + len(taken)
    assert "the node id was lost" in first.log.read_text()
