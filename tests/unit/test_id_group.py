"""Reservations that share a transaction."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assignment.catalog import NodeLease
from assignment.errors import CatalogUnavailable, NodeIdLost
from assignment.group import IdGroup, split
from assignment.sequence import IdBlock, SequenceState, reserve

DAY = date(2026, 11, 20)
NOW_MS = 1_795_000_000_000
LEASE = NodeLease(7, "replica", 1, datetime(2026, 11, 20, tzinfo=UTC))
LIMIT_S = 20.0


class Counter:
    """Reserves in memory; each transaction waits for a permit."""

    def __init__(self) -> None:
        self.transactions: list[int] = []
        self.begun: asyncio.Queue[int] = asyncio.Queue()
        self.permits = asyncio.Semaphore(0)
        self.failure: Exception | None = None
        self._state: SequenceState | None = None

    async def reserve(self, count: int) -> IdBlock:
        self.transactions.append(count)
        self.begun.put_nowait(count)
        await self.permits.acquire()
        if self.failure is not None:
            raise self.failure
        self._state, block = reserve(self._state, node_id=7, day=DAY, now_ms=NOW_MS, count=count)
        return block


def group_of(counter: Counter, lease: NodeLease | Exception = LEASE, limit_s: float = LIMIT_S) -> IdGroup:
    def held() -> NodeLease:
        if isinstance(lease, Exception):
            raise lease
        return lease

    return IdGroup(counter.reserve, limit_s=limit_s, lease=held)


async def one_more(counter: Counter) -> None:
    """Wait until another transaction has begun."""
    async with asyncio.timeout(LIMIT_S):
        await counter.begun.get()


def test_thirty_two_callers_take_two_transactions() -> None:
    async def main() -> None:
        counter = Counter()
        group = group_of(counter)
        first = asyncio.create_task(group.reserve(3))
        await one_more(counter)
        others = [asyncio.create_task(group.reserve(n)) for n in range(1, 32)]
        counter.permits.release()
        await one_more(counter)
        counter.permits.release()
        blocks = await asyncio.gather(first, *others)
        assert counter.transactions == [3, sum(range(1, 32))]
        assert [block.count for block in blocks] == [3, *range(1, 32)]
        names = [name for block in blocks for name in block.names("DES")]
        assert len(set(names)) == len(names) == sum(counter.transactions)

    asyncio.run(main())


def test_who_gives_up_leaves_the_others_theirs() -> None:
    async def main() -> None:
        counter = Counter()
        group = group_of(counter)
        tasks = [asyncio.create_task(group.reserve(1))]
        await one_more(counter)
        tasks += [asyncio.create_task(group.reserve(n)) for n in (2, 3)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # in a transaction
        tasks[1].cancel()  # waiting for one
        counter.permits.release()
        counter.permits.release()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, asyncio.CancelledError) for each in done] == [True, True, False]
        assert counter.transactions == [1, 3]

    asyncio.run(main())


def test_a_failure_is_everybodys_and_the_next_ones_are_served() -> None:
    async def main() -> None:
        counter = Counter()
        group = group_of(counter)
        counter.failure = CatalogUnavailable("down")
        first = asyncio.create_task(group.reserve(1))
        await one_more(counter)
        others = [asyncio.create_task(group.reserve(1)) for _ in range(3)]
        counter.permits.release()
        counter.permits.release()
        failed = await asyncio.gather(first, *others, return_exceptions=True)
        assert [type(each) for each in failed] == [CatalogUnavailable] * 4
        counter.failure = None
        counter.permits.release()
        assert (await group.reserve(5)).count == 5

    asyncio.run(main())


def test_a_transaction_that_hangs_is_given_up() -> None:
    async def main() -> None:
        counter = Counter()
        with pytest.raises(CatalogUnavailable, match="no answer in time"):
            await group_of(counter, limit_s=0.01).reserve(1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("lease", "error"),
    [
        (NodeIdLost("its time has passed"), NodeIdLost),
        (NodeLease(8, "replica", 1, datetime(2026, 11, 20, tzinfo=UTC)), CatalogUnavailable),
    ],
)
def test_ids_of_a_node_that_was_lost_meanwhile_are_not_handed_out(
    lease: NodeLease | Exception, error: type[Exception]
) -> None:
    """A process that was stopped after its transaction goes on when another may have the node id."""

    async def main() -> None:
        counter = Counter()
        counter.permits.release()
        with pytest.raises(error):
            await group_of(counter, lease).reserve(1)
        assert counter.transactions == [1]

    asyncio.run(main())


@given(st.integers(0, 255), st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_what_is_split_has_the_same_ids_in_the_same_order(first_sequence: int, counts: list[int]) -> None:
    block = IdBlock(7, DAY, NOW_MS, first_sequence, sum(counts))
    names: list[str] = []
    rest = block
    for count in counts:
        mine, rest = split(rest, count)
        assert mine.count == count
        names += mine.names("DES")
    assert rest.count == 0
    assert names == list(block.names("DES"))
