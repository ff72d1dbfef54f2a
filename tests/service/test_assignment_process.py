"""`desfs assignment` and `desfs catalog` as processes: start, end, TLS, secrets, and what they refuse."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import asyncpg
import httpx
import pytest

from assignment.opening import open_catalog
from tests import servers
from tests.crash import PROGRAM
from tests.service.serving import LIMIT_S, TOKEN, replica, run


def desfs(*words: str | Path, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("DESFS_")}
    return subprocess.run(
        [PROGRAM, *words],
        env=env | (environ or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_refusals_and_secrets_through_a_socket(postgres: str, tmp_path: Path) -> None:
    """Without a token 401, with a wrong one 401, an oversized body 413, a malformed one 422; the database's password
    and the tokens are in no log, no command line, and not in /metrics."""
    password = servers.POSTGRES_PASSWORD
    file_token, wrong = "t0ken-in-the-file", "wr0ng-token"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{file_token}\n")
    options = ("--token-file", str(tokens), "--max-body", "100K", "--log-level", "debug")
    with replica(postgres, tmp_path / "one", *options) as one:
        before = rows(postgres)
        with one.client(token=None) as client:
            for headers in ({}, {"Authorization": f"Bearer {wrong}"}):
                for content in (b'{"path": "a"}', b"x" * 200_000, iter([b"x" * 100_000] * 20)):
                    answer = client.post("/v1/assign", headers=headers, content=content)
                    assert answer.status_code == 401
                    assert "Bearer" in answer.headers["WWW-Authenticate"]
        with one.client() as client:
            for content in (b"x" * 200_000, iter([b"x" * 60_000] * 2)):
                assert client.post("/v1/assign", content=content).status_code == 413
            assert client.post("/v1/assign", content=b"{").status_code == 422
            assert rows(postgres) == before
            for token in (TOKEN, file_token):
                headers = {"Authorization": f"Bearer {token}"}
                assert client.post("/v1/assign", headers=headers, json={"path": "a"}).status_code == 200
            metrics = client.get("/metrics").text
        assert 'desfs_assignment_requests_total{path="/v1/assign",status="413"} 2.0' in metrics
        command = Path(f"/proc/{one.pid}/cmdline").read_bytes().decode()
        shown = subprocess.run(["ps", "-ww", "-o", "args=", str(one.pid)], capture_output=True, text=True, check=True)
    log = one.log.read_text()
    assert '"POST /v1/assign HTTP/1.1" 413' in log
    for secret in (password, TOKEN, file_token, wrong):
        assert secret not in log + metrics + command + shown.stdout


def rows(url: str) -> list[object]:
    """What reservations leave in the database."""

    async def count() -> list[object]:
        connection = await asyncpg.connect(url)
        try:
            return [tuple(row) for row in await connection.fetch("SELECT * FROM id_sequence")]
        finally:
            await connection.close()

    return asyncio.run(count())


def test_tls(certificate: Path, tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    catalog = str(tmp_path / "catalog.sqlite")
    with replica(catalog, tmp_path / "one", "--tls-cert", str(certificate), ca=ca) as one:
        assert one.url.startswith("https://")
        with one.client(ca) as client:
            assert client.post("/v1/assign", json={"path": "a"}).status_code == 200
        with one.client() as client, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            client.get("/healthz")
    apart = ("--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"))
    with replica(catalog, tmp_path / "two", *apart, ca=ca) as two, two.client(ca) as client:
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order_and_gives_its_node_id_back(tmp_path: Path, number: signal.Signals) -> None:
    """It says so to the service manager, too."""
    catalog = str(tmp_path / "catalog.sqlite")
    heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    heard.settimeout(LIMIT_S)
    with heard:
        heard.bind(str(tmp_path / "notify"))
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}
        with replica(catalog, tmp_path / "one", environ=environ) as one, one.client() as client:
            assert client.post("/v1/assign", json={"path": "a"}).status_code == 200
            said: list[str] = []
            while not {"READY=1", "WATCHDOG=1"} <= {each.split("\n")[0] for each in said}:
                said.append(heard.recv(4096).decode())
            one.process.send_signal(number)
            assert one.process.wait(LIMIT_S) == 0
            while not said[-1].startswith("STOPPING=1"):
                said.append(heard.recv(4096).decode())

    async def others() -> None:
        opened = await open_catalog(catalog)
        leases = [await opened.lease_node_id("another", 60) for _ in range(256)]
        await opened.close()
        assert None not in leases

    run(others())


def test_a_second_signal_does_not_wait_for_requests(tmp_path: Path) -> None:
    """The node id is given back all the same."""
    with replica(str(tmp_path / "catalog.sqlite"), tmp_path / "one") as one:
        port = int(one.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            head = f"POST /v1/assign HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n"
            slow.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 100")  # it waits for the body
            one.process.terminate()
            one.wait_log("Waiting for connections to close")
            one.process.terminate()
            assert one.process.wait(LIMIT_S) == 0
    with replica(str(tmp_path / "catalog.sqlite"), tmp_path / "two") as two:
        assert "holding a node id" in two.log.read_text()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no catalog: want --catalog URL, DESFS_CATALOG or catalog in the settings file"),
        (["--catalog", "redis://x"], "--catalog: no catalog: want postgresql+asyncpg://"),
        (["--catalog", "postgresql://u:s3cret@h/d"], "everybody sees a password on a command line"),
        (["--catalog", "c.sqlite", "--listen", "0.0.0.0:0"], "listening on '0.0.0.0' takes a token"),
        (["--catalog", "c.sqlite", "--listen", "8000"], "--listen: found '8000', want ADDRESS:PORT"),
        (["--catalog", "c.sqlite", "--token-file", "missing"], "token file missing: No such file"),
        (["--catalog", "c.sqlite", "--tls-key", "k"], "--tls-key needs --tls-cert"),
        (["--catalog", "c.sqlite", "--tls-cert", "missing", "--listen", "127.0.0.1:0"], "TLS certificate missing"),
        (["--catalog", "c.sqlite", "--timezone", "Mars/Base"], "--timezone: 'Mars/Base' is no name"),
        (["--catalog", "c.sqlite", "--shard-bits", "40"], "--shard-bits: "),
        (["--catalog", "c.sqlite", "--prefix", "a-b"], "--prefix: "),
        (["--catalog", "c.sqlite", "--node-ttl", "0"], "--node-ttl: "),
        (["--catalog", "c.sqlite", "--max-requests", "0"], "--max-requests: "),
        (["--catalog", "c.sqlite", "--request-timeout", "0"], "--request-timeout: "),
    ],
)
def test_usage_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], problem: str) -> None:
    """One line each, and no secret in it."""
    monkeypatch.chdir(tmp_path)
    done = desfs("assignment", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert problem in done.stderr
    assert "s3cret" not in done.stderr


def test_failures_at_the_start(postgres_session: servers.PostgresServer, tmp_path: Path) -> None:
    """A catalog without tables, and an address that is taken: one line each."""
    database = postgres_session.new_database()
    try:
        environ = {"DESFS_CATALOG": postgres_session.url(database)}
        done = desfs("assignment", "--listen", "127.0.0.1:0", "--log-level", "error", environ=environ)
        assert (done.returncode, "desfs catalog migrate" in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr
    finally:
        postgres_session.drop_database(database)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = desfs("assignment", "--listen", f"127.0.0.1:{port}", "--catalog", tmp_path / "c.sqlite")
    assert (done.returncode, f"127.0.0.1:{port}: Address already in use" in done.stderr) == (1, True), done.stderr


def test_options_and_open_metrics(tmp_path: Path) -> None:
    options = ("--prefix", "ABC", "--holder", "replica 7", "--timezone", "Asia/Tokyo", "--shard-bits", "8")
    more = ("--open-metrics", "--node-ttl", "20", "--request-timeout", "9", "--max-requests", "5")
    with replica(str(tmp_path / "c.sqlite"), tmp_path / "one", *options, *more) as one, one.client() as client:
        (row,) = client.post("/v1/assign", json={"path": "a"}).json()["assignments"]
        assert re.fullmatch("[0-9a-f]{2}", row["shard"])
        assert row["id"].startswith("ABC_")
        assert httpx.get(f"{one.url}/metrics").status_code == 200
        assert httpx.get(f"{one.url}/v1/workers").status_code == 401


def test_an_embedded_catalog_moves_to_postgres(postgres_session: servers.PostgresServer, tmp_path: Path) -> None:
    """`desfs catalog copy`, which makes the tables: ids go on where they were."""
    source = str(tmp_path / "catalog.sqlite")
    with replica(source, tmp_path / "one") as one, one.client() as client:
        before = [row["id"] for row in client.post("/v1/assign", json={"count": 100}).json()["assignments"]]
    database = postgres_session.new_database()
    environ = {"PGPASSWORD": servers.POSTGRES_PASSWORD}
    url = postgres_session.url(database)
    target = url.replace(f":{servers.POSTGRES_PASSWORD}@", "@")
    try:
        done = desfs("catalog", "copy", source, target, environ=environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "copied 0 containers and 0 shards\n", "")
        assert desfs("catalog", "copy", source, target, environ=environ).returncode == 2  # has rows already
        done = desfs("catalog", "migrate", "--catalog", target, environ=environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "the catalog is up to date\n", "")
        with replica(url, tmp_path / "two") as two, two.client() as client:
            after = [row["id"] for row in client.post("/v1/assign", json={"count": 100}).json()["assignments"]]
        assert len({*before, *after}) == 200
    finally:
        postgres_session.drop_database(database)


def test_catalog_commands_take_no_password_and_want_a_catalog(tmp_path: Path) -> None:
    secret = "postgresql://u:s3cret@h/d"
    for words in (
        ("migrate", "--catalog", secret),
        ("copy", secret, str(tmp_path / "b")),
        ("copy", str(tmp_path / "a"), secret),
    ):
        done = desfs("catalog", *words)
        assert (done.returncode, "password" in done.stderr, "s3cret" in done.stderr) == (2, True, False)
    done = desfs("catalog", "migrate")
    assert (done.returncode, "no catalog: want --catalog URL" in done.stderr) == (2, True)
    done = desfs("catalog", "copy", tmp_path / "none.sqlite", tmp_path / "b.sqlite")
    assert (done.returncode, "there is no catalog to copy" in done.stderr) == (2, True)


def test_the_other_commands_do_not_wait_for_the_services_libraries() -> None:
    program = (
        "import sys, desfs.cli.commands; print({'fastapi', 'uvicorn', 'httpx', 'sqlalchemy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert done.stdout == "set()\n"
