"""Retries around a store, without a server and without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stamina

from desfs.errors import (
    BadAnswer,
    DeadlineExceeded,
    NoSuchObject,
    ObjectExists,
    ObjectReplaced,
    StoreError,
    StoreUnavailable,
    Throttled,
)
from desfs.metrics import snapshot
from desfs.settings import MountSettings, PackerSettings
from desfs.store.base import CopyRange
from desfs.store.file import FileStore
from desfs.store.retrying import WAIT_MAX_S, Retrying, call_with_retries
from tests.fakes.faulty_store import FaultyStore


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    # The number of tries is what the test's clock or script makes it; the cap only ends a test that went wrong.
    with stamina.set_testing(True, attempts=100):
        yield


class Clock:
    """Moves on by a step each time it is read."""

    def __init__(self, step_s: float = 1.0) -> None:
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.fixture
def inside(tmp_path: Path) -> FaultyStore:
    return FaultyStore(FileStore(tmp_path / "store", create=True))


@pytest.fixture
def store(inside: FaultyStore) -> Retrying:
    return Retrying(inside, clock=Clock())


@pytest.mark.parametrize("fault", ["503", "reset", "stall", "short"])
def test_temporary_errors_are_tried_again(inside: FaultyStore, store: Retrying, fault: str) -> None:
    etag = store.put("a", b"bytes")
    calls: list[Callable[[], object]] = [
        lambda: store.get_range("a", 1, 3, if_match=etag),
        lambda: store.get_tail("a", 2),
        store.list,
        lambda: store.copy_ranges("b", [CopyRange("a", 0, 2, etag)]),
        lambda: store.delete("b"),
        lambda: store.put("c", b""),
    ]
    for call in calls:
        inside.script = f"{fault} {fault} ok"
        inside.calls.clear()
        call()
        assert [word for _, _, word in inside.calls] == [fault, fault, "ok"]


def test_other_errors_are_not(inside: FaultyStore, store: Retrying) -> None:
    with pytest.raises(NoSuchObject):
        store.get_tail("nothing", 1)
    etag = store.put("a", b"bytes")
    with pytest.raises(ObjectReplaced):
        store.get_range("a", 0, 1, if_match="other")
    with pytest.raises(BadAnswer, match="has 5 bytes"):  # temporary by its class, not in this case
        store.get_range("a", 0, 6, if_match=etag)
    assert len(inside.calls) == 4


def test_at_the_deadline_the_last_error_is_told(inside: FaultyStore) -> None:
    """DeadlineExceeded: Every try within the request's deadline failed; the last failure is the cause."""
    inside.script = "503 503 reset"
    store = Retrying(inside, deadline_s=10, clock=Clock(step_s=1))
    with pytest.raises(DeadlineExceeded, match=r"gave up after 10 s: get_tail 'a': scripted fault 'reset'") as caught:
        store.get_tail("a", 1)
    assert isinstance(caught.value.__cause__, StoreUnavailable)
    assert not caught.value.temporary
    assert len(inside.calls) == 10


def test_the_deadline_of_a_put_counts_from_its_first_failure() -> None:
    clock = Clock(step_s=0)
    calls = 0

    def slow() -> int:
        nonlocal calls
        calls += 1
        clock.now_s += 1000
        if calls == 1:
            raise StoreUnavailable("after a long upload")
        return calls

    with pytest.raises(DeadlineExceeded):
        call_with_retries("get", slow, deadline_s=60, clock=clock)
    calls = 0
    assert call_with_retries("put", slow, deadline_s=60, from_first_failure=True, clock=clock) == 2


def test_waits_grow_and_the_last_try_comes_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/semantics.md: Requests to the store are tried again, with growing waits, until `deadline=` (60 s)."""
    waits: list[float] = []
    clock = Clock(step_s=0)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock.now_s += seconds

    def fail() -> None:
        raise Throttled("slow down")

    monkeypatch.setattr("tenacity.nap.time.sleep", sleep)
    with stamina.set_testing(False), pytest.raises(DeadlineExceeded):
        call_with_retries("get", fail, deadline_s=60, clock=clock)
    assert clock.now_s == pytest.approx(60)
    assert MountSettings().deadline == PackerSettings().deadline == 60
    assert waits[0] < 0.5 < max(waits)
    assert sum(waits[:4]) < sum(waits[4:8])
    assert max(waits) <= WAIT_MAX_S
    assert 10 < len(waits) < 30


def test_every_retry_is_counted(inside: FaultyStore, store: Retrying) -> None:
    name = "desfs_store_retries_total.list"
    before = snapshot().get(name, 0.0)
    inside.script = "503 reset ok"
    store.list()
    assert snapshot()[name] == before + 2


def test_retries_say_nothing_on_the_terminal(
    inside: FaultyStore, store: Retrying, capfd: pytest.CaptureFixture[str]
) -> None:
    inside.script = "503 503 ok"
    store.list()
    assert capfd.readouterr() == ("", "")


# --- lost answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_put_whose_answer_was_lost_finds_its_own_object(
    inside: FaultyStore, store: Retrying, tmp_path: Path, size: int, as_file: bool
) -> None:
    data = bytes(range(size))
    (tmp_path / "source").write_bytes(data)
    inside.script = "lost-answer reset ok"
    etag = store.put("a", tmp_path / "source" if as_file else data)
    assert store.get_tail("a", 1).etag == etag
    assert store.list().objects[0].size == size


def test_sent_bytes_are_compared_piece_by_piece(
    inside: FaultyStore, store: Retrying, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("desfs.store.retrying._COMPARE_PIECE", 7)
    (tmp_path / "source").write_bytes(bytes(range(100)))
    for source in (bytes(range(100)), tmp_path / "source"):
        inside.script = "lost-answer ok"
        store.put("a", source)
        store.delete("a")
    assert sum(method == "get_range" for method, _, _ in inside.calls) == 2 * 15


@pytest.mark.parametrize("there", [b"", b"mine", b"mine, but longer", b"MINE, really", b"mine, reallY"])
def test_somebody_elses_object_is_not_taken_for_ones_own(inside: FaultyStore, store: Retrying, there: bytes) -> None:
    inside.put("a", there)
    inside.script = "reset ok"
    with pytest.raises(ObjectExists):
        store.put("a", b"mine, really")
    assert store.get_tail("a", 100).data == there


def test_an_object_found_at_the_first_try_is_not_read(inside: FaultyStore, store: Retrying) -> None:
    inside.put("a", b"same")
    with pytest.raises(ObjectExists):
        store.put("a", b"same")
    assert [method for method, _, _ in inside.calls] == ["put", "put"]


def test_a_copy_whose_answer_was_lost_finds_its_own_object(inside: FaultyStore, store: Retrying) -> None:
    source = store.put("source", b"0123456789")
    pieces: list[bytes | CopyRange] = [
        b"head",
        CopyRange("source", 2, 5, source),
        b"",
        CopyRange("source", 9, 10, source),
    ]
    inside.script = "lost-answer ok"
    etag = store.copy_ranges("a", pieces)
    assert store.get_tail("a", 100).data == b"head2349"
    assert store.get_tail("a", 1).etag == etag
    inside.script = "reset ok"
    with pytest.raises(ObjectExists):
        store.copy_ranges("a", [*pieces, b"more"])


def test_a_comparison_that_fails_is_no_success(inside: FaultyStore) -> None:
    store = Retrying(inside, deadline_s=3, clock=Clock())
    inside.script = "lost-answer ok reset"
    with pytest.raises(DeadlineExceeded):
        store.put("a", b"bytes")


def test_a_source_that_vanished_is_named(store: Retrying, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*gone.*No such file"):
        store.put("a", tmp_path / "gone")
