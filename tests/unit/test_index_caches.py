"""The contract of index caches, for memory and disk, and what is their own. Redis: tests/service/."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_format import CacheKey, DiskIndexCache, IndexCache, InMemoryIndexCache
from des_format.cache import seal, unseal

KEY = CacheKey("s3://bucket", "day/f.des", "etag")
OTHERS = [
    CacheKey("s3://bucket", "day/f.des", "etag2"),
    CacheKey("s3://bucket", "day/g.des", "etag"),
    CacheKey("s3://bucket2", "day/f.des", "etag"),
    CacheKey("s3://bucket", "day/f.des", ""),
    CacheKey("", "", ""),
    CacheKey("ż", "\ud800", "\n"),
]


class MakeCache(Protocol):
    def __call__(self, max_bytes: int) -> IndexCache: ...


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeCache:
    if request.param == "memory":
        return InMemoryIndexCache
    return lambda max_bytes: DiskIndexCache(tmp_path / "cache", max_bytes)


def key(number: int) -> CacheKey:
    return CacheKey("s", f"{number}", "e")


def test_what_was_put_under_exactly_this_key(make: MakeCache) -> None:
    cache = make(1_000_000)
    assert cache.get(KEY) is None
    for number, each in enumerate([KEY, *OTHERS]):
        cache.put(each, b"%d" % number)
    for number, each in enumerate([KEY, *OTHERS]):
        assert cache.get(each) == b"%d" % number
    assert cache.get(CacheKey("s3://bucket", "day/f.des", "etag3")) is None


def test_a_newer_value_takes_the_place_of_an_older_one(make: MakeCache) -> None:
    cache = make(1_000_000)
    for value in (b"one", b"", b"\0" * 100_000, b"two"):
        cache.put(KEY, value)
        assert cache.get(KEY) == value


def test_a_cache_is_bounded(make: MakeCache) -> None:
    cache = make(10_000)
    for number in range(100):
        cache.put(key(number), b"x" * 1000)
    kept = [number for number in range(100) if cache.get(key(number)) is not None]
    assert 1 <= len(kept) <= 10
    assert kept == list(range(100 - len(kept), 100)), "the oldest go first"


def test_a_cache_of_small_values_is_bounded_too(make: MakeCache) -> None:
    """The notes of what was seen last are a few bytes each; their keys are longer."""
    cache = make(2000)
    for number in range(100):
        cache.put(key(number), b"")
    assert sum(cache.get(key(number)) is not None for number in range(100)) < 100


def test_a_value_that_does_not_fit_costs_no_other_its_place(make: MakeCache) -> None:
    cache = make(10_000)
    cache.put(KEY, b"kept")
    cache.put(key(1), b"x" * 20_000)
    assert cache.get(key(1)) is None
    assert cache.get(KEY) == b"kept"
    cache.put(KEY, b"x" * 20_000)
    assert cache.get(KEY) != b"x" * 20_000


def test_threads_share_a_cache(make: MakeCache) -> None:
    cache = make(20_000)
    wrong: list[object] = []

    def work(seed: int) -> None:
        for step in range(60):
            number = (seed * 7 + step) % 20
            value = cache.get(key(number))
            if value not in (None, b"%d" % number * 100):
                wrong.append(value)
            cache.put(key(number), b"%d" % number * 100)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_keeps_what_was_used_last() -> None:
    cache = InMemoryIndexCache(10_000)
    for number in range(3):
        cache.put(key(number), b"x" * 2500)
    assert cache.get(key(0)) is not None
    cache.put(key(3), b"x" * 2500)
    cache.put(key(4), b"x" * 2500)
    assert [number for number in range(5) if cache.get(key(number))] == [0, 3, 4]


# --- the seal -----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=50), st.data())
def test_a_flipped_byte_anywhere_is_a_miss(value: bytes, data: st.DataObject) -> None:
    """A torn, tampered or foreign value is a miss."""
    sealed = seal(KEY, value)
    assert unseal(KEY, sealed) == value
    at = data.draw(st.integers(0, len(sealed) - 1))
    bit = data.draw(st.integers(1, 255))
    assert unseal(KEY, sealed[:at] + bytes([sealed[at] ^ bit]) + sealed[at + 1 :]) is None
    assert unseal(KEY, sealed[:at]) is None
    assert unseal(KEY, sealed + b"\0") is None
    for other in OTHERS:
        assert unseal(other, sealed) is None


# --- disk ------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_any_damage_on_disk_is_a_miss(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("is damaged and is dropped")
    cache = DiskIndexCache(tmp_path)
    cache.put(KEY, b"the value")
    (path,) = files(tmp_path)
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :])
        assert cache.get(KEY) is None
        assert files(tmp_path) == [], "and is not kept"
    for torn in (b"", good[:-1], good + b"x", good[: len(good) // 2]):
        path.write_bytes(torn)
        assert cache.get(KEY) is None


def test_a_foreign_value_on_disk_is_a_miss(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("is damaged and is dropped")
    cache = DiskIndexCache(tmp_path)
    cache.put(KEY, b"mine")
    (mine,) = files(tmp_path)
    for other in OTHERS:
        cache.put(other, b"theirs")
        (theirs,) = set(files(tmp_path)) - {mine}
        theirs.replace(mine)
        assert cache.get(KEY) is None
        cache.put(KEY, b"mine")
    assert cache.get(KEY) == b"mine"


def test_disk_keeps_what_was_used_last(tmp_path: Path) -> None:
    size = len(seal(key(0), b"x" * 1000))
    cache = DiskIndexCache(tmp_path, 3 * size)
    places = {}
    for number in range(3):
        before = set(files(tmp_path))
        cache.put(key(number), b"x" * 1000)
        (places[number],) = set(files(tmp_path)) - before
        os.utime(places[number], (number, number))
    assert cache.get(key(0)) is not None  # now the one used last
    cache.put(key(3), b"x" * 1000)
    assert not places[1].exists()
    assert [number for number in range(4) if cache.get(key(number))] == [0, 2, 3]


def test_what_a_crash_left_behind_counts_and_goes(tmp_path: Path) -> None:
    cache = DiskIndexCache(tmp_path, 5000)
    cache.put(KEY, b"x")
    (path,) = files(tmp_path)
    torn = path.parent / ".tmp-of-a-dead-process"
    torn.write_bytes(b"x" * 4990)
    os.utime(torn, (1, 1))
    cache.put(key(1), b"y")
    assert not torn.exists()
    assert cache.get(KEY) == b"x"


def test_a_disk_cache_survives_its_process_and_is_shared(tmp_path: Path) -> None:
    program = (
        "import sys; from des_format import CacheKey, DiskIndexCache\n"
        "cache = DiskIndexCache(sys.argv[1])\n"
        "assert cache.get(CacheKey('s', '0', 'e')) == b'from the parent'\n"
        "for number in range(200): cache.put(CacheKey('s', str(number % 20), 'e'), b'%d' % number * 1000)\n"
    )
    cache = DiskIndexCache(tmp_path)
    cache.put(key(0), b"from the parent")
    command = [sys.executable, "-c", program, str(tmp_path)]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    allowed = {b"%d" % number * 1000 for number in range(200)} | {None, b"from the parent"}
    while child.poll() is None:
        for number in range(20):
            assert cache.get(key(number)) in allowed
    assert child.returncode == 0
    assert [cache.get(key(number)) for number in range(20)] == [b"%d" % (180 + number) * 1000 for number in range(20)]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=30)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@needs_root
def test_a_full_disk_is_a_miss(tmp_path: Path, announced_logs: list[str]) -> None:
    """A disk that is full or refuses is a miss."""
    announced_logs.append("cannot write: .*No space left")
    with mounted(tmp_path / "disk", "size=200000") as disk:
        cache = DiskIndexCache(disk / "cache")
        cache.put(KEY, b"small")
        cache.put(key(1), b"x" * 1_000_000)
        assert cache.get(key(1)) is None
        assert cache.get(KEY) == b"small"
        assert len(files(disk)) == 1, "nothing half-written is left"


@needs_root
def test_a_disk_that_cannot_be_written_still_gives_what_it_has(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("cannot (write|remove): .*Read-only")
    with mounted(tmp_path / "disk", "size=200000") as disk:
        cache = DiskIndexCache(disk / "cache")
        cache.put(KEY, b"value")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True, timeout=30)
        cache.put(key(1), b"other")
        assert cache.get(key(1)) is None
        assert cache.get(KEY) == b"value"


@pytest.mark.parametrize("place", ["file", "file/below", "loop"])
def test_a_folder_that_cannot_be_one_is_a_miss(place: str, tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("cannot (read|write)")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    cache = DiskIndexCache(tmp_path / place)
    cache.put(KEY, b"value")
    assert cache.get(KEY) is None
