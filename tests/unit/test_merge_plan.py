"""desfs/merging/plan.py: what is merged into what, as properties."""

from __future__ import annotations

from collections import deque
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from random import Random
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assignment.catalog import ContainerRecord, ContainerState
from des_format.shards import part_name
from desfs.merging.plan import (
    MIN_RUN,
    Merge,
    choose_run,
    dead_uploads,
    due,
    first_open_day,
    in_order,
    is_sealed,
    live_of,
    merged_key,
    name_of,
    plan_compaction,
    plan_seal,
    sealed_key,
)

DAY = date(2026, 11, 20)
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
MAX_PARTS = 16
UNLIMITED = 1 << 60


def part(generation: int, size: int = 100, files: int = 1, **more: object) -> ContainerRecord:
    key = f"{DAY}/{part_name('3f', generation)}"
    return ContainerRecord(object_key=key, day=DAY, shard="3f", generation=generation, size=size, files=files, **more)  # type: ignore[arg-type]


def made(merge: Merge, **more: object) -> ContainerRecord:
    """The row of what a merge makes."""
    return ContainerRecord(
        object_key=merge.object_key,
        day=DAY,
        shard="3f",
        generation=merge.generation,
        size=sum(each.size for each in merge.inputs),
        files=sum(each.files for each in merge.inputs),
        state=merge.state,
    )


def names(records: tuple[ContainerRecord, ...] | list[ContainerRecord]) -> list[str]:
    return [record.object_key.removeprefix(f"{DAY}/").removesuffix(".des") for record in records]


# --- compaction ------------------------------------------------------------------------------------------------------


def trickle(sizes: list[int], *, grace: int, max_bytes: int = UNLIMITED) -> tuple[int, int, list[ContainerRecord]]:
    """Parts of these sizes that come one after the other: the most containers at any moment, those counted that were
    superseded less than `grace` arrivals ago, and the one that is being put; all bytes written; what is left."""
    live: list[ContainerRecord] = []
    superseded: deque[int] = deque()
    written = most = 0
    for arrival, size in enumerate(sizes):
        while superseded and superseded[0] <= arrival - grace:
            superseded.popleft()
        live.append(part(arrival + 1, size))
        written += size
        most = max(most, len(live) + len(superseded))
        while merge := plan_compaction(live, max_parts=MAX_PARTS, max_bytes=max_bytes, max_files=UNLIMITED):
            merged = made(merge)
            assert len(merge.inputs) >= MIN_RUN
            assert merged.size <= max_bytes
            written += merged.size
            most = max(most, len(live) + len(superseded) + 1)
            at = live.index(merge.inputs[0])
            assert tuple(live[at : at + len(merge.inputs)]) == merge.inputs, "neighbours, in their order"
            assert merge.at_bottom == (at == 0)
            live[at : at + len(merge.inputs)] = [merged]
            superseded.extend([arrival] * len(merge.inputs))
            assert in_order(live) == live, "the merged one takes their place"
    return most, written, live


@st.composite
def arrivals(draw: st.DrawFn) -> list[int]:
    """Sizes of up to 2,000 parts: even, mixed, or wandering over many orders of magnitude."""
    dice = Random(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([300, 2_000]))
    spread = draw(st.floats(0.0, 4.0))
    period = [max(1, int(1_000 * dice.lognormvariate(0, spread))) for _ in range(draw(st.integers(1, 60)))]
    match draw(st.sampled_from(["alike", "mixed", "periodic", "two sizes", "wandering"])):
        case "alike":
            return [draw(st.integers(1, 10**6))] * count
        case "mixed":
            return [max(1, int(1_000 * dice.lognormvariate(0, spread))) for _ in range(count)]
        case "periodic":
            return [period[number % len(period)] for number in range(count)]
        case "two sizes":
            rare, large = draw(st.floats(0, 1)), draw(st.integers(1, 10**6))
            return [large if dice.random() < rare else 1 for _ in range(count)]
    size, sizes = 1_000.0, []
    for _ in range(count):
        size = min(max(size * dice.lognormvariate(0, 0.3), 1), 1e9)
        sizes.append(int(size))
    return sizes


@settings(max_examples=40, deadline=None)
@given(arrivals())
def test_a_trickle_is_cheap_whatever_the_sizes(sizes: list[int]) -> None:
    """Up to 2,000 parts of random sizes: at no moment more than 40 containers, and no more than 6 times the data
    written, the parts themselves included, when what is superseded goes 15 arrivals later."""
    most, written, live = trickle(sizes, grace=15)
    assert most <= 40
    assert written <= 6 * sum(sizes)
    assert len(live) <= MAX_PARTS
    assert sum(record.size for record in live) == sum(sizes)


def test_two_thousand_parts_of_one_size() -> None:
    """The figures that desfs/merging/plan.py has, for the plainest of days."""
    most, written, live = trickle([10_000] * 2_000, grace=15)
    assert most <= 36
    assert written <= 4.3 * 10_000 * 2_000
    assert len(live) <= MAX_PARTS


@settings(max_examples=20, deadline=None)
@given(arrivals(), st.sampled_from([4_000, 100_000]))
def test_nothing_grows_beyond_its_limit(sizes: list[int], max_bytes: int) -> None:
    """What is full is left alone, and what stands between two that are full is not merged again and again."""
    _, written, live = trickle(sizes, grace=15, max_bytes=max_bytes)
    assert written <= 6 * sum(sizes)
    full = [record.size * MIN_RUN > max_bytes for record in live]
    assert len(live) <= MAX_PARTS + MIN_RUN * (sum(full) + 1)


def test_few_containers_are_left_as_they_are() -> None:
    assert plan_compaction([part(n) for n in range(1, 17)], max_parts=16, max_bytes=9999, max_files=99) is None
    merge = plan_compaction([part(n) for n in range(1, 18)], max_parts=16, max_bytes=9999, max_files=99)
    assert merge is not None
    assert merge.object_key == merged_key(DAY, "3f", 1, 17)
    assert (merge.generation, merge.state, merge.at_bottom) == (17, ContainerState.COMMITTED, True)


def test_the_smallest_neighbours_are_merged() -> None:
    sizes = [1000] * 9 + [1] * 5 + [1000] * 6
    assert choose_run(sizes, [1] * 20, max_parts=16, max_bytes=UNLIMITED, max_files=UNLIMITED) == (9, 14)


def test_files_are_limited_as_bytes_are() -> None:
    run = choose_run([1] * 20, [30] * 20, max_parts=16, max_bytes=UNLIMITED, max_files=150)
    assert run is not None
    assert run[1] - run[0] == 5
    assert choose_run([1] * 20, [38] * 20, max_parts=16, max_bytes=UNLIMITED, max_files=150) is None, "each is full"


def test_a_container_that_is_left_alone_stays() -> None:
    live = [part(n) for n in range(1, 19)]
    merge = plan_compaction(live, max_parts=16, max_bytes=9999, max_files=99, left_alone={live[0].object_key})
    assert merge is not None
    assert names(merge.inputs) == names(live[1:])
    assert not merge.at_bottom


# --- sealing ---------------------------------------------------------------------------------------------------------


def seal(live: list[ContainerRecord], **more: object) -> list[Merge]:
    return plan_seal(live, **{"max_bytes": 10_000, "max_files": 1_000, **more})  # type: ignore[arg-type]


def test_a_shard_is_sealed_into_one_container() -> None:
    (merge,) = seal([part(n) for n in range(1, 21)])
    assert merge.object_key == sealed_key(DAY, "3f") == f"{DAY}/3f.des"
    assert (merge.generation, merge.state, merge.at_bottom, len(merge.inputs)) == (0, ContainerState.SEALED, True, 20)
    assert is_sealed([made(merge)])
    assert seal([made(merge)]) == []


def test_a_single_part_is_sealed_as_well() -> None:
    """Readers that know nothing of parts look for `{shard}.des`."""
    (merge,) = seal([part(7)])
    assert (merge.object_key, names(merge.inputs)) == (f"{DAY}/3f.des", ["3f-000007"])


def test_what_comes_late_is_sealed_under_a_key_of_its_own() -> None:
    """No key is used twice, and the sealed container's stays the oldest."""
    (first,) = seal([part(n) for n in range(1, 4)])
    (second,) = seal(live := in_order([made(first), part(4), part(5)]))
    assert names(live) == ["3f", "3f-000004", "3f-000005"]
    assert (second.object_key, second.generation) == (f"{DAY}/3f-000000-000005.des", 5)
    (third,) = seal(in_order([made(second), part(6)]), taken={made(first).object_key})
    assert names(third.inputs) == ["3f-000000-000005", "3f-000006"]
    assert (third.object_key, third.generation) == (f"{DAY}/3f-000000-000006.des", 6)
    assert is_sealed([made(third)])


def test_a_name_that_others_have_is_not_taken() -> None:
    (merge,) = seal([part(1), part(2)], taken={f"{DAY}/3f.des"})
    assert merge.object_key == f"{DAY}/3f-000000-000002.des"
    assert seal([part(1), part(2)], taken={f"{DAY}/3f.des", f"{DAY}/3f-000000-000002.des"}) == []


def test_what_is_too_large_goes_into_several_containers_in_order() -> None:
    live = [part(n, 4_000) for n in range(1, 6)]
    merges = seal(live)
    assert [names(merge.inputs) for merge in merges] == [["3f-000001", "3f-000002"], ["3f-000003", "3f-000004"]]
    assert [merge.object_key for merge in merges] == [f"{DAY}/3f.des", f"{DAY}/3f-000003-000004.des"]
    assert [merge.at_bottom for merge in merges] == [True, False]
    after = in_order([*(made(merge) for merge in merges), live[4]])
    assert names(after) == ["3f", "3f-000003-000004", "3f-000005"]
    assert seal(after) == [], "the last one has nobody to be merged with"
    (late,) = seal([*after, part(6, 1)])
    assert names(late.inputs) == ["3f-000005", "3f-000006"]


def test_files_limit_a_sealed_container_too() -> None:
    merges = seal([part(n, 1, files=400) for n in range(1, 6)])
    assert [len(merge.inputs) for merge in merges] == [2, 2]


def test_a_container_that_is_left_alone_parts_those_around_it() -> None:
    """`{shard}.des` is older than every part: it is never made of what has an older one below it."""
    live = [part(n) for n in range(1, 6)]
    merges = seal(live, left_alone={live[0].object_key})
    assert [merge.object_key for merge in merges] == [f"{DAY}/3f-000002-000005.des"]
    merges = seal(live, left_alone={live[2].object_key})
    assert [merge.object_key for merge in merges] == [f"{DAY}/3f.des", f"{DAY}/3f-000004-000005.des"]


def test_nothing_is_nothing_to_seal() -> None:
    assert seal([]) == []
    assert is_sealed([])


GENERATIONS = st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=25).map(sorted)


@given(GENERATIONS, st.data())
def test_plans_keep_the_order_of_versions(generations: list[int], data: st.DataObject) -> None:
    """However a shard was compacted before it is sealed, late parts and all: readers rank what is there as they ranked
    what it is made of, no key comes twice, and in the end one container is left."""
    live: list[ContainerRecord] = []
    content: dict[str, list[int]] = {}
    used: set[str] = set()

    def carry_out(merge: Merge) -> None:
        assert merge.object_key not in used
        used.add(merge.object_key)
        at = live.index(merge.inputs[0])
        assert tuple(live[at : at + len(merge.inputs)]) == merge.inputs
        live[at : at + len(merge.inputs)] = [made(merge)]
        content[merge.object_key] = [n for each in merge.inputs for n in content[each.object_key]]
        assert in_order(live) == live
        flat = [n for each in live for n in content[each.object_key]]
        assert flat == sorted(flat)

    for generation in generations:
        live.append(part(generation))
        content[live[-1].object_key] = [generation]
        if data.draw(st.booleans()):
            while merge := plan_compaction(live, max_parts=4, max_bytes=UNLIMITED, max_files=UNLIMITED):
                carry_out(merge)
        if data.draw(st.integers(0, 5)) == 0:
            for merge in seal(live, taken=used):
                carry_out(merge)
    for merge in seal(live, taken=used):
        carry_out(merge)
    assert is_sealed(live)
    assert content[live[0].object_key] == generations


# --- days, and what goes ---------------------------------------------------------------------------------------------


def test_a_day_is_over_when_its_grace_has_passed() -> None:
    midnight = datetime(2026, 11, 21, tzinfo=UTC)
    assert first_open_day(midnight + timedelta(minutes=59), UTC, 3600) == DAY
    assert first_open_day(midnight + timedelta(minutes=60), UTC, 3600) == date(2026, 11, 21)
    # Midnight in New York is five hours later.
    assert first_open_day(midnight + timedelta(hours=5, minutes=59), ZoneInfo("America/New_York"), 3600) == DAY
    assert first_open_day(midnight + timedelta(hours=6), ZoneInfo("America/New_York"), 3600) > DAY


def test_what_was_superseded_goes_after_its_grace_the_oldest_first() -> None:
    def superseded(record: ContainerRecord, ago_s: float) -> ContainerRecord:
        changed = NOW - timedelta(seconds=ago_s)
        return part(record.generation, state=ContainerState.SUPERSEDED, changed_at=changed)

    records = [superseded(part(3), 301), superseded(part(1), 300), superseded(part(2), 299), part(4)]
    assert names(due(records, NOW, 300)) == ["3f-000001", "3f-000003"]
    assert due(records, NOW, 1000) == []


def test_an_upload_is_dead_when_its_token_is_not_the_last() -> None:
    records = [part(n, state=ContainerState.UPLOADING, token=n) for n in (1, 2, 3)] + [part(4, token=1)]
    assert names(dead_uploads(records, 3)) == ["3f-000001", "3f-000002"]


def test_live_containers_are_ranked_as_readers_rank_them() -> None:
    """docs/semantics.md has it so: the sealed one first, then by the last generation; a merged one is newer than the
    last that it holds."""
    keys = ["3f.des", "3f-000001-000004.des", "3f-000004.des", "3f-000009.des", "3f-000010.des"]
    live = [ContainerRecord(object_key=f"{DAY}/{key}", day=DAY, shard="3f", generation=1) for key in keys]
    ranked = live_of([*reversed(live), part(2, state=ContainerState.DELETED)], "3f")
    assert names(ranked) == ["3f", "3f-000004", "3f-000001-000004", "3f-000009", "3f-000010"]
    orders = [name_of(record.object_key).order for record in ranked]
    assert all(one < other for one, other in pairwise(orders))
    assert live_of(live, "4f") == []


def test_a_key_that_is_no_container_is_refused() -> None:
    with pytest.raises(ValueError, match=r"notes\.txt is no container's key"):
        name_of(f"{DAY}/notes.txt")
