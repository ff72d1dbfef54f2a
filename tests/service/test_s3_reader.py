"""Containers in S3, with every request counted at the server."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from des_format import (
    CorruptEntry,
    DesWriter,
    InMemoryIndexCache,
    NoSuchEntry,
    NoSuchObject,
    NotAContainer,
    ObjectReplaced,
    S3DesReader,
    SourceError,
)
from des_format.layout import EXTERNAL
from tests import fixtures
from tests.fakes.counting_proxy import CountingProxy, ProxiedRequest
from tests.servers import S3Server
from tests.unit.containers import Item, build, patched

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

KEY = "store/2025-01-10/0.des"


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[CountingProxy]:
    with CountingProxy(s3.host, s3.port) as proxy:
        yield proxy


@pytest.fixture
def client(s3: S3Server, proxy: CountingProxy) -> S3Client:
    """A client whose requests the proxy counts."""
    return s3.client(endpoint_url=proxy.url)


def put(s3: S3Server, bucket: str, key: str, body: bytes) -> None:
    s3.client().put_object(Bucket=bucket, Key=key, Body=body)


def gets(proxy: CountingProxy) -> list[ProxiedRequest]:
    """The requests since the last call; all of them must be GETs."""
    requests = proxy.requests
    proxy.clear()
    assert {request.method for request in requests} <= {"GET"}, "no HEAD, no LIST"
    assert not any(request.query for request in requests)
    return requests


def payload(number: int) -> bytes:
    return b"%06d" % number * 500


NAMES = [f"file-{number:06}" for number in range(2000)]


@pytest.fixture(scope="module")
def large() -> bytes:
    """2,000 entries of 3,000 bytes: 6 MB of DATA, and an index that fits the usual tail."""
    return build([Item(name.encode(), payload(number)) for number, name in enumerate(NAMES)])


@pytest.mark.parametrize("folder", fixtures.FOLDERS, ids=lambda folder: folder.parent.name)
def test_every_example_gives_the_bytes_and_metadata_of_its_manifest(folder: Path, s3: S3Server, bucket: str) -> None:
    """Acceptance: every container of `valid/` gives its manifest's bytes and metadata through S3DesReader."""
    root = folder / "valid"
    files = [path for path in root.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: put(s3, bucket, f"s/{path.relative_to(root)}", path.read_bytes()), files))
    cache = InMemoryIndexCache()
    for _ in range(2):  # cold and warm
        fixtures.check_valid(folder, lambda key: S3DesReader(bucket, f"s/{key}", s3.client(), cache))


@pytest.mark.parametrize("case", fixtures.hostile(fixtures.OWN), ids=lambda case: case.name)
def test_every_damaged_example_has_its_outcome(case: fixtures.Hostile, s3: S3Server, bucket: str) -> None:
    put(s3, bucket, KEY, case.raw)
    if case.outcome == "reject":
        with pytest.raises(NotAContainer, match=rf"{KEY}: .*found .*want"):
            S3DesReader(bucket, KEY, s3.client())
        return
    with S3DesReader(bucket, KEY, s3.client()) as reader:
        assert reader.get_files_batch(case.readable).keys() == set(case.readable)
        for name in case.damaged:
            with pytest.raises((CorruptEntry, NoSuchEntry)):
                reader.get_file(name)


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_batch_of_adjacent_files_from_a_cold_container(
    s3: S3Server, bucket: str, client: S3Client, proxy: CountingProxy, large: bytes
) -> None:
    """Acceptance: a batch of 100 adjacent files from a cold S3 container takes at most 3 GETs and no HEAD."""
    put(s3, bucket, KEY, large)
    with S3DesReader(bucket, KEY, client) as reader:
        batch = reader.get_files_batch(NAMES[700:800])
    assert batch == {NAMES[number]: payload(number) for number in range(700, 800)}
    tail, data = gets(proxy)
    assert tail.headers["range"] == "bytes=-262144"
    assert "if-match" not in tail.headers
    assert data.headers["range"] == f"bytes={16 + 700 * 3000}-{16 + 800 * 3000 - 1}"
    assert data.headers["if-match"].strip('"')
    assert data.response_length == 100 * 3000


@pytest.mark.parametrize("tail_length", [72, 5000, 100_000])
def test_a_tail_that_is_too_short_makes_exactly_one_more_get(
    tail_length: int, s3: S3Server, bucket: str, client: S3Client, proxy: CountingProxy, large: bytes
) -> None:
    """The S3 reader opens a container with a ranged GET of the tail, a second one only if the tail was too short."""
    put(s3, bucket, KEY, large)
    reader = S3DesReader(bucket, KEY, client, tail_length=tail_length)
    tail, rest = gets(proxy)
    assert tail.headers["range"] == f"bytes=-{tail_length}"
    assert rest.headers["range"].endswith(f"-{len(large) - tail_length - 1}")
    assert rest.headers["if-match"]
    assert reader.get_files_batch(NAMES[:100])[NAMES[99]] == payload(99)
    assert len(gets(proxy)) == 1


def test_a_warm_index_cache_leaves_one_get(
    s3: S3Server, bucket: str, client: S3Client, proxy: CountingProxy, large: bytes
) -> None:
    """Acceptance: with a warm index cache 1."""
    put(s3, bucket, KEY, large)
    cache = InMemoryIndexCache()
    S3DesReader(bucket, KEY, client, cache)
    proxy.clear()
    with S3DesReader(bucket, KEY, client, cache) as reader:
        assert gets(proxy) == []
        assert reader.get_files_batch(NAMES[:100]) == {NAMES[number]: payload(number) for number in range(100)}
        (only,) = gets(proxy)
        assert only.headers["if-match"]
        assert len(reader) == 2000
        assert reader.get_meta(NAMES[3]) == {"size": 3000}
        assert gets(proxy) == [], "the version is known by now"


def test_files_beyond_the_gap_take_one_get_each(
    s3: S3Server, bucket: str, client: S3Client, proxy: CountingProxy, large: bytes
) -> None:
    """Acceptance: files spread beyond `max_gap` take one GET each."""
    put(s3, bucket, KEY, large)
    reader = S3DesReader(bucket, KEY, client)
    proxy.clear()
    spread = NAMES[::2]
    assert len(reader.get_files_batch(spread[:20], max_gap=2999)) == 20
    assert len(gets(proxy)) == 20
    assert len(reader.get_files_batch(spread[:20], max_gap=3000)) == 20
    assert len(gets(proxy)) == 1
    assert len(reader.get_files_batch(NAMES[::700])) == 3  # 2.1 MB apart, and the default gap is 1 MiB
    requests = gets(proxy)
    assert len(requests) == 3
    assert all(request.headers["if-match"] for request in requests)


def test_what_needs_no_get_makes_none(s3: S3Server, bucket: str, client: S3Client, proxy: CountingProxy) -> None:
    """An empty payload needs no GET (an HTTP range cannot be empty: `bytes=N-(N-1)` brings the whole object)."""
    put(s3, bucket, KEY, build([Item(b"a"), Item(b"b", b"x")]))
    reader = S3DesReader(bucket, KEY, client)
    proxy.clear()
    assert reader.get_files_batch(["a", "missing"]) == {"a": b""}
    with pytest.raises(NoSuchEntry):
        reader.get_file("missing")
    assert gets(proxy) == []


# --- another version -------------------------------------------------------------------------------------------------

OLD = build([Item(b"a", b"old" * 1000), Item(b"gone", b"x"), Item(b"empty")])
NEW = build([Item(b"new", b"n" * 5000), Item(b"a", b"new"), Item(b"empty", b"no more")])
SMALL = build([Item(b"a", b"s"), Item(b"empty", b"e")])


@pytest.mark.parametrize(("version", "a", "empty"), [(NEW, b"new", b"no more"), (SMALL, b"s", b"e")])
def test_an_overwritten_container_is_reopened(
    version: bytes, a: bytes, empty: bytes, s3: S3Server, bucket: str, client: S3Client, proxy: CountingProxy
) -> None:
    """With a cache that has seen the container, the first read shows whether it has been replaced."""
    put(s3, bucket, KEY, OLD)
    cache = InMemoryIndexCache()
    S3DesReader(bucket, KEY, client, cache)
    readers = [S3DesReader(bucket, KEY, client, cache) for _ in range(4)]
    put(s3, bucket, KEY, version)
    proxy.clear()
    assert readers[0].get_file("a") == a
    refused, tail, data = gets(proxy)
    assert (refused.status, tail.headers["range"], data.status) == (412, "bytes=-262144", 206)
    assert readers[1].get_file("empty") == empty
    assert "gone" not in readers[2]
    assert readers[3].get_files_batch(["gone", "a"]) == {"a": a}
    with S3DesReader(bucket, KEY, client, cache) as reader:
        proxy.clear()
        assert reader.get_file("a") == a
        assert len(gets(proxy)) == 1, "the cache knows the new version now"


def test_a_reader_that_was_open_says_so(s3: S3Server, bucket: str) -> None:
    """Every later GET carries If-Match, so bytes of another version are never returned."""
    put(s3, bucket, KEY, OLD)
    reader = S3DesReader(bucket, KEY, s3.client())
    for version in (NEW, SMALL):
        put(s3, bucket, KEY, version)
        with pytest.raises(ObjectReplaced, match=KEY):
            reader.get_file("a")
    s3.client().delete_object(Bucket=bucket, Key=KEY)
    with pytest.raises((NoSuchObject, ObjectReplaced), match=KEY):
        reader.get_file("a")


def test_threads_never_mix_two_versions(s3: S3Server, bucket: str) -> None:
    """Old index and new bytes never mix, also when many threads make the first read of a replaced container."""
    old = build([Item(b"%d" % n, b"old %d" % n * 50) for n in range(50)])
    new = build([Item(b"%d" % n, b"new %d" % n * 50) for n in reversed(range(50))])
    client = s3.client()
    for _ in range(5):
        put(s3, bucket, KEY, old)
        cache = InMemoryIndexCache()
        S3DesReader(bucket, KEY, client, cache)
        reader = S3DesReader(bucket, KEY, client, cache)
        put(s3, bucket, KEY, new)
        barrier = threading.Barrier(8)

        def read(thread: int, reader: S3DesReader = reader, barrier: threading.Barrier = barrier) -> dict[str, bytes]:
            barrier.wait()
            return {str(n): reader.get_file(str(n)) for n in range(thread, 50, 8)}

        with ThreadPoolExecutor(8) as pool:
            for result in pool.map(read, range(8)):
                for name, payload in result.items():
                    assert payload == b"new %d" % int(name) * 50


def test_threads_share_a_reader(s3: S3Server, bucket: str, large: bytes) -> None:
    put(s3, bucket, KEY, large)
    with S3DesReader(bucket, KEY, s3.client()) as reader, ThreadPoolExecutor(16) as pool:
        payloads = pool.map(reader.get_file, NAMES[:200])
        assert list(payloads) == [payload(number) for number in range(200)]


# --- external objects ------------------------------------------------------------------------------------------------


def external_container(s3: S3Server, bucket: str, meta: bytes, size: int = 5) -> None:
    item = Item(b"d/v", flags=EXTERNAL, data_offset=0, data_length=size, meta=meta)
    put(s3, bucket, KEY, build([item, Item(b"in", b"side")]))


@pytest.mark.parametrize(
    ("recorded", "key"),
    [
        ("", "store/2025-01-10/_bigFiles/d/v"),
        ("store/other/_bigFiles/d/v", "store/other/_bigFiles/d/v"),
        ("other/_bigFiles/d/v", "store/other/_bigFiles/d/v"),
        ("store/other/_bigFiles/d/v", "store/2025-01-10/_bigFiles/d/v"),
        ("store/2025-01-10/secret/d/v", "store/2025-01-10/_bigFiles/d/v"),
        ("elsewhere/_bigFiles/d/w", "store/2025-01-10/_bigFiles/d/v"),
    ],
)
def test_external_objects_by_the_single_and_the_batch_call(recorded: str, key: str, s3: S3Server, bucket: str) -> None:
    """A recorded `external_key` is honoured only inside the store's own prefix, in a `_bigFiles/` folder."""
    external_container(s3, bucket, b'{"size":5,"external_key":"%b"}' % recorded.encode())
    for wrong in ("store/2025-01-10/secret/d/v", "elsewhere/_bigFiles/d/w", "elsewhere/_bigFiles/d/v"):
        put(s3, bucket, wrong, b"wrong")
    put(s3, bucket, key, b"right")
    with S3DesReader(bucket, KEY, s3.client()) as reader:
        assert reader.get_file("d/v") == b"right"
        assert reader.get_files_batch(["d/v", "in"]) == {"d/v": b"right", "in": b"side"}


@pytest.mark.parametrize("content", [None, b"", b"1234", b"123456"])
def test_an_external_object_that_is_missing_or_has_another_size(
    content: bytes | None, s3: S3Server, bucket: str
) -> None:
    """An external object that is missing, or whose size differs from the index: EIO, reported."""
    external_container(s3, bucket, b'{"size":5}')
    if content is not None:
        put(s3, bucket, "store/2025-01-10/_bigFiles/d/v", content)
    with S3DesReader(bucket, KEY, s3.client()) as reader:
        with pytest.raises(CorruptEntry, match="'d/v': external object store/2025-01-10/_bigFiles/d/v"):
            reader.get_file("d/v")
        assert reader.get_file("in") == b"side"


def test_an_empty_external_object(s3: S3Server, bucket: str) -> None:
    external_container(s3, bucket, b'{"size":0}', size=0)
    with S3DesReader(bucket, KEY, s3.client()) as reader:
        with pytest.raises(CorruptEntry, match="missing"):
            reader.get_file("d/v")
        put(s3, bucket, "store/2025-01-10/_bigFiles/d/v", b"")
        assert reader.get_file("d/v") == b""


# --- what is not there -----------------------------------------------------------------------------------------------


def test_an_object_or_a_bucket_that_is_not_there(s3: S3Server, bucket: str) -> None:
    with pytest.raises(NoSuchObject, match=rf"{bucket}/{KEY}"):
        S3DesReader(bucket, KEY, s3.client())
    with pytest.raises(SourceError, match="no-such-bucket"):
        S3DesReader("no-such-bucket", KEY, s3.client())
    put(s3, bucket, KEY, OLD)
    with pytest.raises(SourceError, match=KEY):
        S3DesReader(bucket, KEY, s3.client(secret_key="wrong"))


def test_the_settings_of_the_environment_are_used(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a client, one is made from the usual AWS environment."""
    with DesWriter(tmp_path / "f.des") as writer:
        writer.add_file("a", os.urandom(10), {"mime": "x/y"})
    put(s3, bucket, KEY, (tmp_path / "f.des").read_bytes())
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    with S3DesReader(bucket, KEY) as reader:
        assert reader.get_meta("a") == {"mime": "x/y", "size": 10}


def test_a_header_is_never_fetched_just_to_be_checked(
    s3: S3Server, bucket: str, client: S3Client, proxy: CountingProxy, large: bytes
) -> None:
    put(s3, bucket, KEY, patched(large, 0, b"X" * 8))
    assert S3DesReader(bucket, KEY, client).get_file(NAMES[0]) == payload(0)
    assert len(gets(proxy)) == 2
    put(s3, bucket, KEY, patched(OLD, 0, b"X" * 8))
    with pytest.raises(NotAContainer, match="header at byte 0: found b'XXXXXXXX'"):
        S3DesReader(bucket, KEY, client)
