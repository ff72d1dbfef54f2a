"""docs/architecture.md, Prefetch: windows for those who walk forward, rent or buy for the others."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desfs.blocks import BLOCK
from desfs.store.link import Link
from desfs.window import Accounts, Scan, Window, buy_cost_s, rent_size

PIECE = 4 << 20
ALL = 1 << 60
LINKS = st.builds(
    Link,
    latency_s=st.floats(1e-4, 1.0, allow_nan=False),
    bandwidth=st.floats(1e5, 1e10, allow_nan=False),
)


# --- random reads: rent or buy -----------------------------------------------------------------------------------


@dataclass
class Container:
    """Files one behind the other, and which of them are in memory."""

    sizes: list[int]
    held: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def left(self) -> int:
        return self.total - sum(self.sizes[number] for number in self.held)

    def rent(self, number: int, limit: int) -> int:
        """Fetch a file and its neighbours behind it; their bytes."""
        brought, at = self.sizes[number], number + 1
        self.held.add(number)
        while at < len(self.sizes) and brought + self.sizes[at] <= limit:
            brought += self.sizes[at]
            self.held.add(at)
            at += 1
        return brought


Trace = list[tuple[int, int]]


def buy_s(size: int, link: Link) -> float:
    return buy_cost_s(size, -(-size // PIECE), link) if size else 0.0


def at_start_s(sizes: list[int], link: Link) -> float:
    """Buying at the first read: whoever reads first waits for a round trip."""
    return link.latency_s + buy_s(sum(sizes), link)


def rent_only_s(sizes: list[int], files: list[int], link: Link) -> float:
    container, cost = Container(sizes), 0.0
    for number in files:
        if number not in container.held:
            cost += link.time_s(container.rent(number, rent_size(link)))
    return cost


def played(days: list[list[int]], trace: Trace, link: Link, affordable: int = ALL) -> tuple[float, float, list[int]]:
    """What the policy costs over a trace, in waiting for misses and in purchases; its dearest miss; what it bought."""
    containers = [Container(sizes) for sizes in days]
    accounts = Accounts()
    bought: list[int] = []
    cost = dearest = 0.0
    for place, number in trace:
        container = containers[place]
        if number in container.held:
            continue
        waited = link.time_s(container.rent(number, rent_size(link)))
        cost, dearest = cost + waited, max(dearest, waited)
        lefts = {each: other.left for each, other in enumerate(containers)}
        chosen = accounts.miss(place, waited, lefts, PIECE, affordable, link)
        assert sum(lefts[each] for each in chosen) <= affordable
        bought += chosen
        for each in chosen:
            assert lefts[each] > 0
            cost += buy_s(lefts[each], link)
            containers[each].held = set(range(len(days[each])))
    return cost, dearest, bought


SIZES = st.lists(st.integers(1, 3_000_000), min_size=1, max_size=25)


@st.composite
def days_and_traces(draw: st.DrawFn, most: int) -> tuple[list[list[int]], Trace]:
    days = draw(st.lists(SIZES, min_size=1, max_size=most))
    files = [(place, number) for place, sizes in enumerate(days) for number in range(len(sizes))]
    return days, draw(st.lists(st.sampled_from(files), max_size=80))


@given(days_and_traces(most=1), LINKS)
def test_one_container_costs_at_most_twice_the_best_choice_with_hindsight_and_one_miss(
    given_: tuple[list[list[int]], Trace], link: Link
) -> None:
    """Rent or buy: never worse than twice the best choice made with hindsight, plus one window."""
    (sizes,), trace = given_
    cost, dearest, bought = played([sizes], trace, link)
    best = min(rent_only_s(sizes, [number for _, number in trace], link), at_start_s(sizes, link))
    assert cost <= 2 * best + dearest + 1e-9
    assert len(bought) <= 1


@given(days_and_traces(most=6), LINKS)
def test_a_day_costs_at_most_twice_the_best_choice_for_each_container_and_a_miss_of_each(
    given_: tuple[list[list[int]], Trace], link: Link
) -> None:
    """A container is bought when its misses have cost as much; what was waited beyond that buys others."""
    days, trace = given_
    cost, dearest, bought = played(days, trace, link)
    best = 0.0
    for place, sizes in enumerate(days):
        files = [number for each, number in trace if each == place]
        best += min(rent_only_s(sizes, files, link), at_start_s(sizes, link))
    touched = len({place for place, _ in trace})
    assert cost <= 2 * best + touched * dearest + 1e-9
    assert len(bought) == len(set(bought))


@given(days_and_traces(most=6), LINKS, st.integers(0, 30_000_000))
def test_nothing_is_bought_that_memory_does_not_hold(
    given_: tuple[list[list[int]], Trace], link: Link, affordable: int
) -> None:
    played(*given_, link, affordable)  # it asserts that


@given(days_and_traces(most=6), LINKS)
def test_a_day_costs_at_most_twice_what_fetching_all_of_it_at_the_start_would(
    given_: tuple[list[list[int]], Trace], link: Link
) -> None:
    """Of a whole day the best choice may be to fetch it: at most twice that, and a miss of each container."""
    days, trace = given_
    cost, dearest, _ = played(days, trace, link)
    whole = sum(at_start_s(sizes, link) for sizes in days)
    assert cost <= 2 * whole + len(days) * dearest + 1e-9


def test_two_hundred_random_files_of_a_day_take_the_time_of_a_few_round_trips() -> None:
    """200 random files of a 120 MB day of 16 containers, 20 ms away."""
    days = [[12_000] * 625] * 16
    trace = [(n * 7 % 16, n * 389 % 625) for n in range(200)]
    link = Link(0.02, 600e6)
    cost, _, bought = played(days, trace, link)
    assert sorted(bought) == list(range(16))
    assert cost < 25 * link.latency_s


def test_a_purchase_costs_its_bytes_and_something_for_each_request() -> None:
    link = Link(0.02, 1e9)
    assert buy_cost_s(10**9, 0, link) == pytest.approx(1.0)
    assert buy_cost_s(0, 10, link) == pytest.approx(0.01)


@given(LINKS)
def test_a_single_read_brings_what_costs_no_time_worth_speaking_of(link: Link) -> None:
    size = rent_size(link)
    assert BLOCK <= size <= 1 << 20
    assert size == BLOCK or size / link.bandwidth <= 0.1 * link.latency_s


# --- scans: windows that double ----------------------------------------------------------------------------------


@dataclass
class Scanned:
    """What came of a scan. `asked` are the bytes that were fetched, `unseen` the files that the kernel had."""

    windows: list[Window]
    asked: int
    unseen: int
    waits: int


def scan(sizes: list[int], link: Link, max_window: int, *, announced: bool, pushed: bool) -> Scanned:
    """Read files one behind the other; with `pushed` the kernel takes what it is given, and asks for the rest."""
    total, at, fetched = sum(sizes), 0, 0
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    in_kernel: set[int] = set()
    reader: Scan | None = None
    result = Scanned([], 0, 0, 0)
    for number, (start, stop) in enumerate(pairwise(starts)):
        at = start
        if number in in_kernel:
            result.unseen += 1
            continue
        cached = stop <= fetched
        window: Window | None
        if reader is None:
            reader, window = Scan.begin(at, stop, total, announced, link, max_window)
        elif reader.is_step(at, cached):
            window = reader.step(at, stop, total, cached, link)
        else:
            window = None
            assert cached, f"file {number} at {at} is nobody's step: {reader}"
        if window is not None:
            result.windows.append(window)
            # Blocks come whole, and a file is in one block.
            end = starts[min(bisect_left(starts, window.stop), len(sizes))]
            result.asked += max(end - max(fetched, window.start), 0)
            assert window.start <= max(fetched, at), "a hole in front of the window"
            fetched = max(fetched, end)
            if pushed and window.push:
                inside = [
                    each for each in range(len(sizes)) if window.start <= starts[each] and starts[each + 1] <= end
                ]
                held_back = next((each for each in inside if starts[each] >= window.marker), None)
                in_kernel |= {each for each in inside if each not in (held_back, number)}
        if not cached:
            result.waits += 1
            assert stop <= fetched, "the reader waits for what nobody fetches"
    return result


@given(
    sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=300),
    link=LINKS,
    max_window=st.integers(BLOCK, 64 << 20),
    announced=st.booleans(),
    pushed=st.booleans(),
)
def test_a_scan_fetches_every_byte_once_in_windows_that_double(
    sizes: list[int], link: Link, max_window: int, announced: bool, pushed: bool
) -> None:
    """When reads walk forward, a window opens and doubles, up to `max_prefetch`; nothing is fetched twice, and no
    window is larger than it may be, but for a file that is."""
    total, largest = sum(sizes), max(sizes)
    result = scan(sizes, link, max_window, announced=announced, pushed=pushed)
    assert result.asked <= total
    for window in result.windows:
        assert window.stop - window.start <= max(max_window, rent_size(link)) + largest
    first = result.windows[0].stop - result.windows[0].start
    doublings = log2(max(max_window / max(min(first, max_window), 1), 1)) + 1
    assert len(result.windows) <= 2 + doublings + total / max_window * 2 + result.waits


@given(
    count=st.integers(1, 4000),
    size=st.integers(1000, 30_000),
    link=LINKS,
    announced=st.booleans(),
    pushed=st.booleans(),
)
def test_the_windows_of_a_scan_are_few(count: int, size: int, link: Link, announced: bool, pushed: bool) -> None:
    """Small files: the number of windows goes with the logarithm of the bytes, and the reader waits twice at most."""
    result = scan([size] * count, link, ALL, announced=announced, pushed=pushed)
    assert len(result.windows) <= log2(count * size / BLOCK + 1) + 3
    assert result.waits <= 2
    if pushed:
        beyond = [window for window in result.windows if window.push]
        unseen = sum((min(window.stop, count * size) - window.start) // size for window in beyond) - 4 * len(beyond)
        assert result.unseen >= unseen  # but for the markers the kernel has it all


def test_windows_are_pushed_from_the_second_one_on_and_from_the_first_where_it_was_announced() -> None:
    link = Link(0.02, 100e6)
    for announced in (False, True):
        result = scan([10_000] * 2000, link, 8 << 20, announced=announced, pushed=True)
        assert [window.push for window in result.windows] == [announced] + [True] * (len(result.windows) - 1)


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 50 << 20)), min_size=1, max_size=60),
    size=st.integers(1, 100_000),
    link=LINKS,
)
def test_a_random_reader_is_given_no_pushes(steps: list[tuple[bool, int]], size: int, link: Link) -> None:
    """Who reads here and there is nobody's next step, wherever readers were seen before."""
    scans: list[Scan] = []
    base = 1 << 40
    at = base
    for forward, step in steps:
        distance = 2 * rent_size(link) + 4 * BLOCK + size + step
        at = at + distance if forward else at - distance
        if any(each.start - distance // 2 < at < each.end + 3 * BLOCK for each in scans):
            continue  # by chance where another one was
        assert not any(each.is_step(at, False) for each in scans)
        scan_, window = Scan.begin(at, at + size, ALL, False, link, 64 << 20)
        assert not window.push
        assert window.stop - window.start <= max(rent_size(link), size)
        scans.append(scan_)


def test_a_window_ends_where_nobody_knows_how_the_reader_goes_on() -> None:
    link = Link(0.02, 100e6)
    reader, window = Scan.begin(0, 1000, 5000, True, link, 64 << 20)
    assert window.stop == max(5000, rent_size(link))
    reader, window = Scan.begin(0, 1000, 10 << 20, True, link, 1 << 20)
    assert window == Window(0, 1 << 20, True, 1000)
    following = reader.step(reader.marker, reader.marker + 1000, (1 << 20) + 5, True, link)
    assert following == Window(1 << 20, (1 << 20) + 5, True, 1 << 20)
    assert reader.step(1 << 20, (1 << 20) + 5, (1 << 20) + 5, True, link) is None


def test_a_miss_elsewhere_leaves_the_accounts_of_a_day_alone() -> None:
    """A container that has left its day is read by those who had its files open: it stands for itself."""
    link, size = Link(0.02, 1e6), 10_000_000
    accounts = Accounts()
    assert accounts.miss(1, buy_s(size, link) * 0.6, {1: size, 2: size}, PIECE, ALL, link) == []
    assert accounts.miss(9, 0.001, {9: size}, PIECE, ALL, link) == []
    assert accounts.miss(1, buy_s(size, link) * 0.3, {1: size, 2: size}, PIECE, ALL, link) == []
    assert accounts.miss(1, buy_s(size, link) * 0.2, {1: size, 2: size}, PIECE, ALL, link) == [1]


def test_accounts_are_looked_at_again_when_the_link_turns_out_to_be_faster() -> None:
    slow, fast, size = Link(0.02, 1e6), Link(0.02, 1e9), 10_000_000
    lefts = {1: size, 2: size, 3: size}
    accounts = Accounts()
    for container in (1, 2):
        assert accounts.miss(container, 0.02, lefts, PIECE, ALL, slow) == []
    assert sorted(accounts.miss(3, 0.02, lefts, PIECE, ALL, fast)) == [1, 2, 3]
