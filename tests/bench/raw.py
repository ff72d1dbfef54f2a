"""The leanest download there is, which is what the mounts are held against: plain sockets, parallel ranges."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from urllib.parse import urlsplit

from tests.servers import HOST, S3Server

CONNECTIONS = 16
RANGES = (4 * 1024 * 1024, 8 * 1024 * 1024)
BUFFER = 1024 * 1024
SIGNED_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class RawObject:
    """An object, and the signed request for it."""

    target: str
    size: int


@dataclass(slots=True)
class RawClient:
    """Downloads objects from `port`, which is that of a proxy or of the server."""

    port: int
    _objects: dict[tuple[str, str], RawObject] = field(default_factory=dict)

    def signed(self, server: S3Server, bucket: str, prefix: str) -> list[RawObject]:
        """All objects below a prefix."""
        client = server.client(endpoint_url=f"http://{HOST}:{self.port}")
        found = []
        for page in server.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for each in page.get("Contents", ()):
                url = client.generate_presigned_url(
                    "get_object", Params={"Bucket": bucket, "Key": each["Key"]}, ExpiresIn=SIGNED_S
                )
                parts = urlsplit(url)
                found.append(RawObject(f"{parts.path}?{parts.query}", each["Size"]))
        return found

    def download(self, objects: Sequence[RawObject], range_size: int, connections: int = CONNECTIONS) -> float:
        """Seconds for the bytes of all objects, in ranges of that size."""
        work: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
        for each in objects:
            for start in range(0, each.size, range_size):
                work.put((each.target, start, min(start + range_size, each.size)))
        failures: list[BaseException] = []

        def run() -> None:
            buffer = memoryview(bytearray(BUFFER))
            try:
                with socket.create_connection((HOST, self.port), timeout=60) as connected:
                    connected.settimeout(None)  # with a time-out each receive costs a poll
                    while True:
                        try:
                            wanted = work.get_nowait()
                        except queue.Empty:
                            return
                        self._get(connected, buffer, *wanted)
            except (OSError, ValueError) as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(connections)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        if failures:
            raise failures[0]
        return seconds

    def fastest(self, objects: Sequence[RawObject], runs: int) -> float:
        """The median of some downloads, with the range size that is the best here."""
        return min(median(self.download(objects, size) for _ in range(runs)) for size in RANGES)

    def round_trip(self, wanted: RawObject, length: int, runs: int = 15) -> float:
        """Seconds for a small range over a connection that is open: the median."""
        buffer = memoryview(bytearray(BUFFER))
        seconds = []
        with socket.create_connection((HOST, self.port)) as connected:
            for run in range(runs):
                start = run * length % max(wanted.size - length, 1)
                began = time.perf_counter()
                self._get(connected, buffer, wanted.target, start, min(start + length, wanted.size))
                seconds.append(time.perf_counter() - began)
        return median(seconds)

    def _get(self, connected: socket.socket, buffer: memoryview, target: str, start: int, stop: int) -> None:
        connected.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {HOST}:{self.port}\r\nRange: bytes={start}-{stop - 1}\r\n\r\n".encode()
        )
        received = connected.recv_into(buffer)
        while (at := bytes(buffer[: min(received, 65536)]).find(b"\r\n\r\n")) < 0:
            more = connected.recv_into(buffer[received:])
            if not more:
                raise ValueError("the connection ended in the headers")
            received += more
        if not bytes(buffer[:12]).endswith((b"206", b"200")):
            raise ValueError(f"found {bytes(buffer[:300])!r}, want 206")
        left = stop - start - (received - at - 4)
        while left > 0:
            more = connected.recv_into(buffer)
            if not more:
                raise ValueError(f"the connection ended {left} bytes early")
            left -= more
