"""Every store and wrapper passes the contract; then what only one of them can get wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from desfs.errors import (
    AccessDenied,
    BadAnswer,
    DeadlineExceeded,
    NoSuchObject,
    NoSuchStore,
    ObjectExists,
    ObjectReplaced,
    StoreError,
    StoreFull,
    StoreUnavailable,
    Throttled,
    UsageError,
)
from desfs.metrics import snapshot
from desfs.store import CopyRange, S3Options, Store, open_store
from desfs.store.file import TEMPORARY_PREFIX, FileStore
from desfs.store.retrying import Retrying
from desfs.store.s3 import S3Store
from tests.contract.store_contract import MIB, StoreContract, pattern
from tests.fakes.faulty_store import FaultyStore
from tests.servers import S3Server


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server of the run, with the environment of this process set to it."""
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def no_credentials(aws: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)


class TestFileStore(StoreContract):
    @pytest.fixture
    def make_store(self, root: Path) -> Callable[[], Store]:
        return lambda: FileStore(root)


class TestS3Store(StoreContract):
    @pytest.fixture
    def make_store(self, aws: S3Server, bucket: str) -> Callable[[], Store]:
        return lambda: S3Store(bucket, "odd pre+fix/ü")


class TestRetryingFile(StoreContract):
    @pytest.fixture
    def make_store(self, root: Path) -> Callable[[], Store]:
        return lambda: open_store(str(root))


class TestRetryingS3(StoreContract):
    @pytest.fixture
    def make_store(self, aws: S3Server, bucket: str) -> Callable[[], Store]:
        return lambda: open_store(f"s3://{bucket}")


class TestFaultyStoreWithoutFaults(StoreContract):
    @pytest.fixture
    def make_store(self, root: Path) -> Callable[[], Store]:
        return lambda: FaultyStore(FileStore(root), script="ok")


# --- directories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_root_that_is_no_directory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "root"
    if kind == "file":
        path.write_bytes(b"")
    with pytest.raises(NoSuchStore, match="is no directory"):
        FileStore(path)


def test_a_root_is_made_only_when_asked(tmp_path: Path) -> None:
    FileStore(tmp_path / "a/b", create=True).put("key", b"x")
    assert (tmp_path / "a/b/key").read_bytes() == b"x"


def test_a_root_that_goes_away_is_no_empty_store(root: Path) -> None:
    store = FileStore(root)
    root.rmdir()
    calls: list[Callable[[], object]] = [
        store.list,
        lambda: store.list("../"),
        lambda: store.list("day/"),
        lambda: store.get_tail("key", 1),
        lambda: store.put("day/key", b""),
        lambda: store.delete("key"),
    ]
    for call in calls:
        with pytest.raises(NoSuchStore, match="is no directory"):
            call()
    assert not root.exists()


def test_no_symbolic_link_is_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "dir").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to(root)
    (root / "dangling").symlink_to(root / "nothing")
    store = FileStore(root)
    for delimiter in (False, True):
        for prefix in ("", "dir/", "loop/"):
            listing = store.list(prefix, delimiter=delimiter)
            assert (listing.objects, listing.prefixes) == ((), ())
    for key in ("dir/secret", "file", "loop/file", "dangling"):
        with pytest.raises(NoSuchObject):
            store.get_tail(key, 1)
    with pytest.raises(StoreError):
        store.put("dir/new", b"x")
    with pytest.raises(StoreError):
        store.put("dangling", b"x")
    store.delete("dir/secret")
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_only_regular_files_are_objects(root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        # The path of a socket is short: 107 bytes.
        here = os.open(root, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
        store = FileStore(root)
        assert store.list().objects == ()
        assert store.list(delimiter=True).prefixes == ()
        for key in ("fifo", "folder", "socket"):
            with pytest.raises(NoSuchObject):
                store.get_tail(key, 1)


def test_names_that_are_no_text_survive_a_listing(root: Path) -> None:
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe")).write_bytes(b"x")
    store = FileStore(root)
    (found,) = store.list().objects
    assert store.get_tail(found.key, 1).data == b"x"


def test_temporary_files_are_the_stores_own(root: Path) -> None:
    (root / f"{TEMPORARY_PREFIX}0123").write_bytes(b"half of a container")
    store = FileStore(root)
    assert store.list().objects == ()
    calls: list[Callable[[], object]] = [
        lambda: store.get_tail(f"{TEMPORARY_PREFIX}0123", 1),
        lambda: store.put(f"{TEMPORARY_PREFIX}0123", b""),
        lambda: store.put(f"{TEMPORARY_PREFIX}dir/x", b""),
        lambda: store.delete(f"{TEMPORARY_PREFIX}0123"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="cannot be a key"):
            call()


def test_a_put_that_fails_leaves_nothing(root: Path) -> None:
    store = FileStore(root)
    with pytest.raises(NoSuchObject):
        store.copy_ranges("day/key", [b"some bytes", CopyRange("gone", 0, 1, "")])
    assert list((root / "day").iterdir()) == []


def test_what_is_being_written_is_not_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store an object [...] never visible in part."""
    store = FileStore(root)
    link = os.link
    links = 0

    def look_first(*args: Any, **kwargs: Any) -> None:
        nonlocal links
        links += 1
        assert store.list().objects == ()
        with pytest.raises(NoSuchObject):
            store.get_tail("key", 1)
        link(*args, **kwargs)

    monkeypatch.setattr(os, "link", look_first)
    etag = store.put("key", pattern(MIB))
    assert links == 1
    assert store.get_tail("key", MIB).data == pattern(MIB)
    assert store.list().objects[0].etag == etag


def test_an_empty_directory_is_no_prefix(root: Path) -> None:
    """The common prefixes: of objects, which a directory without any has none of."""
    store = FileStore(root)
    store.put("dir/below/key", b"")
    (root / "empty").mkdir()
    assert store.list(delimiter=True).prefixes == ("dir/",)
    store.delete("dir/below/key")
    assert store.list(delimiter=True).prefixes == ()


def test_a_file_that_is_rewritten_in_place_is_another_version(root: Path) -> None:
    store = FileStore(root)
    etag = store.put("key", b"one")
    (root / "key").write_bytes(b"two")
    with pytest.raises(ObjectReplaced):
        store.get_range("key", 0, 3, if_match=etag)
    with pytest.raises(ObjectReplaced):
        store.copy_ranges("copy", [CopyRange("key", 0, 3, etag)])


def test_a_file_that_changes_while_it_is_read_is_never_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(root)
    etag = store.put("key", b"0123456789")
    pread = os.pread

    def changing(fd: int, length: int, at: int) -> bytes:
        data = pread(fd, length, at)
        os.truncate(root / "key", 3)
        return data

    monkeypatch.setattr(os, "pread", changing)
    with pytest.raises(ObjectReplaced, match="changed while it was read"):
        store.get_range("key", 0, 10, if_match=etag)


@pytest.mark.fuse  # no FUSE, but a mount all the same: it needs root
def test_a_full_disk_is_store_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        store = FileStore(small)
        etag = store.put("source", pattern(600_000))
        (tmp_path / "file").write_bytes(pattern(600_000))
        for source in (pattern(600_000), tmp_path / "file"):
            with pytest.raises(StoreFull, match="No space left"):
                store.put("key", source)
        with pytest.raises(StoreFull):
            store.copy_ranges("copy", [CopyRange("source", 0, 600_000, etag)])
        assert os.listdir(small) == ["source"]
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.fuse  # no FUSE, but a mount all the same: it needs root
def test_a_read_only_directory_is_access_denied(tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", fixed], check=True)
    try:
        with pytest.raises(AccessDenied, match="Read-only file system"):
            FileStore(fixed).put("key", b"")
    finally:
        subprocess.run(["umount", fixed], check=True)


def test_a_key_below_an_object_is_refused(root: Path) -> None:
    store = FileStore(root)
    store.put("a", b"")
    store.put("b/c", b"")
    with pytest.raises(StoreError, match="Not a directory"):
        store.put("a/below", b"")
    with pytest.raises(StoreError, match="is a directory"):
        store.put("b", b"", if_absent=False)


@pytest.mark.parametrize("without", ["", "copy_file_range"])
def test_ranges_are_copied_with_and_without_the_kernels_help(
    root: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    if without:

        def refuse(*_: object) -> int:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, without, refuse)
    store = FileStore(root)
    data = pattern(3 * MIB)
    etag = store.put("source", data)
    store.copy_ranges("copy", [b"head", CopyRange("source", 7, 2 * MIB + 9, etag), b"tail"])
    assert store.get_tail("copy", 4 * MIB).data == b"head" + data[7 : 2 * MIB + 9] + b"tail"


# --- S3 ----------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_listings_have_all_their_pages(aws: S3Server, bucket: str) -> None:
    """All objects whose key starts with `prefix`, every page of them."""
    store = S3Store(bucket, "pre")
    keys = [f"many/{n:04d} +%" for n in range(1_050)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    before = snapshot().get("desfs_store_requests_total.list.200", 0.0)
    assert [found.key for found in store.list("many/").objects] == keys
    assert snapshot()["desfs_store_requests_total.list.200"] == before + 2
    store.close()


def test_a_store_sees_nothing_beside_its_prefix(aws: S3Server, bucket: str) -> None:
    client = aws.client()
    for name in ("a/b/in", "a/b", "a/bc/out", "a/b/folder/", "out"):
        client.put_object(Bucket=bucket, Key=name, Body=b"")
    store = S3Store(bucket, "/a/b/")
    assert store.url == f"s3://{bucket}/a/b/"
    assert [found.key for found in store.list().objects] == ["in"]
    store.close()


def test_a_missing_bucket_is_named(aws: S3Server) -> None:
    store = S3Store("no-such-bucket-here")
    calls: list[Callable[[], object]] = [
        store.list,
        lambda: store.get_range("key", 0, 1),
        lambda: store.get_tail("key", 1),
    ]
    for call in calls:
        with pytest.raises(NoSuchStore) as caught:
            call()
        assert one_line(caught.value) == f"bucket 'no-such-bucket-here' does not exist at {aws.endpoint_url}"
    store.close()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told(aws: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong")
    store = S3Store(bucket)
    calls: list[Callable[[], object]] = [
        store.list,
        lambda: store.get_tail("key", 1),
        lambda: store.put("key", b""),
        lambda: store.put("key", bytes(2 * MIB)),
        lambda: store.delete("key"),
    ]
    for call in calls:
        with pytest.raises(AccessDenied, match=f"{bucket}.* at {aws.endpoint_url}.*status 403") as caught:
            call()
        assert "wrong" not in one_line(caught.value).lower()
    store.close()


@pytest.mark.usefixtures("no_credentials")
def test_no_credentials_are_told(bucket: str) -> None:
    store = S3Store(bucket)
    with pytest.raises(AccessDenied, match="no S3 credentials found: set AWS_ACCESS_KEY_ID") as caught:
        store.list()
    one_line(caught.value)
    store.close()


@pytest.mark.usefixtures("no_credentials")
def test_requests_need_not_be_signed(bucket: str) -> None:
    store = S3Store(bucket, options=S3Options(no_sign_request=True))
    with pytest.raises(AccessDenied, match="status 403"):  # it was asked, and knows nobody without a signature
        store.list()
    store.close()


def test_an_endpoint_that_is_down_is_told(aws: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    store = S3Store("bucket", options=S3Options(endpoint_url=endpoint))
    for call in (store.list, lambda: store.put("key", b"")):
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert one_line(caught.value) == f"cannot reach {endpoint}: Connection refused"
    with pytest.raises(DeadlineExceeded, match="cannot reach"):
        Retrying(store, deadline_s=0.1).list()
    store.close()


def test_an_endpoint_that_says_nothing_is_told(aws: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = S3Store("bucket", options=S3Options(endpoint_url=endpoint), read_timeout_s=0.2)
        with pytest.raises(StoreUnavailable) as caught:
            store.list()
        assert one_line(caught.value) == f"cannot reach {endpoint}: no answer in time"
        store.close()


@contextlib.contextmanager
def answering(status: str, body: bytes) -> Iterator[str]:
    """The URL of a server that gives one answer to one request without a body."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body))

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize(
    "page",
    [
        b"<html><body>Welcome to nginx",
        b"<html><body>Well-formed</body></html>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"",
    ],
)
def test_what_is_no_listing_is_no_empty_listing(page: bytes) -> None:
    with answering("200 OK", page) as endpoint:
        store = S3Store("bucket", options=S3Options(endpoint_url=endpoint))
        with pytest.raises((BadAnswer, StoreUnavailable), match=f"s3://bucket/ at {endpoint}: ") as caught:
            store.list()
        one_line(caught.value)
        store.close()


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize(
    ("status", "code", "error", "temporary"),
    [
        ("501 Not Implemented", "NotImplemented", StoreError, False),
        ("409 Conflict", "ConditionalRequestConflict", StoreUnavailable, True),
        ("412 Precondition Failed", "PreconditionFailed", ObjectExists, False),
        ("507 Insufficient Storage", "XMinioStorageFull", StoreFull, False),
        ("503 Service Unavailable", "SlowDown", Throttled, True),
        ("429 Too Many Requests", "TooManyRequests", Throttled, True),
        ("500 Internal Server Error", "InternalError", StoreUnavailable, True),
        ("400 Bad Request", "RequestTimeout", StoreUnavailable, True),
        ("400 Bad Request", "KeyTooLongError", StoreError, False),
        ("404 Not Found", "NoSuchBucket", NoSuchStore, False),
    ],
)
def test_what_s3_answers_to_a_put(status: str, code: str, error: type[StoreError], temporary: bool) -> None:
    body = f"<Error><Code>{code}</Code><Message>In two\nlines.</Message></Error>".encode()
    with answering(status, body) as endpoint:
        store = S3Store("bucket", options=S3Options(endpoint_url=endpoint))
        with pytest.raises(StoreError) as caught:
            store.put("key", b"")
        assert type(caught.value) is error
        assert caught.value.temporary is temporary
        assert endpoint in one_line(caught.value)
        assert (code == "NotImplemented") == ("lacks conditional writes" in str(caught.value))
        store.close()


@pytest.mark.parametrize(
    "options",
    [
        S3Options(endpoint_url="localhost:9000"),
        S3Options(profile="nobody-has-this"),
        S3Options(ca_bundle="/nothing/here.pem"),
    ],
)
def test_settings_that_make_no_sense_are_told(aws: S3Server, options: S3Options) -> None:
    with pytest.raises(UsageError) as caught:
        S3Store("bucket", options=options)
    one_line(caught.value)


def test_a_failed_upload_leaves_nothing(aws: S3Server, bucket: str) -> None:
    store = S3Store(bucket)
    etag = store.put("source", pattern(6 * MIB))
    with pytest.raises(NoSuchObject):
        store.copy_ranges("copy", [CopyRange("source", 0, 6 * MIB, etag), CopyRange("gone", 0, 6 * MIB, etag)])
    assert aws.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    store.close()


def test_large_ranges_are_copied_by_the_server(aws: S3Server, bucket: str) -> None:
    store = S3Store(bucket)
    etag = store.put("source", pattern(30 * MIB))
    before = snapshot()
    store.copy_ranges("copy", [b"head", CopyRange("source", 0, 30 * MIB, etag), b"tail"])
    after = snapshot()
    read = after["desfs_store_bytes_total.received"] - before.get("desfs_store_bytes_total.received", 0.0)
    sent = after["desfs_store_bytes_total.sent"] - before["desfs_store_bytes_total.sent"]
    assert read == 5 * MIB - 4  # what the head needed to become a part
    assert sent == 5 * MIB + 4
    store.close()


def test_every_request_is_counted(aws: S3Server, bucket: str) -> None:
    store = S3Store(bucket)
    before = snapshot()
    store.put("key", b"12345")
    store.get_range("key", 1, 3)
    store.get_tail("key", 3)
    store.list()
    with pytest.raises(NoSuchObject):
        store.get_tail("gone", 3)
    store.delete("key")
    after = snapshot()
    counted = {
        name.removeprefix("desfs_store_"): after[name] - before.get(name, 0.0)
        for name in after
        if after[name] != before.get(name, 0.0) and not name.endswith("_sum")
    }
    assert counted == {
        "requests_total.put.200": 1,
        "requests_total.get.206": 2,
        "requests_total.get.404": 1,
        "requests_total.list.200": 1,
        "requests_total.delete.204": 1,
        "bytes_total.sent": 5,
        "bytes_total.received": 5,
        "first_byte_seconds_count": 3,
    }
    store.close()


# --- URLs --------------------------------------------------------------------------------------------------------


def test_urls_and_paths_open_stores(root: Path, aws: S3Server) -> None:
    """`s3://bucket/prefix`, `file:///dir` or a plain path"""
    spaced = root / "with space%20"
    spaced.mkdir()
    for url in (str(spaced), spaced.as_uri(), spaced.as_uri().replace("file://", "file://localhost")):
        assert open_store(url).url == spaced.as_uri()
    for url, shown in itertools.product(("s3://bucket/a/b", "S3://bucket/a/b/"), ("s3://bucket/a/b/",)):
        store = open_store(url)
        assert store.url == shown
        store.close()
    assert open_store(str(root / "new"), create=True).list().objects == ()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://example.com/x",
        "S3:/bucket",
        "s3://",
        "s3:///prefix",
        "s3://bu cket/x",
        "s3://bucket/../x",
        "s3://bucket/a//b",
        "file://host/x",
        "file:relative",
        "file:///x?y",
        "redis://x",
        "nul\0",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert repr(url) in one_line(caught.value)


@pytest.mark.parametrize("url", ["s3://AKIA:hush@bucket/x", "https://me:hush@host/x", "file://me:hush@host/x"])
def test_secrets_in_urls_are_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "hush" not in str(caught.value)


def test_boto3_is_imported_only_for_s3(root: Path) -> None:
    program = (
        "import sys; from desfs.store import open_store, S3Options; import des_format.s3; "
        f"open_store({str(root)!r}).list(); sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
