"""What a request has to pass before the service looks at it: token, number of requests, body, time. ASGI.

The order is part of it: who has no token is told so before a byte of the body is read, and nothing that is refused here
reaches the catalog.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from assignment.metrics import OPEN_REQUESTS, REQUEST_SECONDS, REQUESTS
from assignment.service_auth import Tokens
from assignment.service_settings import ServiceSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PROBES = frozenset({"/healthz", "/readyz"})
METRICS = "/metrics"
PAGE = "/"
PATHS = frozenset({*PROBES, METRICS, PAGE, "/v1/assign", "/v1/shards", "/v1/workers", "/openapi.json"})

# How long a client whose body is too large may go on sending it, so that it comes to read why: a connection that is
# closed while it sends is reset, and the answer lost.
_DRAIN_S = 2.0
_DRAINED = 8  # times the limit: a client that is cut off while it sends sees a reset, and not the answer


class Gate:
    """The application inside, for those who may ask. One event loop."""

    def __init__(self, app: App, settings: ServiceSettings, tokens: Tokens) -> None:
        self._app = app
        self._settings = settings
        self._tokens = tokens
        self._running = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        answer = _Answer(send)
        started = time.perf_counter()
        OPEN_REQUESTS.inc()
        try:
            await self._pass(scope, receive, answer)
        finally:
            OPEN_REQUESTS.dec()
            REQUEST_SECONDS.labels(path).observe(time.perf_counter() - started)
            # Without an answer of ours: the server's 500, or nobody is there to hear it.
            REQUESTS.labels(path, str(answer.status or 500)).inc()

    async def _pass(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        path = scope["path"]
        is_free = path in PROBES or (path == METRICS and not self._settings.metrics_need_token)
        # A browser sends a password again by itself, for other sites' pages too: it is good for looking alone.
        is_page = path == PAGE
        if not is_free and not self._tokens.accepts(_only(scope, b"authorization"), as_password=is_page):
            has_one = _only(scope, b"authorization") is not None
            challenges = [b'Bearer realm="desfs", error="invalid_token"' if has_one else b'Bearer realm="desfs"']
            if is_page:
                challenges.insert(0, b'Basic realm="desfs", charset="UTF-8"')
            headers = [(b"www-authenticate", challenge) for challenge in challenges]
            await answer.refuse(401, "a valid bearer token is needed", *headers, *_parting(scope))
            return
        if path in PROBES or path in (METRICS, PAGE):  # however busy the service is: that is what they are to show
            await self._app(scope, receive, answer)
            return
        if self._running >= self._settings.max_requests:
            await answer.refuse(503, "too many requests at once", self._retry_after(), *_parting(scope))
            return
        self._running += 1
        try:
            await self._run(scope, receive, answer)
        finally:
            self._running -= 1

    async def _run(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        body: bytes | None = None
        try:
            async with asyncio.timeout(self._settings.request_timeout_s) as limit:
                try:
                    body = await _read_body(scope, receive, self._settings.max_body)
                except _TooLarge as error:
                    is_over = not error.goes_on or await _drain(scope, receive, _DRAINED * self._settings.max_body)
                    closing = [] if is_over else [(b"connection", b"close")]
                    await answer.refuse(413, f"the body has more than {self._settings.max_body} bytes", *closing)
                    return
                await self._app(scope, _replay(body, receive), answer)
        except _Gone:
            return
        except TimeoutError:
            if not limit.expired() or answer.status is not None:
                raise
            if body is None:
                await answer.refuse(408, "the body did not come in time", (b"connection", b"close"))
            else:
                await answer.refuse(503, "no answer in time", self._retry_after())

    def _retry_after(self) -> tuple[bytes, bytes]:
        return b"retry-after", str(self._settings.retry_after_s).encode()


class _Gone(Exception):
    """The client has closed the connection: nobody waits for an answer."""


class _TooLarge(Exception):
    """The body has more bytes than are taken; `goes_on`: some of them are still to come."""

    def __init__(self, *, goes_on: bool) -> None:
        self.goes_on = goes_on


class _Answer:
    """Where an answer goes; `status` is None until it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
        body = json.dumps({"detail": detail}).encode()
        length = (b"content-length", str(len(body)).encode())
        start = [(b"content-type", b"application/json"), length, *headers]
        await self({"type": "http.response.start", "status": status, "headers": start})
        await self({"type": "http.response.body", "body": body})


def _only(scope: Message, name: bytes) -> bytes | None:
    """The header's value; None when it is missing, or there several times."""
    found = [value for each, value in scope["headers"] if each == name]
    return found[0] if len(found) == 1 else None


def _length(scope: Message) -> int | None:
    """The body's length, as far as the headers say it."""
    if _only(scope, b"transfer-encoding") is not None:
        return None
    text = _only(scope, b"content-length") or b"0"
    return int(text) if text.isdigit() else None


def _parting(scope: Message) -> list[tuple[bytes, bytes]]:
    """What ends the connection of those who are refused while their body is still to come, unless it is short."""
    length = _length(scope)
    return [] if length is not None and length <= 1 << 16 else [(b"connection", b"close")]


async def _read_body(scope: Message, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises _TooLarge for one of more bytes than that; _Gone."""
    if (_length(scope) or 0) > limit:
        raise _TooLarge(goes_on=True)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > limit:
            raise _TooLarge(goes_on=message.get("more_body", False))
        if not message.get("more_body", False):
            return bytes(body)


async def _drain(scope: Message, receive: Receive, most: int) -> bool:
    """Take the rest of a body, and keep none of it; whether all of it came."""
    if _only(scope, b"expect") is not None:  # 100-continue: it has not begun, and will not
        return False
    try:
        async with asyncio.timeout(_DRAIN_S):
            while most > 0:
                message = await receive()
                if message["type"] != "http.request":
                    raise _Gone
                if not message.get("more_body", False):
                    return True
                most -= len(message.get("body", b""))
    except TimeoutError:
        pass
    return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that was read, as if it came now; then whatever comes."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
