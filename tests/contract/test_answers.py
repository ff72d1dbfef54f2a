"""Answers of servers that misbehave: never wrong bytes, and what may pass is tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import stamina

import des_format.errors as fmt
from des_format.s3 import build_client, foreign_errors, get_range, get_tail, translate
from desfs.errors import (
    AccessDenied,
    BadAnswer,
    DeadlineExceeded,
    NoSuchObject,
    ObjectReplaced,
    StoreError,
    StoreUnavailable,
    Throttled,
)
from desfs.store import Answer, S3Options
from desfs.store.obstore_s3 import ObstoreS3Store
from desfs.store.retrying import Retrying
from desfs.store.s3 import S3Store
from tests.contract.store_contract import pattern
from tests.fakes.http_faults import FaultyS3

BODY = pattern(100_000)
# Half of a longer body would be read whole before it is found wanting.
RANGE = (1_000, 51_000)
TEMPORARY = {
    "ignore-range": BadAnswer,
    "shifted": BadAnswer,
    "short": BadAnswer,
    "cut": BadAnswer,
    "empty": BadAnswer,
    "reset": StoreUnavailable,
    "stall": StoreUnavailable,
    "stall-body": StoreUnavailable,
    "503": Throttled,
    "500": StoreUnavailable,
}
FINAL = {"403": AccessDenied, "404": NoSuchObject, "412": ObjectReplaced}

Get = Callable[[S3Store | Retrying, FaultyS3], Answer]


def a_range(store: S3Store | Retrying, server: FaultyS3) -> Answer:
    return store.get_range("key", *RANGE, if_match=server.etag.strip('"'))


def a_tail(store: S3Store | Retrying, server: FaultyS3) -> Answer:
    return store.get_tail("key", 50_000)


WANTED: dict[Get, bytes] = {a_range: BODY[slice(*RANGE)], a_tail: BODY[-50_000:]}
gets = pytest.mark.parametrize("get", [a_range, a_tail], ids=["range", "tail"])


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    with stamina.set_testing(True, attempts=5):
        yield


@pytest.fixture
def server() -> Iterator[FaultyS3]:
    with FaultyS3(BODY) as running:
        yield running


@pytest.fixture(params=[S3Store, ObstoreS3Store], ids=["boto3", "obstore"])
def store(request: pytest.FixtureRequest, server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    kind: type[S3Store] = request.param
    made = kind("bucket", options=S3Options(endpoint_url=server.url), read_timeout_s=0.2)
    yield made
    made.close()


@gets
def test_a_good_answer_is_taken(store: S3Store, server: FaultyS3, get: Get) -> None:
    answer = get(store, server)
    assert (answer.data, answer.etag, answer.size) == (WANTED[get], server.etag.strip('"'), len(BODY))
    assert len(server.requests) == 1
    assert {request.method for request in server.requests} == {"GET"}


@gets
@pytest.mark.parametrize("fault", [*TEMPORARY, *FINAL])
def test_no_fault_gives_bytes(store: S3Store, server: FaultyS3, get: Get, fault: str) -> None:
    """BadAnswer when the answer is not the range that was asked for."""
    server.script = fault
    expected = {**TEMPORARY, **FINAL}[fault]
    with pytest.raises(expected) as caught:
        get(store, server)
    assert caught.value.temporary is (fault in TEMPORARY)
    assert "\n" not in str(caught.value)
    # A whole object may be a tail, if it is short: obstore hides how long it is, so it is asked for.
    assert len(server.requests) == 1 + asks_twice(store, get, fault)


def asks_twice(store: S3Store, get: Get, fault: str) -> bool:
    return isinstance(store, ObstoreS3Store) and get is a_tail and fault == "ignore-range"


@gets
@pytest.mark.parametrize("fault", TEMPORARY)
def test_what_may_pass_is_tried_again(store: S3Store, server: FaultyS3, get: Get, fault: str) -> None:
    faults = [fault] * (2 + 2 * asks_twice(store, get, fault))
    server.script = " ".join([*faults, "ok"])
    assert get(Retrying(store), server).data == WANTED[get]
    assert [request.word for request in server.requests] == [*faults, "ok"]


@gets
def test_faults_of_all_kinds_in_a_row(store: S3Store, server: FaultyS3, get: Get) -> None:
    with stamina.set_testing(True, attempts=50):
        faults = [fault for fault in TEMPORARY for _ in range(1 + asks_twice(store, get, fault))]
        server.script = " ".join([*faults, "ok"])
        assert get(Retrying(store), server).data == WANTED[get]
    assert len(server.requests) == len(faults) + 1


@gets
@pytest.mark.parametrize("fault", FINAL)
def test_what_will_not_pass_is_not(store: S3Store, server: FaultyS3, get: Get, fault: str) -> None:
    server.script = fault
    with pytest.raises(FINAL[fault]):
        get(Retrying(store), server)
    assert len(server.requests) == 1


@gets
def test_what_does_not_pass_is_told(store: S3Store, server: FaultyS3, get: Get) -> None:
    server.script = "503"
    with pytest.raises(DeadlineExceeded, match="SlowDown"):
        get(Retrying(store), server)


def test_another_version_is_never_taken_for_the_one_asked_for(store: S3Store, server: FaultyS3) -> None:
    """ObjectReplaced when the object's ETag is not `if_match`, also where the server ignores If-Match."""
    server.script = "wrong-etag"
    for tried in (store, Retrying(store)):
        with pytest.raises(ObjectReplaced):
            a_range(tried, server)


@pytest.mark.parametrize("fault", TEMPORARY)
def test_connections_survive_a_fault(store: S3Store, server: FaultyS3, fault: str) -> None:
    """A body that was not read must not be taken for the next answer on that connection."""
    server.script = f"{fault} ok"
    with pytest.raises(StoreError):
        a_range(store, server)
    for _ in range(3):
        assert a_range(store, server).data == WANTED[a_range]
        assert a_tail(store, server).data == WANTED[a_tail]


@pytest.mark.parametrize("length", [len(BODY), len(BODY) + 1, 10 * len(BODY)])
def test_the_whole_object_is_a_tail_that_is_long_enough(store: S3Store, server: FaultyS3, length: int) -> None:
    """The last `length` bytes (> 0), or the whole object if it is shorter."""
    for script in ("ok", "ignore-range"):
        server.script = script
        assert store.get_tail("key", length).data == BODY
    server.script = "ignore-range"
    with pytest.raises(BadAnswer):
        store.get_tail("key", len(BODY) - 1)


def test_an_empty_object_takes_two_gets(store: S3Store, server: FaultyS3) -> None:
    server.body = b""
    answer = store.get_tail("key", 100)
    assert (answer.data, answer.size, answer.etag) == (b"", 0, server.etag.strip('"'))
    assert [(request.method, "range" in request.headers) for request in server.requests] == [
        ("GET", True),
        ("GET", False),
    ]


def test_an_object_that_is_not_empty_any_more_is_not_read_whole(store: S3Store, server: FaultyS3) -> None:
    server.script = "416 ok"
    with pytest.raises(BadAnswer, match="100000 bytes"):
        store.get_tail("key", 100)


# --- the same functions as the format library uses them ----------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("ignore-range", fmt.BadAnswer),
        ("shifted", fmt.BadAnswer),
        ("short", fmt.BadAnswer),
        ("cut", fmt.BadAnswer),
        ("empty", fmt.BadAnswer),
        ("reset", fmt.SourceUnavailable),
        ("stall", fmt.SourceUnavailable),
        ("stall-body", fmt.SourceUnavailable),
        ("503", fmt.SourceUnavailable),
        ("500", fmt.SourceUnavailable),
        ("403", fmt.SourceError),
        ("404", fmt.NoSuchObject),
        ("412", fmt.ObjectReplaced),
    ],
)
def test_errors_are_the_librarys_own(
    server: FaultyS3, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[fmt.SourceError]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    client = build_client(endpoint_url=server.url, read_timeout_s=0.2)
    server.script = fault
    calls: list[Callable[[], object]] = [
        lambda: get_range(client, "bucket", "key", *RANGE, if_match=server.etag.strip('"')),
        lambda: get_tail(client, "bucket", "key", 50_000),
    ]
    for call in calls:
        with pytest.raises((fmt.SourceError, *foreign_errors())) as caught:
            call()
        assert isinstance(caught.value, Exception)
        translated = translate(caught.value, "s3://bucket/key")
        assert type(translated) is error
        assert translated.temporary is (fault in TEMPORARY)
        assert "bucket/key" in str(translated)
        assert "\n" not in str(translated)
    client.close()
