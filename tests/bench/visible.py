"""From drop to visible: how long after a program has written a file into a spool a mount shows it.

    python -m tests.bench visible --minutes 5

A packer and a mount through the proxy, 200 files a second. A file's name says when it was written; a directory is
listed every tenth of a second, as a program would that waits for its files.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console

from tests.bench import Figure
from tests.bench.corpus import DESFS
from tests.bench.machine import clean_environ
from tests.bench.systems import Desfs
from tests.bench.world import World, open_world

RATE = 200  # files a second
MAX_AGE_S = 5.0
REFRESH_S = 2.0
SLACK_S = 2.0  # what the promise allows besides: a look at the spool, the upload, the listing
_SIZE = 8 * 1024
_FOLDER_S = 1.0  # of files in a directory: a listing has some hundred names then
_LOOK_S = 0.1
_LAST_S = 60.0  # for the last files to come


def measure_visible(minutes: float, folder: Path | None = None) -> list[Figure]:
    """Write for so many minutes; the delays until the mount has listed each file, in seconds."""
    console = Console(stderr=True)
    with open_world(lambda what: console.print(what, markup=False, highlight=False), folder) as world:
        bucket = world.server.new_bucket("visible")
        spool = world.work / "spool"
        spool.mkdir()
        store = f"s3://{bucket}/store"
        with _packer(world, spool, store):
            _wait_made(world, bucket)
            system = Desfs(store, world.env, "", "desfs", (f"refresh={REFRESH_S:g}",))
            with system.mount(world.work / "mnt") as mounted:
                delays = _delays(world, spool, mounted.tree, minutes * 60)
    bar = MAX_AGE_S + REFRESH_S + SLACK_S
    return [
        Figure("files written", len(delays), "", None),
        Figure("drop to visible: median", float(np.percentile(delays, 50)), "s", None),
        Figure("drop to visible: p99", float(np.percentile(delays, 99)), "s", bar, at_least=False),
        Figure("drop to visible: longest", float(max(delays)), "s", None),
    ]


@contextlib.contextmanager
def _packer(world: World, spool: Path, store: str) -> Iterator[None]:
    command = [DESFS, "packer", "--spool", spool, "--store", store, "--max-age", f"{MAX_AGE_S:g}"]
    with subprocess.Popen(
        list(map(str, command)),
        env=clean_environ() | world.env,
        stdout=subprocess.DEVNULL,
        stderr=(world.work / "packer.log").open("wb"),
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(_LAST_S)


def _wait_made(world: World, bucket: str) -> None:
    """Wait until the packer has written the store's layout: there is something to mount then."""
    deadline = time.monotonic() + _LAST_S
    while not world.server.client().list_objects_v2(Bucket=bucket).get("Contents"):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the packer does not start: {(world.work / 'packer.log').read_text()[-2000:]}")
        time.sleep(0.1)


def _delays(world: World, spool: Path, mount: Path, seconds: float) -> list[float]:
    """Seconds from the rename of each file into the spool until a listing of its directory has it."""
    count = int(seconds * RATE)
    written = threading.Thread(target=_write, args=(spool, count))
    written.start()
    waiting = {f"d{number}" for number in range(int(count / RATE / _FOLDER_S) + 1)}
    found: dict[str, float] = {}
    last = time.monotonic() + seconds + _LAST_S
    while len(found) < count:
        if time.monotonic() > last:
            raise RuntimeError(f"{count - len(found)} of {count} files are not shown")
        began = time.monotonic()
        day = mount / datetime.now(UTC).date().isoformat()
        for name in sorted(waiting, key=lambda each: int(each[1:])):
            try:
                shown = os.listdir(day / name)
            except FileNotFoundError:
                break  # those behind it are younger
            now = time.time()
            for file in shown:
                found.setdefault(file, now - int(file.partition("-")[0]) / 1e9)
            if len(shown) == RATE * _FOLDER_S:
                waiting.discard(name)
        if int(began) % 30 == 0 and began - int(began) < _LOOK_S:
            world.say(f"{len(found):,} of {count:,} files are shown")
        time.sleep(max(_LOOK_S - (time.monotonic() - began), 0.0))
    written.join()
    return list(found.values())


def _write(spool: Path, count: int) -> None:
    content = os.urandom(_SIZE)
    staging = spool.with_name("staging")
    staging.mkdir()
    began = time.monotonic()
    for number in range(count):
        folder = spool / f"d{int(number / RATE / _FOLDER_S)}"
        source = staging / str(number)
        source.write_bytes(content)
        while True:
            folder.mkdir(exist_ok=True)
            try:
                source.rename(folder / f"{time.time_ns()}-{number}")
                break
            except FileNotFoundError:
                continue  # the packer found it empty, and removed it
        ahead_s = began + number / RATE - time.monotonic()
        if ahead_s > 0:
            time.sleep(ahead_s)
