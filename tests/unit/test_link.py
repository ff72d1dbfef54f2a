"""How far a store is and how much it brings, from a scripted clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desfs.errors import StoreUnavailable
from desfs.store.base import Answer
from desfs.store.link import Link, LinkMeter

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Way:
    """Requests that take as long as a script says."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.meter = LinkMeter(self.clock)

    @contextlib.contextmanager
    def running(self, size: int, body_s: float | None = None) -> Iterator[None]:
        with self.meter.request() as answered:
            yield
            answered.append(Answer(bytes(size), "", size, body_s))

    def get(self, size: int, lasts_s: float, body_s: float | None = None) -> None:
        with self.running(size, body_s):
            self.clock.now_s += lasts_s

    @property
    def link(self) -> Link:
        return self.meter.link()


@pytest.fixture
def way() -> Way:
    return Way()


def test_before_anything_was_measured_a_store_is_as_far_as_a_region(way: Way) -> None:
    assert way.link.latency_s == pytest.approx(0.02)
    assert way.link.bandwidth == pytest.approx(100e6)
    assert way.link.time_s(10**6) == pytest.approx(0.03)


def test_the_time_to_the_headers_is_the_latency(way: Way) -> None:
    way.get(4 * MIB, 0.5, body_s=0.45)
    assert way.link.latency_s == pytest.approx(0.05)
    way.get(4 * MIB, 0.5, body_s=0.6)  # a clock that is off
    assert way.link.latency_s == 0.0


def test_small_answers_tell_the_latency_where_nobody_knows_when_the_headers_came(way: Way) -> None:
    way.get(1000, 0.3)
    way.get(1000, 0.011)
    way.get(1000, 0.5)
    assert way.link.latency_s == pytest.approx(0.011)


def test_a_first_answer_that_is_large_tells_something_at_least(way: Way) -> None:
    way.get(10 * MIB, 0.2)
    assert 0 < way.link.latency_s < 0.2


def test_old_latencies_are_forgotten(way: Way) -> None:
    way.get(1000, 0.001)
    for _ in range(100):
        way.get(1000, 0.2)
    assert way.link.latency_s == pytest.approx(0.2)


def test_the_bandwidth_is_that_of_all_requests_together(way: Way) -> None:
    """Four requests at a time, each with a quarter of 400 MB/s."""
    way.get(1000, 0.01)
    for _ in range(10):
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(way.running(10_000_000, body_s=0.1))
            way.clock.now_s += 0.11
    assert way.link.bandwidth == pytest.approx(400e6, rel=0.2)


def test_time_in_which_nothing_was_asked_for_does_not_count(way: Way) -> None:
    for _ in range(10):
        way.get(10 * MIB, 0.11, body_s=0.1)
        way.clock.now_s += 3600
    assert way.link.bandwidth == pytest.approx(10 * MIB / 0.1, rel=0.25)


def test_small_answers_do_not_tell_the_bandwidth(way: Way) -> None:
    for _ in range(100):
        way.get(1000, 0.02)
    assert way.link.bandwidth == pytest.approx(100e6)


def test_a_request_that_fails_is_not_measured(way: Way) -> None:
    def fail() -> None:
        with way.meter.request():
            way.clock.now_s += 60
            raise StoreUnavailable("down")

    with pytest.raises(StoreUnavailable):
        fail()
    assert way.link == LinkMeter().link()
    way.get(4 * MIB, 0.05, body_s=0.04)
    assert way.link.latency_s == pytest.approx(0.01)


@given(
    st.lists(
        st.tuples(st.integers(0, 8 * MIB), st.floats(0, 100), st.one_of(st.none(), st.floats(0, 100))), max_size=20
    )
)
def test_whatever_clocks_say_a_link_can_be_reckoned_with(requests: list[tuple[int, float, float | None]]) -> None:
    way = Way()
    for request in requests:
        way.get(*request)
        assert way.link.latency_s >= 0
        assert 0 < way.link.bandwidth < float("inf")


def test_what_one_answer_brings_alone_is_what_the_way_can_do_at_least(way: Way) -> None:
    """Many small answers together show how fast they are taken apart; one that comes alone, how fast the way is."""
    with contextlib.ExitStack() as together:
        for _ in range(16):
            together.enter_context(way.running(MIB // 2, 0.05))
        way.clock.now_s += 0.1
    slow = way.link.bandwidth
    way.get(MIB, 0.022, 0.002)
    assert way.link.bandwidth == pytest.approx(MIB / 0.002)
    assert slow < way.link.bandwidth / 2
    # One during which another began says nothing: they share the way, or the time of those who take them apart.
    with way.running(MIB, 0.001):
        way.clock.now_s += 0.02
        way.get(1000, 0.001)
    assert way.link.bandwidth == pytest.approx(MIB / 0.002)
