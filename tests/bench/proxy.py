"""A proxy that puts a distance between a client and an S3 server: it holds back each response, and counts.

`python -m tests.bench.proxy HOST PORT DELAY_S` is the proxy itself, a process of its own: it prints its port, and
answers each line on its input with one line of JSON, the requests since the last one. It ends with its input.
`delay_proxy` runs it.

One thread a connection. Bodies of responses go from socket to socket by splice, so they cost no copy and hardly a GIL:
what the proxy lets through is checked before each benchmark. A response is delayed once, not for each piece of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

PIPE = (
    1024 * 1024
)  # bytes in flight between the two sockets of a connection: the most that Linux gives without a sysctl
PIECE = 256 * 1024
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ: linux/fcntl.h
_END = b"\r\n\r\n"


class Request(NamedTuple):
    """What a client asked for: `kind` is LIST for a listing, otherwise the method; `length` the bytes of the answer's
    body that have gone through."""

    kind: str
    path: str
    status: int
    length: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """The requests of a time, and the bytes of all bodies in that time, those of earlier requests too."""

    requests: list[Request]
    received: int

    def count(self, kind: str) -> int:
        return sum(request.kind == kind for request in self.requests)


class DelayProxy:
    """The running proxy. One thread."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def take(self) -> Traffic:
        """The requests whose answers began since the last call, and the bytes since then."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("take\n")
        self._process.stdin.flush()
        requests, received = json.loads(self._process.stdout.readline())
        return Traffic([Request(*each) for each in requests], received)


@contextlib.contextmanager
def delay_proxy(host: str, port: int, delay_s: float) -> Iterator[DelayProxy]:
    """Run a proxy before a server."""
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "tests.bench.proxy"]
    process = subprocess.Popen(
        [*command, host, str(port), str(delay_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield DelayProxy(process)
    finally:
        process.kill()
        process.communicate()


# --- the process -------------------------------------------------------------------------------------------------


class _Ended(Exception):
    """One side closed the connection."""


class _Answer:
    """A request whose answer is on its way. `length` grows; a client may go before it has all of it."""

    def __init__(self, method: bytes, target: bytes, status: int) -> None:
        url = urlsplit(target.decode("latin-1"))
        self._path = unquote(url.path)
        # A bucket without a key: a listing, but for the few questions about the bucket itself.
        listing = method == b"GET" and "/" not in self._path.strip("/")
        self._kind = "LIST" if listing else method.decode()
        self._status = status
        self.length = 0
        self.ended = False
        self.reported = 0
        self.is_new = True

    def request(self) -> Request:
        return Request(self._kind, self._path, self._status, self.length)


class _Counter:
    """Any thread may add; `take` is for one."""

    def __init__(self) -> None:
        self._answers: list[_Answer] = []
        self._lock = threading.Lock()

    def add(self, answer: _Answer) -> None:
        with self._lock:
            self._answers.append(answer)

    def take(self) -> tuple[list[Request], int]:
        """The new requests, and the bytes since the last call."""
        with self._lock:
            taken, self._answers = self._answers, []
        requests, received = [], 0
        for answer in taken:
            ended = answer.ended  # read before the length, which is final then
            length = answer.length
            received += length - answer.reported
            answer.reported = length
            if answer.is_new:
                requests.append(answer.request())
                answer.is_new = False
            if not ended:
                self.add(answer)
        return requests, received


class _Stream:
    """A socket, and what was read from it too early."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.ahead = b""

    def head(self) -> bytes:
        """The bytes up to the end of the next message's headers."""
        text = self.ahead
        while (at := text.find(_END)) < 0:
            piece = self.socket.recv(PIECE)
            if not piece:
                raise _Ended
            text += piece
        self.ahead = text[at + len(_END) :]
        return text[: at + len(_END)]

    def line(self) -> bytes:
        while b"\r\n" not in self.ahead:
            piece = self.socket.recv(PIECE)
            if not piece:
                raise _Ended
            self.ahead += piece
        line, _, self.ahead = self.ahead.partition(b"\r\n")
        return line + b"\r\n"


class _Connection:
    """A client's connection and its twin to the server."""

    def __init__(self, client: socket.socket, upstream: socket.socket, delay_s: float, counter: _Counter) -> None:
        self._client = _Stream(client)
        self._upstream = _Stream(upstream)
        self._delay_s = delay_s
        self._counter = counter
        self._poll = select.poll()
        self._poll.register(client, select.POLLIN)
        self._poll.register(upstream, select.POLLIN)
        self._pipe = os.pipe()
        fcntl.fcntl(self._pipe[0], _F_SETPIPE_SZ, PIPE)

    def close(self) -> None:
        for end in self._pipe:
            os.close(end)
        self._client.socket.close()
        self._upstream.socket.close()

    def serve(self) -> None:
        while self._exchange():
            pass

    def _exchange(self) -> bool:
        """Forward a request and its answer; whether the connection goes on."""
        if not self._client.ahead and self._upstream.socket.fileno() in dict(self._poll.poll()):
            return False  # the server has closed an idle connection: no request may go there
        head = self._client.head()
        method, target = head.split(b" ", 2)[:2]
        headers = _headers(head)
        self._upstream.socket.sendall(head)
        answer = b""
        if headers.get(b"expect", b"").lower() == b"100-continue":
            answer = self._upstream.head()
            if _status(answer) == 100:
                self._client.socket.sendall(answer)
                answer = b""
        if not answer:
            self._forward(self._client, self._upstream, headers)
            answer = self._upstream.head()
        received = _headers(answer)
        status = _status(answer)
        time.sleep(self._delay_s)
        bare = method == b"HEAD" or status in (204, 304)
        counted = _Answer(method, target, status)
        self._counter.add(counted)
        try:
            if bare:
                self._client.socket.sendall(answer)
            else:
                self._forward(self._upstream, self._client, received, answer, counted)
        finally:
            counted.ended = True
        closes = b"close" in received.get(b"connection", b"") or b"close" in headers.get(b"connection", b"")
        return not closes

    def _forward(
        self,
        source: _Stream,
        target: _Stream,
        headers: dict[bytes, bytes],
        before: bytes = b"",
        counted: _Answer | None = None,
    ) -> None:
        """Forward a body, after the bytes in `before`. Bytes are counted before the target has them: who has got an
        answer finds it counted."""
        if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
            self._forward_chunks(source, target, before, counted)
            return
        length = int(headers.get(b"content-length", 0))
        ahead, source.ahead = source.ahead[:length], source.ahead[length:]
        if counted:
            counted.length += len(ahead)
        if before or ahead:
            target.socket.sendall(before + ahead)
        self._splice(source, target, length - len(ahead), counted)

    def _splice(self, source: _Stream, target: _Stream, length: int, counted: _Answer | None) -> None:
        reader, writer = self._pipe
        while length:
            moved = os.splice(source.socket.fileno(), writer, min(length, PIPE))
            if not moved:
                raise _Ended
            length -= moved
            if counted:
                counted.length += moved
            while moved:
                moved -= os.splice(reader, target.socket.fileno(), moved)

    def _forward_chunks(self, source: _Stream, target: _Stream, before: bytes, counted: _Answer | None) -> None:
        pieces = [before]
        while True:
            line = source.line()
            size = int(line.partition(b";")[0], 16)
            pieces.append(line)
            if size == 0:
                break
            if counted:
                counted.length += size
            wanted = size + 2
            ahead, source.ahead = source.ahead[:wanted], source.ahead[wanted:]
            target.socket.sendall(b"".join((*pieces, ahead)))
            pieces = []
            self._splice(source, target, wanted - len(ahead), None)
        while (trailer := source.line()) != b"\r\n":
            pieces.append(trailer)
        target.socket.sendall(b"".join((*pieces, trailer)))


def _headers(head: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in lines if name}


def _status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1])


def _serve(client: socket.socket, upstream: tuple[str, int], delay_s: float, counter: _Counter) -> None:
    connection = _Connection(client, socket.create_connection(upstream), delay_s, counter)
    # One side went away: so does the other, which is what a wire would do.
    with contextlib.suppress(OSError, _Ended):
        connection.serve()
    connection.close()


def _accept(listener: socket.socket, upstream: tuple[str, int], delay_s: float, counter: _Counter) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_serve, args=(client, upstream, delay_s, counter), daemon=True).start()


def main(host: str, port: str, delay_s: str) -> None:
    counter = _Counter()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listener, (host, int(port)), float(delay_s), counter), daemon=True).start()
    for _ in sys.stdin:
        print(json.dumps(counter.take()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
