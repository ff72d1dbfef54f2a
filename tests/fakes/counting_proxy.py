"""A proxy before an HTTP server that writes down every request and forwards every byte as it is.

Signatures stay valid: the server sees the Host header that the client signed, which is the proxy's address.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

# Large enough that system calls cost nothing, small enough for a hundred connections at once.
BUFFER = 256 * 1024
MAX_HEAD = 64 * 1024
# Connections that neither side uses are given up after this; longer than any deadline under test.
IDLE_S = 120.0


@dataclass(slots=True)
class ProxiedRequest:
    """One request as the proxy saw it. `path` is decoded, header names are in lower case.

    `status` is 0 while there is no answer; `request_length` and `response_length` are the bytes of the bodies that were
    forwarded (a chunked body with its framing). All are up to date when the client has the whole answer.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    started_s: float
    status: int = 0
    request_length: int = 0
    response_length: int = 0


@dataclass(slots=True)
class CountingProxy:
    """Forwards connections to `upstream_host:upstream_port` from a free loopback port; a context manager.

    Any thread may call its methods. `delay_s` holds back each answer that long and may be changed at any time.
    """

    upstream_host: str
    upstream_port: int
    delay_s: float = 0.0
    _requests: list[ProxiedRequest] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _listener: socket.socket | None = field(default=None, repr=False)
    _open: set[socket.socket] = field(default_factory=set, repr=False)
    _threads: list[threading.Thread] = field(default_factory=list, repr=False)

    @property
    def port(self) -> int:
        assert self._listener is not None, "not started"
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[ProxiedRequest]:
        """All requests since the start or the last `clear`, in the order of their arrival; a copy of the list."""
        with self._lock:
            return list(self._requests)

    def count(self, *, method: str | None = None, path_contains: str = "", query_contains: str | None = None) -> int:
        """How many requests there were with this method, this text in the path, and this name in the query."""
        return sum(
            (method is None or request.method == method)
            and path_contains in request.path
            and (query_contains is None or query_contains in request.query)
            for request in self.requests
        )

    def clear(self) -> None:
        with self._lock:
            self._requests.clear()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, name="counting-proxy", daemon=True)
        thread.start()
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        upstream = socket.socket()
        try:
            with self._lock:
                self._open.add(upstream)
            for end in (client, upstream):
                end.settimeout(IDLE_S)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            upstream.connect((self.upstream_host, self.upstream_port))
            down, up = _Stream(client), _Stream(upstream)
            while self._exchange(down, up):
                pass
        except (OSError, _Ended):
            pass  # one side went away: so does the other, which is what a wire would do
        finally:
            with self._lock:
                self._open -= {client, upstream}
            client.close()
            upstream.close()

    def _exchange(self, client: _Stream, upstream: _Stream) -> bool:
        """Forward a request and its answer; whether the connection goes on."""
        raw = client.read_head()
        request, reusable = self._record(raw)
        upstream.socket.sendall(raw)

        answer = b""
        if request.headers.get("expect", "").lower() == "100-continue":
            answer = upstream.read_head()
            if _status(answer) == 100:
                client.socket.sendall(answer)
                answer = b""
        if not answer:
            for piece in _body(client, request.headers):
                if upstream.has_data():  # an answer before the request was over is a refusal
                    reusable = False
                    break
                request.request_length += len(piece)
                try:
                    upstream.socket.sendall(piece)
                except OSError:
                    reusable = False
                    break
            answer = upstream.read_head()
        else:
            reusable = False

        while _status(answer) // 100 == 1 and _status(answer) != 101:
            client.socket.sendall(answer)
            answer = upstream.read_head()
        headers = _headers(answer)
        if self.delay_s:
            time.sleep(self.delay_s)
        request.status = _status(answer)
        client.socket.sendall(answer)
        if request.method == "HEAD" or request.status in (204, 304):
            return reusable and not _closes(answer, headers)
        sized = "content-length" in headers or "transfer-encoding" in headers
        for piece in _body(upstream, headers) if sized else upstream.read_to_end():
            request.response_length += len(piece)
            client.socket.sendall(piece)
        return reusable and sized and not _closes(answer, headers)

    def _record(self, head: bytes) -> tuple[ProxiedRequest, bool]:
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        url = urlsplit(target)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        headers = _headers(head)
        request = ProxiedRequest(method, unquote(url.path), query, headers, time.monotonic())
        with self._lock:
            self._requests.append(request)
        return request, not _closes(head, headers)


class _Ended(Exception):
    """The other side closed the connection."""


class _Stream:
    """A socket with what was read from it too early."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._ahead = b""
        self._buffer = bytearray(BUFFER)
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    def has_data(self) -> bool:
        return bool(self._ahead or self._poll.poll(0))

    def read_some(self, limit: int) -> memoryview | bytes:
        """Between 1 and `limit` bytes, valid until the next call. Raises _Ended at the end."""
        if self._ahead:
            piece, self._ahead = self._ahead[:limit], self._ahead[limit:]
            return piece
        view = memoryview(self._buffer)
        received = self.socket.recv_into(view[: min(limit, BUFFER)])
        if not received:
            raise _Ended
        return view[:received]

    def read_until(self, mark: bytes, limit: int) -> bytes:
        """All bytes up to the end of the first `mark`."""
        text = b""
        while (at := text.find(mark)) < 0:
            if len(text) > limit:
                raise _Ended
            text += self.read_some(BUFFER)
        stop = at + len(mark)
        self._ahead = text[stop:] + self._ahead
        return text[:stop]

    def read_head(self) -> bytes:
        return self.read_until(b"\r\n\r\n", MAX_HEAD)

    def read_to_end(self) -> Iterator[memoryview | bytes]:
        with contextlib.suppress(_Ended):
            while True:
                yield self.read_some(BUFFER)


def _headers(head: bytes) -> dict[str, str]:
    headers = {}
    for line in head.split(b"\r\n")[1:]:
        name, colon, value = line.decode("latin-1").partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return headers


def _status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1][:3])


def _closes(head: bytes, headers: dict[str, str]) -> bool:
    connection = headers.get("connection", "").lower()
    return "close" in connection or (b"HTTP/1.0" in head.split(b"\r\n", 1)[0] and "keep-alive" not in connection)


def _body(source: _Stream, headers: dict[str, str]) -> Iterator[memoryview | bytes]:
    """The bytes of a body, framing included, as they come. None when neither header announces a body."""
    if "chunked" not in headers.get("transfer-encoding", "").lower():
        yield from _exactly(source, int(headers.get("content-length", "0")))
        return
    while True:
        line = source.read_until(b"\r\n", MAX_HEAD)
        yield line
        size = int(line.partition(b";")[0], 16)
        if size == 0:
            break
        yield from _exactly(source, size + 2)
    while (trailer := source.read_until(b"\r\n", MAX_HEAD)) != b"\r\n":
        yield trailer
    yield trailer


def _exactly(source: _Stream, length: int) -> Iterator[memoryview | bytes]:
    while length:
        piece = source.read_some(length)
        length -= len(piece)
        yield piece
