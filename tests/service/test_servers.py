"""What the servers, proxies and mounts that the other tests stand on really do.

Each fact about SeaweedFS (4.48) below is one that the project depends on, or one in which it differs from AWS's S3.
"""

from __future__ import annotations

import errno
import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ResponseStreamingError,
)
from s3transfer.manager import TransferManager

from tests import servers
from tests.fakes.counting_proxy import CountingProxy
from tests.fakes.http_faults import FaultyS3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BODY = bytes(range(256)) * 40
PART = 5 * 1024 * 1024  # the smallest that S3 allows, but for the last


def refused(call: Callable[[], object]) -> tuple[int, str]:
    """Status and code of the error that the call must end with."""
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


@pytest.fixture
def client(s3: servers.S3Server) -> S3Client:
    return s3.client()


@pytest.fixture
def etag(client: S3Client, bucket: str) -> str:
    """The ETag of BODY, stored under `key`."""
    return client.put_object(Bucket=bucket, Key="key", Body=BODY)["ETag"]


# --- S3: reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=10-19", 10, 20),
        ("bytes=10000-", 10000, 10240),
        ("bytes=10230-99999", 10230, 10240),
        ("bytes=-100", 10140, 10240),
        ("bytes=-99999", 0, 10240),
    ],
)
def test_a_range_is_answered_with_206(
    client: S3Client, bucket: str, etag: str, asked: str, start: int, stop: int
) -> None:
    """A suffix longer than the object gives the whole object, as 206 with its Content-Range."""
    answer = client.get_object(Bucket=bucket, Key="key", Range=asked, IfMatch=etag)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert answer["ContentRange"] == f"bytes {start}-{stop - 1}/10240"
    assert answer["ETag"] == etag
    assert answer["Body"].read() == BODY[start:stop]


@pytest.mark.parametrize("asked", ["bytes=10240-", "bytes=10-9", "bytes=-0"])
def test_an_empty_range_is_refused(client: S3Client, bucket: str, etag: str, asked: str) -> None:
    """AWS answers a reversed range (`bytes=10-9`) with the whole object and 200."""
    assert refused(lambda: client.get_object(Bucket=bucket, Key="key", Range=asked)) == (416, "InvalidRange")


def test_several_ranges_bring_the_whole_object(client: S3Client, bucket: str, etag: str) -> None:
    answer = client.get_object(Bucket=bucket, Key="key", Range="bytes=0-1,5-6")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert answer["Body"].read() == BODY


@pytest.mark.parametrize("asked", ["bytes=-100", "bytes=0-0", "bytes=0-"])
def test_an_empty_object_has_no_range(client: S3Client, bucket: str, asked: str) -> None:
    client.put_object(Bucket=bucket, Key="empty", Body=b"")
    assert refused(lambda: client.get_object(Bucket=bucket, Key="empty", Range=asked)) == (416, "InvalidRange")
    assert client.get_object(Bucket=bucket, Key="empty")["Body"].read() == b""


def test_if_match_of_another_version_is_412(client: S3Client, bucket: str, etag: str) -> None:
    client.put_object(Bucket=bucket, Key="key", Body=BODY[::-1])

    def get(key: str) -> object:
        return client.get_object(Bucket=bucket, Key=key, Range="bytes=0-9", IfMatch=etag)

    assert refused(lambda: get("key")) == (412, "PreconditionFailed")
    assert refused(lambda: get("missing")) == (404, "NoSuchKey")


BucketCall = Callable[["S3Client", str], object]


@pytest.mark.parametrize(
    "call",
    [
        lambda client, bucket: client.list_objects_v2(Bucket=bucket),
        lambda client, bucket: client.get_object(Bucket=bucket, Key="key", Range="bytes=-10"),
        lambda client, bucket: client.put_object(Bucket=bucket, Key="key", Body=b""),
        lambda client, bucket: client.delete_object(Bucket=bucket, Key="key"),
        lambda client, bucket: client.create_multipart_upload(Bucket=bucket, Key="key"),
    ],
    ids=["list", "get", "put", "delete", "multipart"],
)
class TestRefusals:
    def test_a_missing_bucket(self, s3: servers.S3Server, call: BucketCall) -> None:
        """A PUT makes no bucket: s3.autoCreateBucket is off."""
        assert refused(lambda: call(s3.client(), "no-such-bucket")) == (404, "NoSuchBucket")

    def test_a_wrong_secret(self, s3: servers.S3Server, bucket: str, call: BucketCall) -> None:
        stranger = s3.client(secret_key="wrong")
        assert refused(lambda: call(stranger, bucket)) == (403, "SignatureDoesNotMatch")

    def test_an_unknown_key(self, s3: servers.S3Server, bucket: str, call: BucketCall) -> None:
        stranger = s3.client(access_key="nobody")
        assert refused(lambda: call(stranger, bucket)) == (403, "InvalidAccessKeyId")


# --- S3: writing -------------------------------------------------------------------------------------------------


def test_put_if_none_match_keeps_what_is_there(client: S3Client, bucket: str, etag: str) -> None:
    def put(body: bytes) -> object:
        return client.put_object(Bucket=bucket, Key="key", Body=body, IfNoneMatch="*")

    assert refused(lambda: put(b"new")) == (412, "PreconditionFailed")
    assert refused(lambda: put(bytes(12_000_000))) == (412, "PreconditionFailed")
    assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == BODY
    client.put_object(Bucket=bucket, Key="other", Body=b"new", IfNoneMatch="*")


@pytest.mark.parametrize("size", [100, 6_000_000])
def test_of_eight_concurrent_puts_if_none_match_one_wins(client: S3Client, bucket: str, size: int) -> None:
    start = threading.Barrier(8)

    def put(number: int) -> bytes | tuple[int, str]:
        body = bytes([number]) * size
        start.wait()
        try:
            client.put_object(Bucket=bucket, Key="key", Body=body, IfNoneMatch="*")
        except ClientError as error:
            return error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
        return body

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(put, range(8)))
    winners = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
    assert winners == [client.get_object(Bucket=bucket, Key="key")["Body"].read()]
    assert {outcome for outcome in outcomes if isinstance(outcome, tuple)} == {(412, "PreconditionFailed")}


def test_upload_file_takes_no_if_none_match() -> None:
    """s3transfer refuses the argument, so a conditional upload is put_object, or multipart by hand."""
    assert "IfNoneMatch" not in TransferManager.ALLOWED_UPLOAD_ARGS


def multipart(
    client: S3Client, bucket: str, key: str, pieces: Sequence[bytes | tuple[str, int, int]], **conditions: str
) -> str:
    """Store an object made of bytes and of ranges (key, start, stop) of others; its ETag."""
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    parts: list[Any] = []
    for number, piece in enumerate(pieces, 1):
        part: Any = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": number}
        if isinstance(piece, bytes):
            tag = client.upload_part(**part, Body=piece)["ETag"]
        else:
            source, start, stop = piece
            copied = client.upload_part_copy(
                **part, CopySource={"Bucket": bucket, "Key": source}, CopySourceRange=f"bytes={start}-{stop - 1}"
            )
            tag = copied["CopyPartResult"]["ETag"]
        parts.append({"PartNumber": number, "ETag": tag})
    extra: Any = conditions
    done = client.complete_multipart_upload(
        Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, **extra
    )
    return done["ETag"]


def test_multipart_upload_of_copied_ranges(client: S3Client, bucket: str) -> None:
    source = os.urandom(PART + 1000)
    client.put_object(Bucket=bucket, Key="source", Body=source)
    etag = multipart(client, bucket, "made", [("source", 0, PART), ("source", 7, PART + 7), b"tail"])
    wanted = source[:PART] + source[7 : PART + 7] + b"tail"
    answer = client.get_object(Bucket=bucket, Key="made", IfMatch=etag)
    assert answer["Body"].read() == wanted
    border = client.get_object(Bucket=bucket, Key="made", IfMatch=etag, Range=f"bytes={PART - 10}-{PART + 9}")
    assert border["Body"].read() == wanted[PART - 10 : PART + 10]
    listed = client.list_objects_v2(Bucket=bucket, Prefix="made")["Contents"][0]
    assert (listed["ETag"], listed["Size"]) == (etag, len(wanted))


def test_what_upload_part_copy_refuses(client: S3Client, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="source", Body=BODY)

    def copy(**arguments: str) -> tuple[int, str]:
        upload = client.create_multipart_upload(Bucket=bucket, Key="made")["UploadId"]
        chosen: Any = {"Key": "source", "CopySourceRange": "bytes=0-9"} | arguments
        source: Any = {"Bucket": bucket, "Key": chosen.pop("Key")}
        return refused(
            lambda: client.upload_part_copy(
                Bucket=bucket, Key="made", UploadId=upload, PartNumber=1, CopySource=source, **chosen
            )
        )

    assert copy(Key="missing") == (404, "NoSuchKey")
    assert copy(CopySourceIfMatch='"other"') == (412, "PreconditionFailed")
    assert copy(CopySourceRange="bytes=0-10240") == (416, "InvalidRange")
    small: Sequence[bytes | tuple[str, int, int]] = [("source", 0, 1000), b"tail"]
    assert refused(lambda: multipart(client, bucket, "made", small)) == (400, "EntityTooSmall")


def test_complete_multipart_upload_if_none_match(client: S3Client, bucket: str) -> None:
    """The upload that was refused stays, as in AWS's S3: who gives it up has to abort it."""
    multipart(client, bucket, "key", [b"first"], IfNoneMatch="*")
    outcome = refused(lambda: multipart(client, bucket, "key", [b"second"], IfNoneMatch="*"))
    assert outcome == (412, "PreconditionFailed")
    assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == b"first"
    (left,) = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    client.abort_multipart_upload(Bucket=bucket, Key="key", UploadId=left["UploadId"])
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_delete_of_a_missing_key_is_no_error(client: S3Client, bucket: str) -> None:
    assert client.delete_object(Bucket=bucket, Key="missing")["ResponseMetadata"]["HTTPStatusCode"] == 204


# --- S3: listing -------------------------------------------------------------------------------------------------


def put_all(client: S3Client, bucket: str, keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=b"x"), keys))


def test_listing_over_several_pages_with_a_delimiter(client: S3Client, bucket: str) -> None:
    objects = [f"day/{number:05d}.des" for number in range(700)]
    folders = [f"day/folder{number:04d}/x" for number in range(600)]
    put_all(client, bucket, objects + folders)
    pages = list(client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="day/", Delimiter="/"))
    assert [page["KeyCount"] for page in pages] == [1000, 300]
    assert [entry["Key"] for page in pages for entry in page.get("Contents", [])] == objects
    prefixes = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", [])]
    assert prefixes == [key.removesuffix("x") for key in folders]


def test_a_listing_is_not_in_key_order(client: S3Client, bucket: str) -> None:
    """SeaweedFS walks folders: `a/x` before `a-b`, although `-` comes before `/`. AWS sorts by UTF-8 bytes."""
    put_all(client, bucket, ["a/x", "a-b/x", "a.des", "a"])
    listed = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert sorted(listed) == ["a", "a-b/x", "a.des", "a/x"]
    assert listed != sorted(listed)


def test_a_key_may_be_a_folder_too(client: S3Client, bucket: str) -> None:
    put_all(client, bucket, ["day.des/under", "day.des"])
    answer = client.list_objects_v2(Bucket=bucket, Delimiter="/")
    assert [entry["Key"] for entry in answer["Contents"]] == ["day.des"]
    assert [entry["Prefix"] for entry in answer["CommonPrefixes"]] == ["day.des/"]


def test_a_key_part_has_at_most_255_bytes(client: S3Client, bucket: str) -> None:
    """AWS's S3 limits only the whole key, to 1,024 bytes."""
    client.put_object(Bucket=bucket, Key="x" * 255, Body=b"")
    assert refused(lambda: client.put_object(Bucket=bucket, Key="x" * 256, Body=b"")) == (400, "KeyTooLongError")


def test_last_modified_is_in_whole_seconds(client: S3Client, bucket: str, etag: str) -> None:
    (entry,) = client.list_objects_v2(Bucket=bucket)["Contents"]
    assert entry["LastModified"].microsecond == 0


# --- Redis -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 2])
def test_redis_is_empty_at_the_start_of_each_test(redis: servers.RedisServer, turn: int) -> None:
    with redis.client() as client:
        assert client.dbsize() == 0
        client.set("left", "over")


# --- processes and mounts ----------------------------------------------------------------------------------------


def test_servers_end_when_the_run_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from tests import servers\n"
        "with servers.redis_server(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert servers.is_running(pid)
        process.kill()
    assert wait_until(lambda: not servers.is_running(pid))


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# A file system of one empty directory; it goes on after the unmount when told to, as a daemon with a bug would.
STUBBORN = """
import sys, threading, pyfuse3, trio

class Stuck(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        if sys.argv[2] == "stuck":
            await trio.sleep_forever()
        raise pyfuse3.FUSEError(5)

pyfuse3.init(Stuck(), sys.argv[1], {"fsname=stubborn"})
print("mounted", flush=True)
trio.run(pyfuse3.main)
if sys.argv[2] != "good":
    threading.Event().wait()
"""


def start_daemon(path: Path, behaviour: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STUBBORN, str(path), behaviour]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "mounted\n"
    daemon.stdout.close()
    return daemon


@pytest.mark.fuse
def test_mount_point_unmounts(tmp_path: Path) -> None:
    with servers.mount_point(tmp_path / "mnt") as mount:
        daemon = start_daemon(mount.path, "good")
        assert servers.is_mounted(mount.path)
        assert servers.mount_daemons(mount.path) == [daemon.pid]
    assert not servers.is_mounted(mount.path)
    daemon.wait(10)


@pytest.mark.fuse
def test_mount_point_kills_a_daemon_that_hangs_and_frees_its_readers(tmp_path: Path) -> None:
    guarded = servers.mount_point(tmp_path / "mnt", stop_s=0.1)
    mount = guarded.__enter__()
    daemon = start_daemon(mount.path, "stuck")
    reader = subprocess.Popen(["stat", mount.path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "request_wait" not in Path(f"/proc/{reader.pid}/wchan").read_text():  # the test's deadline ends this
        assert reader.poll() is None
    with pytest.raises(AssertionError, match="still running"):
        guarded.__exit__(None, None, None)
    assert not servers.is_mounted(mount.path)
    assert daemon.wait(10) == -9
    assert reader.wait(10) == 1


@pytest.mark.fuse
def test_abort_frees_readers_while_the_daemon_lives(mount_dir: servers.MountPoint) -> None:
    daemon = start_daemon(mount_dir.path, "stuck")
    minors = {entry.minor for entry in servers.mount_table() if entry.path == mount_dir.path}
    outcome: list[int | None] = []

    def read() -> None:
        try:
            os.stat(mount_dir.path)
        except OSError as error:
            outcome.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    servers.abort_connections(minors)
    reader.join(10)
    assert outcome in ([errno.ECONNABORTED], [errno.ENOTCONN])
    daemon.kill()
    daemon.wait(10)


# --- the counting proxy ------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(s3: servers.S3Server) -> Iterator[CountingProxy]:
    with CountingProxy(s3.host, s3.port) as proxy:
        yield proxy


def test_the_proxy_counts_signed_requests(s3: servers.S3Server, bucket: str, proxy: CountingProxy) -> None:
    client = s3.client(endpoint_url=proxy.url)
    client.put_object(Bucket=bucket, Key="a b/é", Body=BODY)
    assert client.get_object(Bucket=bucket, Key="a b/é", Range="bytes=-100")["Body"].read() == BODY[-100:]
    client.head_object(Bucket=bucket, Key="a b/é")
    client.list_objects_v2(Bucket=bucket, Prefix="a b/")
    assert refused(lambda: client.get_object(Bucket=bucket, Key="missing")) == (404, "NoSuchKey")

    put, get, head, listing, missing = proxy.requests
    assert (put.method, put.path, put.status, put.request_length) == ("PUT", f"/{bucket}/a b/é", 200, len(BODY))
    assert put.headers["expect"] == "100-continue"
    assert (get.method, get.status, get.response_length) == ("GET", 206, 100)
    assert get.headers["range"] == "bytes=-100"
    assert (head.method, head.status, head.response_length) == ("HEAD", 200, 0)
    assert listing.query["prefix"] == "a b/"
    assert missing.status == 404
    assert proxy.count(method="GET") == 3
    assert proxy.count(method="GET", path_contains="a b/é") == 1
    assert proxy.count(query_contains="list-type") == 1
    proxy.clear()
    assert proxy.count() == 0


def test_the_proxy_forwards_chunked_bodies(s3: servers.S3Server, bucket: str, proxy: CountingProxy) -> None:
    """boto3 sends a body with a trailing checksum as aws-chunked."""
    client = s3.client(endpoint_url=proxy.url)
    client.put_object(Bucket=bucket, Key="key", Body=BODY, ChecksumAlgorithm="CRC32")
    assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == BODY


def test_the_proxy_serves_many_connections_at_speed(s3: servers.S3Server, bucket: str, proxy: CountingProxy) -> None:
    client = s3.client(endpoint_url=proxy.url)
    body = os.urandom(16_000_000)
    client.put_object(Bucket=bucket, Key="key", Body=body)

    def get(_: int) -> bytes:
        return client.get_object(Bucket=bucket, Key="key", Range="bytes=-10")["Body"].read()

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(get, range(320))) == {body[-10:]}
    assert proxy.count(method="GET") == 320
    assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == body


def test_the_proxy_delays_each_answer(s3: servers.S3Server, bucket: str, proxy: CountingProxy) -> None:
    client = s3.client(endpoint_url=proxy.url)
    proxy.delay_s = 0.05
    start = time.monotonic()
    for _ in range(4):
        client.list_objects_v2(Bucket=bucket)
    assert time.monotonic() - start >= 0.2


def test_a_proxy_whose_server_is_down_closes_connections(s3: servers.S3Server) -> None:
    (port,) = servers.free_ports(1)
    with CountingProxy(servers.HOST, port) as proxy, pytest.raises(ConnectionClosedError):
        s3.client(endpoint_url=proxy.url).list_buckets()


# --- the faulty S3 -----------------------------------------------------------------------------------------------


Faulty = tuple[FaultyS3, Callable[[], bytes]]


@pytest.fixture
def faulty(s3: servers.S3Server) -> Iterator[Faulty]:
    """The server, and a GET of its bytes 100 to 199 with If-Match."""
    with FaultyS3(BODY) as server:
        client = s3.client(endpoint_url=server.url)

        def get() -> bytes:
            answer = client.get_object(Bucket="b", Key="k", Range="bytes=100-199", IfMatch=server.etag)
            return answer["Body"].read()

        yield server, get


@pytest.mark.parametrize(
    ("word", "got"),
    [
        ("ok", BODY[100:200]),
        ("ignore-range", BODY),
        ("shifted", BODY[101:201]),
        ("short", BODY[100:150]),
        ("empty", b""),
        ("wrong-etag", bytes(byte ^ 0xFF for byte in BODY[100:200])),
    ],
)
def test_what_boto3_takes_for_success(faulty: Faulty, word: str, got: bytes) -> None:
    server, get = faulty
    server.script = word
    assert get() == got


@pytest.mark.parametrize(
    ("word", "error"),
    [("cut", ResponseStreamingError), ("reset", ConnectionClosedError)],
)
def test_what_boto3_takes_for_a_broken_connection(faulty: Faulty, word: str, error: type[Exception]) -> None:
    server, get = faulty
    server.script = word
    with pytest.raises(error):
        get()


@pytest.mark.parametrize(
    ("word", "status", "code"),
    [
        ("503", 503, "SlowDown"),
        ("500", 500, "InternalError"),
        ("403", 403, "AccessDenied"),
        ("412", 412, "PreconditionFailed"),
        ("404", 404, "NoSuchKey"),
    ],
)
def test_errors_by_script(faulty: Faulty, word: str, status: int, code: str) -> None:
    server, get = faulty
    server.script = word
    assert refused(get) == (status, code)


def test_a_script_goes_word_by_word_and_repeats_the_last(faulty: Faulty) -> None:
    server, get = faulty
    server.script = "503 404 ok"
    assert refused(get)[0] == 503
    assert refused(get)[0] == 404
    assert get() == get() == BODY[100:200]
    assert [request.word for request in server.requests] == ["503", "404", "ok", "ok"]
    assert server.requests[0].headers["range"] == "bytes=100-199"
    with pytest.raises(ValueError, match="script"):
        server.script = "nonsense"


def test_stall_sends_nothing_until_the_server_is_closed() -> None:
    with FaultyS3(BODY, "stall") as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=0.2)
        connection.request("GET", "/b/k")
        with pytest.raises(TimeoutError):
            connection.getresponse()
        connection.close()
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/b/k")
        assert wait_until(lambda: len(server.requests) == 2)
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()
