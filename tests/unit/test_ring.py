"""The ring: who has which shard, and what moves when a worker leaves or joins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assignment.catalog import Worker
from assignment.ring import CLAIMED_SHARDS, Ring, shard_owners

NAMES = st.text(min_size=1, max_size=20)
WORKERS = st.sets(NAMES, min_size=1, max_size=12)
EIGHT = st.sets(NAMES, min_size=8, max_size=8)
SHARDS = {count: [f"{shard:x}" for shard in range(count)] for count in (16, 256, 4096)}


def claims_of(owners: dict[str, str]) -> dict[str, list[str]]:
    """What the workers' heartbeats claim."""
    claims: dict[str, list[str]] = {}
    for shard, name in owners.items():
        claims.setdefault(name, []).append(shard)
    return claims


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {shard for shard, name in before.items() if after[shard] != name}


@given(WORKERS, st.data())
def test_by_the_ring_alone_only_the_shards_of_who_leaves_move(workers: set[str], data: st.DataObject) -> None:
    leaver = data.draw(st.sampled_from(sorted(workers)))
    before, after = Ring(workers, 16), Ring(workers - {leaver}, 16)
    for shard in SHARDS[256]:
        if before.owner(shard) == leaver:
            assert after.owner(shard) in ((workers - {leaver}) or [None])
        else:
            assert after.owner(shard) == before.owner(shard)


@given(WORKERS, st.sets(st.text(max_size=4), max_size=60), st.dictionaries(NAMES, st.lists(st.text(max_size=4))))
def test_everybody_has_an_even_share_whatever_was_claimed(
    workers: set[str], keys: set[str], claims: dict[str, list[str]]
) -> None:
    owners = Ring(workers, 8).owners(keys, claims)
    assert owners.keys() == keys
    assert set(owners.values()) <= workers
    loads = Counter(owners.values())
    assert {loads[name] for name in workers} <= {len(keys) // len(workers), -(-len(keys) // len(workers))}


@given(WORKERS, st.integers(0, 70), st.data())
def test_who_leaves_moves_its_own_shards_and_no_others(workers: set[str], count: int, data: st.DataObject) -> None:
    shards = SHARDS[256][:count]
    before = Ring(workers, 8).owners(shards, {})
    leaver = data.draw(st.sampled_from(sorted(workers)))
    after = Ring(workers - {leaver}, 8).owners(shards, claims_of(before))
    if workers == {leaver}:
        assert after == {}
        return
    assert moved(before, after) == {shard for shard, name in before.items() if name == leaver}
    assert set(after.values()) <= workers - {leaver}


@given(WORKERS, NAMES, st.integers(0, 70))
def test_who_joins_gets_its_share_and_nothing_else_moves(workers: set[str], newcomer: str, count: int) -> None:
    shards = SHARDS[256][:count]
    before = Ring(workers - {newcomer}, 8).owners(shards, {})
    after = Ring(workers | {newcomer}, 8).owners(shards, claims_of(before))
    if before:
        assert {after[shard] for shard in moved(before, after)} <= {newcomer}


@pytest.mark.parametrize("count", SHARDS)
@given(EIGHT)
def test_of_eight_workers_one_that_leaves_moves_an_eighth(count: int, workers: set[str]) -> None:
    """At most a quarter of the shards, whatever the names, and only to live workers; also for one after another, with
    what the worker before has left behind."""
    owners = Ring(workers, 4).owners(SHARDS[count], {})
    for leaver in sorted(workers)[: 8 if count == 16 else 1]:
        after = Ring(workers - {leaver}, 4).owners(SHARDS[count], claims_of(owners))
        assert len(moved(owners, after)) == count // 8
        assert leaver not in after.values()


@given(WORKERS, st.integers(0, 70), st.lists(st.tuples(st.booleans(), NAMES), max_size=12))
def test_shares_stay_even_and_moves_few_through_any_history(
    workers: set[str], count: int, changes: list[tuple[bool, str]]
) -> None:
    """Workers come and go; each change moves no more than the share of who came or went."""
    shards = SHARDS[256][:count]
    owners = Ring(workers, 8).owners(shards, {})
    alive = set(workers)
    for joins, name in changes:
        changed = alive | {name} if joins else alive - {name}
        if changed == alive or not changed:
            continue
        after = Ring(changed, 8).owners(shards, claims_of(owners))
        share = Counter(after.values())[name] if joins else Counter(owners.values())[name]
        assert len(moved(owners, after)) == share
        owners, alive = after, changed


def test_many_virtual_nodes_spread_many_shards() -> None:
    ring = Ring(f"packer-{number}" for number in range(8))
    loads = Counter(ring.owner(shard) for shard in SHARDS[4096])
    assert len(loads) == 8
    assert max(loads.values()) <= 4096 / 4


def test_nobody_is_there() -> None:
    assert Ring([]).owner("0") is None
    assert Ring([]).owners(["0"], {"gone": ["0"]}) == {}


def test_every_process_sees_the_same_owners() -> None:
    """Python seeds its own hashes anew in each process."""
    program = (
        "from assignment.ring import Ring; ring = Ring(map(str, range(8))); shards = [f'{n:x}' for n in range(256)]; "
        "print([ring.owner(each) for each in shards], sorted(ring.owners(shards, {'1': ['3']}).items()))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


def worker(name: str, claimed: object, *, alive: bool = True) -> Worker:
    now = datetime(2026, 11, 20, tzinfo=UTC)
    return Worker(name, "spool", {CLAIMED_SHARDS: claimed}, now, now, alive)


def test_heartbeats_say_who_has_what() -> None:
    """Of the dead, and of claims that make no sense, nothing is believed; two that claim one shard share it out."""
    shards = SHARDS[16][:4]
    workers = [
        worker("a", ["0", "3"]),
        worker("b", ["3", 7, None]),
        worker("c", ["1"], alive=False),
    ]
    owners = shard_owners(shards, workers)
    assert owners["0"] == "a"
    assert Counter(owners.values()) == {"a": 2, "b": 2}
    assert shard_owners(shards, [worker("a", "0123")]) == dict.fromkeys(shards, "a")
    assert shard_owners(shards, []) == {}
