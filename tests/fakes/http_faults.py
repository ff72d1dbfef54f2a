"""An S3 server of one object that misbehaves by script, the way that real ones and what stands before them do.

It answers GET, whatever the path, with one word of its script for each request; the last word repeats:

ok            206 with the range that was asked for, or 200 with the object; 412 and 416 where they are due
ignore-range  200 with the whole object, whatever range was asked for
shifted       206 with another range of the same length, which its Content-Range admits
short         206 with half of the bytes: Content-Length is that of the half, Content-Range claims all
cut           206 as it should be, but the connection is closed in the middle of the body
empty         206 (200 without a range) with the right Content-Range and no byte
reset         the connection is reset before any answer
stall         the request is read, and nothing is ever sent
stall-body    206 as it should be, but nothing comes after half of the body
wrong-etag    206 with the bytes and the ETag of another version, although If-Match asked for the first
503, 500, 403, 412, 404, 416   that status, with S3's XML error
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from tests.fakes.loopback import Loopback

ERRORS = {
    "503": (503, "SlowDown"),
    "500": (500, "InternalError"),
    "403": (403, "AccessDenied"),
    "412": (412, "PreconditionFailed"),
    "404": (404, "NoSuchKey"),
    "416": (416, "InvalidRange"),
}
WORDS = frozenset(
    {"ok", "ignore-range", "shifted", "short", "cut", "empty", "reset", "stall", "stall-body", "wrong-etag"}
    | ERRORS.keys()
)


@dataclass(frozen=True, slots=True)
class FaultyRequest:
    """A request and the word that answered it. Header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    word: str


class FaultyS3:
    """The server; a context manager. Any thread may use it.

    `script` may be replaced while it runs: the next request takes the first word. `port` 0 is a free one; with
    `certificate`, a PEM file that has the key too, it speaks TLS.
    """

    def __init__(self, body: bytes, script: str = "ok", *, port: int = 0, certificate: Path | None = None) -> None:
        self.body = body
        self.etag = _etag(body)
        self._lock = threading.Lock()
        self._requests: list[FaultyRequest] = []
        self._words: list[str] = []
        self._closing = threading.Event()
        self.script = script
        self._asked_port = port
        self._certificate = certificate

    @property
    def script(self) -> str:
        """The words that are left."""
        with self._lock:
            return " ".join(self._words)

    @script.setter
    def script(self, script: str) -> None:
        words = script.split()
        unknown = set(words) - WORDS
        if unknown or not words:
            raise ValueError(f"script {script!r}: want one or more of {sorted(WORDS)}")
        with self._lock:
            self._words = words

    @property
    def requests(self) -> list[FaultyRequest]:
        """All requests so far, a copy."""
        with self._lock:
            return list(self._requests)

    @property
    def url(self) -> str:
        return f"http{'' if self._certificate is None else 's'}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def connections(self) -> int:
        """How many were opened so far."""
        return self._server.opened

    def __enter__(self) -> Self:
        self._server = _Server(self, self._asked_port)
        self._loopback = Loopback(self._server, "faulty-s3", self._certificate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._loopback.stop()
        self._server.close_connections()
        self._server.server_close()

    def _next_word(self, method: str, target: str, headers: dict[str, str]) -> str:
        with self._lock:
            word = self._words.pop(0) if len(self._words) > 1 else self._words[0]
            self._requests.append(FaultyRequest(method, unquote(urlsplit(target).path), headers, word))
            return word

    def _wait_closing(self) -> None:
        self._closing.wait()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: FaultyS3, port: int) -> None:
        self.owner = owner
        self.opened = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def register(self, connection: socket.socket, *, is_open: bool) -> None:
        with self._lock:
            if is_open:
                self.opened += 1
                self._open.add(connection)
            else:
                self._open.discard(connection)

    def close_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of every test here, and no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.register(self.connection, is_open=True)

    def finish(self) -> None:
        self.server.register(self.connection, is_open=False)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.server.owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        word = owner._next_word(self.command, self.path, headers)
        if word == "reset":
            # Linger for no time: close sends RST instead of FIN. The handler's files would put a plain close off.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            os.close(self.connection.detach())
        elif word == "stall":
            owner._wait_closing()
            self.close_connection = True
        elif word in ERRORS:
            self._send_error(*ERRORS[word])
        else:
            self._send_object(word, headers.get("range"), headers.get("if-match"))

    def _send_error(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>'
        self._send(status, {"Content-Type": "application/xml"}, text.encode())

    def _send_object(self, word: str, asked: str | None, if_match: str | None) -> None:
        body, etag = self.server.owner.body, self.server.owner.etag
        size = len(body)
        if word == "wrong-etag":
            body = bytes(byte ^ 0xFF for byte in body)
            etag = _etag(body)
        elif if_match is not None and if_match.strip('"') != etag.strip('"'):
            self._send_error(412, "PreconditionFailed")
            return
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": "Fri, 20 Nov 2026 00:00:00 GMT"}
        if asked is None or word == "ignore-range":
            status, start, stop = 200, 0, size
        else:
            status = 206
            start, stop = _parse_range(asked, size)
            if start >= stop:
                self._send_error(416, "InvalidRange")
                return
            if word == "shifted":
                start, stop = (start + 1, stop + 1) if stop < size else (start - 1, stop - 1) if start else (1, stop)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        sent = body[start:stop]
        if word == "empty":
            sent = b""
        elif word == "short":
            sent = sent[: len(sent) // 2]
        self._send(status, headers, sent, word)

    def _send(self, status: int, headers: dict[str, str], body: bytes, word: str = "ok") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if word not in ("cut", "stall-body"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        if word == "stall-body":
            self.server.owner._wait_closing()
        self.close_connection = True


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


def _parse_range(header: str, size: int) -> tuple[int, int]:
    """The half-open range that a Range header asks for; empty when the object has none of it."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match[0] == "bytes=-":
        raise ValueError(f"Range header {header!r}: want one plain range")
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
