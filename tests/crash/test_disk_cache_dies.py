"""Processes that share a disk cache while it makes room, and that are killed in the middle: nobody reads a wrong byte,
and what they leave behind is usable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from desfs.disk_cache import DiskCache, ObjectVersion

ROOT = Path(__file__).parents[2]
LIMIT = 6 * 1024 * 1024
PATIENCE_S = 60.0

# Each puts and gets blocks of versions that all of them use, and says what it got; the content follows from the place.
PROGRAM = """
import random, sys
from tests.crash.test_disk_cache_dies import LIMIT, ask
from desfs.disk_cache import DiskCache

folder, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache, dice = DiskCache(folder, LIMIT), random.Random(seed)
print("ready", flush=True)
hits = sum(ask(cache, dice.randrange(12), dice.randrange(60)) for _ in range(steps))
cache.folder.wait_idle()
print(hits, cache.state()["fault"], flush=True)
"""


def content(number: int, start: int, stop: int) -> bytes:
    return (f"{number} {start} " * 5000).encode()[: stop - start]


def ask(cache: DiskCache, number: int, block: int) -> int:
    """Read a block through the cache as a mount does, with its neighbours; 1 for a hit."""
    version = ObjectVersion("s3://b", str(number), "e")
    bounds = [(at * 20_000, (at + 1) * 20_000) for at in range(block, block + 3)]
    found = cache.get_many(version, bounds)
    for (start, stop), data in zip(bounds, found, strict=True):
        assert data in (None, content(number, start, stop)), (number, start)
    missing = [bound for bound, data in zip(bounds, found, strict=True) if data is None]
    cache.put(version, [(start, stop, content(number, start, stop)) for start, stop in missing])
    return sum(data is not None for data in found)


def kept_block(cache: DiskCache, number: int, block: int) -> bool:
    """Whether a block is there; it is right then."""
    start, stop = block * 20_000, (block + 1) * 20_000
    data = cache.get(ObjectVersion("s3://b", str(number), "e"), start, stop)
    assert data in (None, content(number, start, stop))
    return data is not None


def start(folder: Path, seed: int, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(seed), str(steps)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def usage(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # evicted meanwhile
    return total


def test_processes_share_a_cache_while_it_makes_room(tmp_path: Path) -> None:
    """docs/operations.md: Several mounts may share a cache_dir."""
    processes = [start(tmp_path, seed, 600) for seed in range(3)]
    cache, steps = DiskCache(tmp_path, LIMIT), 0
    while any(process.poll() is None for process in processes):
        ask(cache, steps % 12, steps % 61)
        steps += 1
        # Each of them may be a 32nd of the limit and a put ahead of what the others know.
        assert usage(tmp_path) <= LIMIT * 1.25
    for process in processes:
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        hits, fault = output.split()[1:]
        assert int(hits) > 0
        assert fault == "None"
    cache.folder.wait_idle()


@pytest.mark.parametrize("seed", range(3))
def test_a_process_that_is_killed_leaves_a_usable_cache(seed: int, tmp_path: Path) -> None:
    for round_ in range(3):
        process = start(tmp_path, seed * 10 + round_, 1_000_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = usage(tmp_path)
        deadline = time.monotonic() + PATIENCE_S
        while usage(tmp_path) < before + 100_000 * seed and usage(tmp_path) < LIMIT // 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)
        cache = DiskCache(tmp_path, LIMIT)
        kept = [kept_block(cache, number, block) for number in range(12) for block in range(63)]
        assert seed == 0 or any(kept)
        for number in range(12):
            for block in range(0, 60, 3):
                ask(cache, number, block)
        cache.folder.wait_idle()  # puts that find no room while some is being made are let go
        for block in range(30, 60, 3):
            ask(cache, 11, block)
            cache.folder.wait_idle()
        assert sum(ask(cache, 11, block) for block in range(30, 60, 3)) == 30, "what was put last is there"
        cache.folder.wait_idle()
        assert cache.state()["fault"] is None
