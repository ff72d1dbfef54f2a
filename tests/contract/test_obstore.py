"""S3 with its GETs by obstore: the contract, and that all that boto3 decides holds for them too.

What its answers are held against is in test_answers.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stamina

from desfs.errors import AccessDenied, DeadlineExceeded, NoSuchObject, NoSuchStore, StoreError, StoreUnavailable
from desfs.metrics import snapshot
from desfs.store import S3Options, Store, open_store
from desfs.store.obstore_s3 import VIEW_FROM, ObstoreS3Store
from desfs.store.retrying import Retrying
from desfs.store.s3 import CONNECTIONS, Route
from tests.contract.store_contract import MIB, StoreContract, pattern
from tests.fakes.certificates import openssl
from tests.fakes.http_faults import FaultyS3
from tests.servers import S3Server

BODY = pattern(100_000)


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server of the run, with the environment of this process set to it."""
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No AWS settings but the config file that this is, which is empty."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.touch()
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return config


@pytest.fixture
def server() -> Iterator[FaultyS3]:
    with FaultyS3(BODY) as running:
        yield running


def signer(server: FaultyS3) -> str | None:
    """The access key of the last request."""
    header = server.requests[-1].headers.get("authorization")
    return None if header is None else header.partition("Credential=")[2].partition("/")[0]


class TestObstoreS3Store(StoreContract):
    @pytest.fixture
    def make_store(self, aws: S3Server, bucket: str) -> Callable[[], Store]:
        return lambda: ObstoreS3Store(bucket, "odd pre+fix/ü")


# --- credentials -------------------------------------------------------------------------------------------------


def test_keys_come_from_the_environment(server: FaultyS3, no_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRON")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the token")
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url))
    assert store.get_range("key", 1, 5).data == BODY[1:5]
    assert signer(server) == "ENVIRON"
    assert server.requests[-1].headers["x-amz-security-token"] == "the token"
    store.close()


def test_keys_come_from_a_profile(server: FaultyS3, no_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile's, and nothing of the environment's with them, which obstore reads by itself."""
    no_settings.write_text(
        "[profile other]\naws_access_key_id = PROFILE\naws_secret_access_key = any\nregion = eu-west-9\n"
        f"endpoint_url = {server.url}\n"
    )
    for name, value in {
        "AWS_ACCESS_KEY_ID": "ENVIRON",
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "AWS_SESSION_TOKEN": "wrong",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_UNSIGNED_PAYLOAD": "true",
        "AWS_REQUEST_PAYER": "true",
    }.items():
        monkeypatch.setenv(name, value)
    store = ObstoreS3Store("bucket", options=S3Options(profile="other"))
    assert store.get_range("key", 1, 5).data == BODY[1:5]
    headers = server.requests[-1].headers
    assert signer(server) == "PROFILE"
    assert "/eu-west-9/s3/aws4_request" in headers["authorization"]
    assert not {"x-amz-security-token", "x-amz-request-payer"} & set(headers)
    assert headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD"
    store.close()


def credential_process(tmp_path: Path, *lives_s: int) -> Path:
    """A program that gives the keys KEY0, KEY1… with these times to live, one each time it runs; the last repeats."""
    (tmp_path / "runs").write_text("0")
    program = tmp_path / "process.py"
    program.write_text(f"""
import datetime, json, pathlib
runs = pathlib.Path({str(tmp_path / "runs")!r})
number = int(runs.read_text())
runs.write_text(str(number + 1))
lives = {lives_s!r}
until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=lives[min(number, len(lives) - 1)])
print(json.dumps(dict(Version=1, AccessKeyId=f"KEY{{number}}", SecretAccessKey="any", SessionToken=f"token{{number}}",
    Expiration=until.isoformat())))
""")
    return program


def test_keys_that_expire_are_renewed(server: FaultyS3, no_settings: Path, tmp_path: Path) -> None:
    # botocore renews in any case what has less than 10 minutes left.
    program = credential_process(tmp_path, 60, 60, 3600)
    no_settings.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url))
    signers = []
    for _ in range(4):
        assert store.get_range("key", 1, 5).data == BODY[1:5]
        signers.append(signer(server))
    number = int(str(signers[-1]).removeprefix("KEY"))
    assert number >= 2
    assert signers[-2:] == [f"KEY{number}"] * 2
    assert server.requests[-1].headers["x-amz-security-token"] == f"token{number}"
    assert int((tmp_path / "runs").read_text()) == number + 1
    store.close()


def test_many_threads_renew_once(server: FaultyS3, no_settings: Path, tmp_path: Path) -> None:
    no_settings.write_text(
        f"[default]\ncredential_process = {sys.executable} {credential_process(tmp_path, 60, 3600)}\n"
    )
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url))
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: store.get_range("key", n, n + 9).data == BODY[n : n + 9], range(64)))
    assert all(found)
    assert (tmp_path / "runs").read_text() == "2"
    store.close()


@pytest.mark.parametrize("call", ["list", "get"])
def test_keys_that_stay_expired_are_access_denied(
    server: FaultyS3, no_settings: Path, tmp_path: Path, call: str
) -> None:
    program = credential_process(tmp_path, 60, -60)
    no_settings.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url))
    with pytest.raises(AccessDenied, match="expired"):
        store.list() if call == "list" else store.get_range("key", 1, 5)
    assert server.requests == []
    store.close()


def test_no_credentials_are_told(server: FaultyS3, no_settings: Path) -> None:
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url))
    calls: list[Callable[[], object]] = [lambda: store.get_range("key", 0, 1), lambda: store.get_tail("key", 1)]
    for call in calls:
        with pytest.raises(AccessDenied, match="no S3 credentials found: set AWS_ACCESS_KEY_ID"):
            call()
    assert server.requests == []
    store.close()


def test_requests_need_not_be_signed(server: FaultyS3, no_settings: Path) -> None:
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url, no_sign_request=True))
    assert store.get_range("key", 1, 5).data == BODY[1:5]
    assert signer(server) is None
    store.close()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told(aws: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong")
    store = ObstoreS3Store(bucket)
    calls: list[Callable[[], object]] = [lambda: store.get_range("key", 0, 1), lambda: store.get_tail("key", 1)]
    for call in calls:
        with pytest.raises(AccessDenied, match=f"{bucket}.* at {aws.endpoint_url}.*status 403") as caught:
            call()
        assert "wrong" not in str(caught.value).lower()
        assert "\n" not in str(caught.value)
    store.close()


# --- where requests go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket", "options", "url", "region"),
    [
        ("b-1", S3Options(region="eu-central-1"), "https://b-1.s3.eu-central-1.amazonaws.com", "eu-central-1"),
        ("b.1", S3Options(region="eu-central-1"), "https://s3.eu-central-1.amazonaws.com/b.1", "eu-central-1"),
        (
            "b-1",
            S3Options(region="eu-central-1", addressing_style="path"),
            "https://s3.eu-central-1.amazonaws.com/b-1",
            "eu-central-1",
        ),
        ("b-1", S3Options(region="cn-north-1"), "https://b-1.s3.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("b-1", S3Options(endpoint_url="http://host:8333"), "http://host:8333/b-1", "us-east-1"),
        ("b-1", S3Options(endpoint_url="http://host:8333/s3/"), "http://host:8333/s3/b-1", "us-east-1"),
        (
            "b-1",
            S3Options(endpoint_url="https://host", addressing_style="virtual", region="here"),
            "https://b-1.host",
            "here",
        ),
    ],
)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_requests_go_where_boto3_sends_them(
    no_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
    options: S3Options,
    url: str,
    region: str,
    unsigned: bool,
) -> None:
    """`addressing_style`, `region`, `endpoint_url`; a custom endpoint implies path style."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    before = snapshot()
    store = ObstoreS3Store(
        bucket,
        options=S3Options(
            endpoint_url=options.endpoint_url,
            region=options.region,
            addressing_style=options.addressing_style,
            no_sign_request=unsigned,
        ),
    )
    route = store.route()
    assert isinstance(route, Route)
    assert route.bucket_url == url
    assert unsigned or route.region == region
    assert snapshot() == before  # nothing was sent
    store.close()


class SignedOtherwise(ObstoreS3Store):
    def route(self) -> Route | None:
        return None


@pytest.mark.usefixtures("aws")
def test_requests_that_are_signed_otherwise_are_boto3s(server: FaultyS3) -> None:
    store = SignedOtherwise("bucket", options=S3Options(endpoint_url=server.url))
    assert store.get_range("key", 1, 5).data == BODY[1:5]
    assert store.get_tail("key", 5).data == BODY[-5:]
    assert len(server.requests) == 2
    assert all(request.headers["user-agent"].startswith("Boto3") for request in server.requests)
    store.close()


@contextlib.contextmanager
def misplaced(region: str) -> Iterator[tuple[str, list[str]]]:
    """The URL of a server that answers only what is signed for its region, and who has asked, in which region."""
    asked: list[str] = []
    wrong = (
        b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong</Message>"
        b"<Region>%s</Region></Error>" % region.encode()
    )
    listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while head := b"".join(iter(stream.readline, b"\r\n")).decode() if (stream.peek(1)) else "":
                lines = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head.split("\r\n")}
                signed_for = lines["authorization"].split("/")[2]
                asked.append(f"{lines['user-agent'].split('/')[0]} {signed_for}")
                status, extra, body = (
                    "206 Partial Content",
                    'Content-Range: bytes 1-4/100000\r\nETag: "x"\r\n',
                    BODY[1:5],
                )
                if signed_for != region:
                    status, extra, body = "400 Bad Request", "", wrong
                elif "list-type" in head:
                    status, extra, body = "200 OK", "", listing
                connection.sendall(f"HTTP/1.1 {status}\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def accept(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=accept, args=(listening,))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize("first", ["list", "get"])
def test_a_bucket_in_another_region_is_followed(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with misplaced("eu-west-9") as (url, asked):
        store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=url, region="us-east-1"))
        if first == "list":
            assert store.list().objects == ()
        else:
            assert store.get_range("key", 1, 5).data == BODY[1:5]
            assert asked[0] == "object_store us-east-1"
        asked.clear()
        for _ in range(2):
            assert store.get_range("key", 1, 5).data == BODY[1:5]
        assert asked == ["object_store eu-west-9"] * 2
        store.close()


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize("told_by", ["option", "environment"])
def test_an_authority_of_ones_own_is_trusted_when_it_is_named(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    """`ca_bundle`"""
    trusted = str(certificate.with_name("ca"))
    if told_by == "environment":
        monkeypatch.setenv("AWS_CA_BUNDLE", trusted)
    with FaultyS3(BODY, certificate=certificate) as server:
        options = S3Options(
            endpoint_url=server.url, ca_bundle=trusted if told_by == "option" else None, no_sign_request=True
        )
        store = ObstoreS3Store("bucket", options=options)
        for _ in range(3):
            assert store.get_range("key", 1, 5).data == BODY[1:5]
        assert all(request.headers["user-agent"].startswith("object_store") for request in server.requests)
        store.close()


@pytest.mark.usefixtures("no_settings")
def test_a_certificate_that_signed_itself_is_trusted_when_it_is_named(tmp_path: Path) -> None:
    openssl(
        "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "k", "-out", tmp_path / "c"
    )
    (tmp_path / "both").write_bytes((tmp_path / "k").read_bytes() + (tmp_path / "c").read_bytes())
    with FaultyS3(BODY, certificate=tmp_path / "both") as server:
        options = S3Options(endpoint_url=server.url, ca_bundle=str(tmp_path / "c"), no_sign_request=True)
        store = ObstoreS3Store("bucket", options=options)
        for _ in range(3):
            assert store.get_range("key", 1, 5).data == BODY[1:5]
        assert len(server.requests) == 3
        assert server.connections == 2  # obstore's, given up, and boto3's
        store.close()


@pytest.mark.usefixtures("no_settings")
def test_a_certificate_that_nobody_knows_is_refused_for_good(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ALLOW_INVALID_CERTIFICATES", "true")  # what obstore would look at
    with FaultyS3(BODY, certificate=certificate) as server:
        store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url, no_sign_request=True))
        for _ in range(2):
            with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                store.get_range("key", 1, 5)
            assert not caught.value.temporary
            assert "\n" not in str(caught.value)
        assert server.requests == []
        store.close()


# --- errors and deadlines ----------------------------------------------------------------------------------------


def test_a_missing_bucket_is_named(aws: S3Server) -> None:
    store = ObstoreS3Store("no-such-bucket-here")
    calls: list[Callable[[], object]] = [lambda: store.get_range("key", 0, 1), lambda: store.get_tail("key", 1)]
    for call in calls:
        with pytest.raises(NoSuchStore) as caught:
            call()
        assert str(caught.value) == f"bucket 'no-such-bucket-here' does not exist at {aws.endpoint_url}"
    store.close()


def test_an_endpoint_that_is_down_is_told(aws: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=endpoint))
    with pytest.raises(StoreUnavailable) as caught:
        store.get_range("key", 0, 1)
    assert str(caught.value) == f"cannot reach {endpoint}: Connection refused"
    with pytest.raises(DeadlineExceeded, match="cannot reach"):
        Retrying(store, deadline_s=0.1).get_range("key", 0, 1)
    store.close()


def test_a_host_that_has_no_address_is_told(aws: S3Server) -> None:
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url="http://nothing.invalid"))
    with pytest.raises(StoreUnavailable, match=r"cannot reach http://nothing\.invalid: .+") as caught:
        store.get_range("key", 0, 1)
    assert "\n" not in str(caught.value)
    store.close()


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize("word", ["stall", "stall-body"])
def test_a_server_that_says_nothing_ends_the_try_and_the_deadline_the_call(server: FaultyS3, word: str) -> None:
    """No request may hang for ever: every one has a deadline. [...] and the next read tries again"""
    inner = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url), read_timeout_s=0.1)
    store = Retrying(inner, deadline_s=1.0)
    server.script = word
    with pytest.raises(DeadlineExceeded, match=f"cannot reach {server.url}: no answer in time"):
        store.get_range("key", 1, 5)
    assert len(server.requests) >= 2
    server.script = "ok"
    assert store.get_range("key", 1, 5).data == BODY[1:5]
    store.close()


@pytest.mark.usefixtures("aws")
def test_a_server_that_comes_back_is_read_from_again() -> None:
    with FaultyS3(BODY) as first:
        port = first.port
        inner = ObstoreS3Store("bucket", options=S3Options(endpoint_url=first.url))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: inner.get_range("key", n, n + 9), range(8)))  # connections that will be dead
    with pytest.raises(StoreUnavailable):
        inner.get_range("key", 1, 5)
    with FaultyS3(BODY, port=port), stamina.set_testing(True, attempts=5):
        assert Retrying(inner).get_range("key", 1, 5).data == BODY[1:5]
        inner.close()


def test_every_request_is_counted(aws: S3Server, bucket: str) -> None:
    store = ObstoreS3Store(bucket)
    store.put("key", b"12345")
    store.put("empty", b"")
    before = snapshot()
    store.get_range("key", 1, 3)
    store.get_tail("key", 3)
    store.get_tail("empty", 3)
    with pytest.raises(NoSuchObject):
        store.get_tail("gone", 3)
    after = snapshot()
    counted = {
        name.removeprefix("desfs_store_"): after[name] - before.get(name, 0.0)
        for name in after
        if after[name] != before.get(name, 0.0) and not name.endswith("_sum")
    }
    assert counted == {
        "requests_total.get.206": 2,
        "requests_total.get.200": 1,
        "requests_total.get.416": 1,
        "requests_total.get.404": 1,
        "bytes_total.received": 5,
        "first_byte_seconds_count": 5,
    }
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    store.close()
    store = ObstoreS3Store(bucket, options=S3Options(endpoint_url=endpoint))
    with pytest.raises(StoreUnavailable):
        store.get_range("key", 1, 3)
    assert (
        snapshot()["desfs_store_requests_total.get.Connect"]
        == after.get("desfs_store_requests_total.get.Connect", 0) + 1
    )
    store.close()


# --- connections, threads, memory --------------------------------------------------------------------------------


@pytest.mark.usefixtures("aws")
def test_connections_are_kept(server: FaultyS3) -> None:
    """As many as the GETs that a mount has in flight: a warm mount opens no new one."""
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url))
    with ThreadPoolExecutor(32) as pool:
        for _ in range(4):
            together = threading.Barrier(32)

            def get(n: int, together: threading.Barrier = together) -> bool:
                together.wait(60)
                return bytes(store.get_range("key", n, n + 50_000).data) == BODY[n : n + 50_000]

            assert all(pool.map(get, range(32)))
        for n in range(50):
            store.get_range("key", n, n + 9)
    assert len(server.requests) == 4 * 32 + 50
    assert server.connections <= 2 * CONNECTIONS
    store.close()


@pytest.mark.usefixtures("aws")
def test_no_thread_starts_before_the_first_get(server: FaultyS3) -> None:
    """obstore's threads start after the daemon's fork."""
    program = """
import os, sys
from desfs.store import S3Options, open_store
store = open_store("s3://bucket", S3Options(endpoint_url=sys.argv[1]))
def names():
    return [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
assert not any("tokio" in name for name in names()), names()
child = os.fork()
if child == 0:
    assert store.get_range("key", 1, 5).data == bytes.fromhex(sys.argv[2])
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert store.get_range("key", 1, 5).data == bytes.fromhex(sys.argv[2])
assert any("tokio" in name for name in names()), names()
"""
    subprocess.run([sys.executable, "-c", program, server.url, BODY[1:5].hex()], check=True, timeout=60)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("length", [4_000, 100_000, VIEW_FROM - 1, VIEW_FROM, 4 * MIB])
def test_an_answer_keeps_no_more_than_its_bytes(aws: S3Server, bucket: str, length: int) -> None:
    """A memoryview keeps no more memory than its own bytes."""
    store = ObstoreS3Store(bucket)
    data = pattern(8 * MIB)
    etag = store.put("key", data)
    starts = range(0, 4 * MIB, 4 * MIB // 64)
    for start in starts:
        store.get_range("key", start, start + length, if_match=etag)
    before = resident()
    answers = [store.get_range("key", start, start + length, if_match=etag) for start in starts]
    kept = resident() - before
    assert all(answer.data == data[start : start + length] for start, answer in zip(starts, answers, strict=True))
    assert isinstance(answers[0].data, memoryview if length >= VIEW_FROM else bytes)
    assert memoryview(answers[0].data).readonly
    assert memoryview(answers[0].data).format == "B"
    assert kept < 64 * length * 1.1 + 8 * MIB
    store.close()


@pytest.mark.usefixtures("aws")
def test_waiting_for_a_body_lets_other_threads_run(server: FaultyS3) -> None:
    """Reading the body should release the GIL: the server is a thread of this process, and has to be heard first."""
    server.script = "stall-body"
    store = ObstoreS3Store("bucket", options=S3Options(endpoint_url=server.url), read_timeout_s=0.5)
    with ThreadPoolExecutor(4) as pool:
        stalled = pool.submit(store.get_range, "key", 0, 50_000)
        while not server.requests:
            pass
        server.script = "ok"
        assert store.get_range("key", 1, 5).data == BODY[1:5]
        with pytest.raises(StoreUnavailable):
            stalled.result()
    store.close()


def test_open_store_reads_by_obstore(aws: S3Server, server: FaultyS3) -> None:
    store = open_store("s3://bucket", S3Options(endpoint_url=server.url))
    assert store.get_range("key", 1, 5).data == BODY[1:5]
    assert server.requests[-1].headers["user-agent"].startswith("object_store")
    store.close()
