"""A proxy before an S3 server that is set up in ways that SeaweedFS is not: another region, another time, fewer rights.

Each rule sees a request and the server's answer, and gives the answer that the client gets. Signatures stay valid: the
server sees the Host header that the client signed. Bodies pass through memory.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from tests.fakes.loopback import Loopback

_TIMEOUT_S = 60.0
_HOP_BY_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request. Header names are in lower case; `target` as it was sent."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def operation(self) -> str:
        """ "list", "get", "put" or "delete": what of S3's permissions it needs."""
        is_list = self.method == "GET" and "list-type" in dict(parse_qsl(urlsplit(self.target).query))
        return "list" if is_list else {"GET": "get", "HEAD": "get"}.get(self.method, self.method.lower())

    @property
    def region(self) -> str | None:
        """The region that it was signed for; None without a signature."""
        found = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", self.headers.get("authorization", ""))
        return found and found[1]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


Rule = Callable[[Request, Callable[[], Reply]], Reply]


def refusal(status: int, code: str, message: str = "refused", more: str = "", **headers: str) -> Reply:
    """An error as S3 words it."""
    text = f"<Error><Code>{code}</Code><Message>{message}</Message>{more}<RequestId>1</RequestId></Error>"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"content-type": "application/xml", "date": http_date(), **named}, text.encode())


def http_date(ahead_s: float = 0.0) -> str:
    """Now, or so many seconds later."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=ahead_s), usegmt=True)


def in_region(region: str, *, status: int = 400, names_it: bool = True) -> Rule:
    """The bucket is in that region, as AWS says it to those who sign for, or come to, another one."""

    def rule(request: Request, forward: Callable[[], Reply]) -> Reply:
        if request.region in (None, region):
            return forward()
        if status == 301:
            headers = {"x_amz_bucket_region": region} if names_it else {}
            return refusal(301, "PermanentRedirect", "The bucket must be addressed using another endpoint.", **headers)
        message = "The authorization header is malformed; the region is wrong"
        if not names_it:
            return refusal(400, "AuthorizationHeaderMalformed", message)
        return refusal(
            400,
            "AuthorizationHeaderMalformed",
            f"{message}; expecting '{region}'",
            f"<Region>{region}</Region>",
        )

    return rule


def clock_ahead(ahead_s: float) -> Rule:
    """The server's clock is so many seconds ahead of ours, and it does not care."""

    def rule(request: Request, forward: Callable[[], Reply]) -> Reply:
        reply = forward()
        return replace(reply, headers=reply.headers | {"date": http_date(ahead_s)})

    return rule


def too_skewed(ahead_s: float) -> Rule:
    """The server's clock is ahead, and it refuses what was signed at our time."""

    def rule(request: Request, forward: Callable[[], Reply]) -> Reply:
        message = "The difference between the request time and the current time is too large."
        skewed = refusal(403, "RequestTimeTooSkewed", message) if request.region else forward()
        return replace(skewed, headers=skewed.headers | {"date": http_date(ahead_s)})

    return rule


def without_permission(*operations: str) -> Rule:
    """Access is denied to these."""

    def rule(request: Request, forward: Callable[[], Reply]) -> Reply:
        return refusal(403, "AccessDenied", "Access Denied") if request.operation in operations else forward()

    return rule


def without_conditional_put(*, status: int | None = None) -> Rule:
    """If-None-Match is ignored, or refused with a status."""

    def rule(request: Request, forward: Callable[[], Reply]) -> Reply:
        if request.method != "PUT" or "if-none-match" not in request.headers:
            return forward()
        if status is not None:
            return refusal(status, "NotImplemented", "A header you provided implies functionality not implemented")
        reply = forward()
        return Reply(200, {"etag": '"0123"', "date": http_date()}, b"") if reply.status == 412 else reply

    return rule


def without_if_match(request: Request, forward: Callable[[], Reply]) -> Reply:
    """If-Match is ignored."""
    reply = forward()
    if request.method == "GET" and reply.status == 412:
        return Reply(206, {"etag": '"0123"', "content-range": "bytes 0-0/9", "date": http_date()}, b"x")
    return reply


def without_ranges(request: Request, forward: Callable[[], Reply]) -> Reply:
    """Range is ignored: every GET of a part has the whole object."""
    reply = forward()
    if request.operation != "get" or reply.status != 206:
        return reply
    headers = {name: value for name, value in reply.headers.items() if name != "content-range"}
    return Reply(200, headers, b"the whole of it, however long")


def losing_puts(request: Request, forward: Callable[[], Reply]) -> Reply:
    """Objects are stored, and the connection ends before the answer."""
    reply = forward()
    if request.method == "PUT":
        raise ConnectionResetError
    return reply


def answering(reply: Reply) -> Rule:
    """Nobody behind it is asked."""
    return lambda request, forward: reply


class S3Front:
    """The proxy; a context manager. Any thread may use it; with a `certificate`, which has the key too, it speaks
    TLS."""

    def __init__(self, host: str, port: int, *rules: Rule, certificate: Path | None = None) -> None:
        self._upstream = (host, port)
        self._rules = rules
        self._certificate = certificate
        self._requests: list[Request] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http{'' if self._certificate is None else 's'}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def requests(self) -> Sequence[Request]:
        """All requests so far."""
        with self._lock:
            return tuple(self._requests)

    def answer(self, request: Request) -> Reply:
        """What the rules make of it, the first one first."""
        with self._lock:
            self._requests.append(request)

        def asked(place: int) -> Reply:
            if place == len(self._rules):
                return self._forward(request)
            return self._rules[place](request, lambda: asked(place + 1))

        return asked(0)

    def _forward(self, request: Request) -> Reply:
        connection = http.client.HTTPConnection(*self._upstream, timeout=_TIMEOUT_S)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(request.body or None)
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, headers, answer.read())
        finally:
            connection.close()

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self._loopback = Loopback(self._server, "s3-front", self._certificate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loopback.stop()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, owner: S3Front) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests here, and no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        reply = self.server.owner.answer(Request(self.command, self.path, headers, body))
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            if name not in _HOP_BY_HOP:
                self.send_header(name, value)
        # One request a connection: nothing waits for the end of an idle one when the proxy ends.
        self.send_header("Connection", "close")
        if reply.status not in (204, 304):
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815 - http.server's names
