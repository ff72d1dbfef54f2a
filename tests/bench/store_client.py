"""What a ranged GET costs with boto3 and with obstore: this process's CPU time, and how many go through in a second.

The S3 server runs on the same cores, so GETs a second are a lower limit of what a client can do; the CPU time is not
disturbed by it.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from desfs.store.base import S3Options
from desfs.store.obstore_s3 import ObstoreS3Store
from desfs.store.s3 import S3Store
from tests.bench import Figure
from tests.servers import S3Server, s3_server

OBJECT = 64 << 20
# What a `cat` of a small file, a read of the kernel and a window of a scan ask for, and how many make a second or so.
LENGTHS = {"4 KB": (4_000, 600), "128 KiB": (128 << 10, 400), "4 MiB": (4 << 20, 96)}
THREADS = (1, 16, 32)
RUNS = 3
CLIENTS: dict[str, type[S3Store]] = {"boto3": S3Store, "obstore": ObstoreS3Store}


def measure_store_client() -> list[Figure]:
    """Ranges at random places of one object of 64 MiB, from SeaweedFS on loopback, connections open already."""
    figures = []
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as server, _environ(server):
        bucket = server.new_bucket("bench")
        etag = S3Store(bucket).put("object", random.Random(1).randbytes(OBJECT))
        stores = {name: kind(bucket, options=S3Options()) for name, kind in CLIENTS.items()}
        for what, (length, count) in LENGTHS.items():
            for threads in THREADS:
                runs: dict[str, list[tuple[float, float]]] = {name: [] for name in stores}
                for _ in range(RUNS):
                    for name, store in stores.items():
                        runs[name].append(_measure(store, etag, length, count, threads))
                for name, measured in runs.items():
                    label = f"{name}, {what}, {threads} thread{'s' * (threads > 1)}"
                    cpu_s, rate = (median(values) for values in zip(*measured, strict=True))
                    figures.append(Figure(f"{label}: CPU a GET", cpu_s * 1e6, "µs"))
                    figures.append(Figure(f"{label}: GETs", rate, "/s"))
        for store in stores.values():
            store.close()
    return figures


def _measure(store: S3Store, etag: str, length: int, count: int, threads: int) -> tuple[float, float]:
    """CPU seconds a GET, and GETs a second."""
    places = random.Random(2)
    starts = [places.randrange(OBJECT - length) for _ in range(count)]

    def get(start: int) -> int:
        return len(store.get_range("object", start, start + length, if_match=etag).data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(get, starts[: 2 * threads]))
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        read = sum(pool.map(get, starts))
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    assert read == count * length
    return cpu_s / count, count / wall_s


@contextlib.contextmanager
def _environ(server: S3Server) -> Iterator[None]:
    """The environment of this process, set to the server for a while."""
    before = dict(os.environ)
    os.environ.update(server.environ())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
