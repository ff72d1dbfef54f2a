"""The assignment service from the outside, played by a server that answers by script."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from assignment.catalog import Catalog
from assignment.client import Assignment
from assignment.errors import AssignmentError, InvalidRequest, NotAuthorized, ServiceUnavailable
from assignment.http_client import HttpAssignment
from tests.fakes.certificates import make_certificate
from tests.fakes.loopback import Loopback

TOKEN = "t0ken-of-the-client"
DAY = "2026-11-20"


class Closing:
    """All that a client without leases needs of a catalog."""

    closed = False

    async def close(self) -> None:
        self.closed = True


class Scripted:
    """One word a request, the last one repeats: a status, `ok`, `reset`, `nonsense` (no JSON), `other` (paths)."""

    def __init__(self, script: str, certificate: Path | None = None) -> None:
        self.words = script.split()
        self.bodies: list[bytes] = []
        self.tokens: list[str | None] = []
        self.connections: set[Any] = set()
        self._lock = threading.Lock()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                scripted.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
        self._server = server
        self._loopback = Loopback(server, "scripted", certificate)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self._lock:
            self.bodies.append(body)
            self.tokens.append(handler.headers["Authorization"])
            self.connections.add(handler.client_address)
            word = self.words.pop(0) if len(self.words) > 1 else self.words[0]
        paths = json.loads(body)["paths"]
        if word == "reset":
            handler.close_connection = True
            return
        if word == "other":
            paths = ["other"]
        rows = [{"path": path, "day": DAY, "shard": "a", "id": f"id of {path}"} for path in paths]
        content = b"<html>" if word == "nonsense" else json.dumps({"assignments": rows}).encode()
        handler.send_response(int(word) if word.isdigit() else 200)
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("Retry-After", "0")
        handler.end_headers()
        handler.wfile.write(content)

    def stop(self) -> None:
        self._loopback.stop()
        self._server.server_close()


@pytest.fixture
def scripted(request: pytest.FixtureRequest) -> Iterator[Scripted]:
    server = Scripted(getattr(request, "param", "ok"))
    yield server
    server.stop()


def assign(url: str, paths: Sequence[str], **settings: Any) -> list[Assignment]:
    async def main() -> list[Assignment]:
        catalog = Closing()
        async with HttpAssignment(url, cast("Catalog", catalog), token=TOKEN, **settings) as client:
            found = await client.assign(paths)
        assert catalog.closed
        return found

    return asyncio.run(main())


def test_many_are_asked_for_in_batches_over_one_connection(scripted: Scripted) -> None:
    paths = [f"folder/{n}" for n in range(25_000)]
    found = assign(scripted.url, paths)
    assert [(each.path, each.id, each.shard, str(each.day)) for each in found] == [
        (path, f"id of {path}", "a", DAY) for path in paths
    ]
    assert [len(json.loads(body)["paths"]) for body in scripted.bodies] == [10_000, 10_000, 5_000]
    assert scripted.tokens == [f"Bearer {TOKEN}"] * 3
    assert len(scripted.connections) == 1
    assert assign(scripted.url, []) == []


def test_long_paths_make_smaller_batches(scripted: Scripted) -> None:
    """A request stays below the service's limit, however its paths are written in JSON."""
    paths = [f"{n}" + '"\x01ä' * 1000 for n in range(1000)]
    assert [each.path for each in assign(scripted.url, paths)] == paths
    assert len(scripted.bodies) > 1
    assert max(map(len, scripted.bodies)) <= 4 * 2**20 + 100


@pytest.mark.parametrize("scripted", ["503 ok", "429 502 504 ok", "reset ok", "nonsense ok", "other ok"], indirect=True)
def test_what_is_temporary_is_tried_again(scripted: Scripted) -> None:
    script = len(scripted.words)
    assert [each.id for each in assign(scripted.url, ["a"])] == ["id of a"]
    # A connection that was reset may be opened again by the client's own.
    assert len(scripted.bodies) >= script


@pytest.mark.parametrize(
    ("scripted", "error"),
    [
        ("401", NotAuthorized),
        ("403", NotAuthorized),
        ("413", InvalidRequest),
        ("422", InvalidRequest),
        ("404", InvalidRequest),
        ("301", InvalidRequest),
        ("500", ServiceUnavailable),
    ],
    indirect=["scripted"],
)
def test_what_is_not_is_said_at_once(scripted: Scripted, error: type[AssignmentError]) -> None:
    with pytest.raises(error) as caught:
        assign(scripted.url, ["a"])
    assert type(caught.value) is error
    assert len(scripted.bodies) == 1


@pytest.mark.parametrize("scripted", ["503", "reset"], indirect=True)
def test_at_the_deadline_it_gives_up(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    """The token is in none of what is said meanwhile."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ServiceUnavailable, match=r"gave up after 0\.3 s") as caught:
        assign(scripted.url, ["a"], deadline_s=0.3)
    assert caught.value.temporary
    assert len(scripted.bodies) > 1
    assert TOKEN not in "".join(traceback.format_exception(caught.value)) + caplog.text + repr(caught.value)


def test_nobody_listens() -> None:
    with pytest.raises(ServiceUnavailable, match=r"gave up after 0\.1 s"):
        assign("http://127.0.0.1:1", ["a"], deadline_s=0.1)


def test_certificates_are_checked(tmp_path: Path) -> None:
    server = Scripted("ok", make_certificate(tmp_path))
    try:
        assert [each.id for each in assign(server.url, ["a"], ca_bundle=str(tmp_path / "ca"))] == ["id of a"]
        with pytest.raises(ServiceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            assign(server.url, ["a"], deadline_s=0.1)
    finally:
        server.stop()


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host", "http://", "http://host:port", f"http://user:{TOKEN}@host", "http://h/?a=1"]
)
def test_what_is_no_url_of_a_service(url: str) -> None:
    with pytest.raises(InvalidRequest, match="no URL of an assignment service") as caught:
        HttpAssignment(url, cast("Catalog", Closing()))
    assert TOKEN not in str(caught.value)


def test_settings_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    wrongs: list[dict[str, Any]] = [{"token": each} for each in (f"{TOKEN}\n", "", f"{TOKEN} b", f"{TOKEN}ü")]
    for wrong in (*wrongs, {"ca_bundle": str(tmp_path / "no")}, {"ca_bundle": str(tmp_path / "empty")}):
        with pytest.raises(InvalidRequest) as caught:
            HttpAssignment("http://host", cast("Catalog", Closing()), **wrong)
        assert TOKEN not in str(caught.value)


def test_a_path_that_is_no_unicode(scripted: Scripted) -> None:
    with pytest.raises(InvalidRequest, match="not UTF-8 at character 1"):
        assign(scripted.url, ["a\udcff"])
    assert scripted.bodies == []
