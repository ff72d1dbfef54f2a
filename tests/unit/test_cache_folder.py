"""What the disk cache may take, who goes first, and what happens on a disk that is full or refuses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from desfs import metrics
from desfs.cache_folder import LAYOUT, CacheFolder
from desfs.disk_cache import SEGMENT, DiskCache, ObjectVersion
from desfs.problems import Problems

MB = 1024 * 1024
BLOCK = os.urandom(64 * 1024)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def version(number: int) -> ObjectVersion:
    return ObjectVersion("s3://bucket", f"day/{number}.des", "etag")


def disk_usage(folder: Path) -> int:
    usage = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            usage += path.stat().st_blocks * 512 if path.is_file() else 0
    return usage


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / LAYOUT).rglob("*") if path.is_file())


def put(cache: DiskCache, number: int, at: int = 0) -> None:
    cache.put(version(number), [(at, at + len(BLOCK), BLOCK)])
    cache.folder.wait_idle()


def has(cache: DiskCache, number: int, at: int = 0) -> bool:
    found = cache.get(version(number), at, at + len(BLOCK))
    assert found in (None, BLOCK)
    return found is not None


def evicted() -> float:
    return metrics.snapshot()["desfs_cache_evicted_bytes_total.disk"]


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=30)


# --- the limit ------------------------------------------------------------------------------------------------------


def test_the_limit_holds(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2 * MB)
    for number in range(200):
        cache.put(version(number), [(0, len(BLOCK), BLOCK)])
        assert disk_usage(tmp_path) <= 2 * MB + 4096  # the tag
    cache.folder.wait_idle()
    kept = [number for number in range(200) if has(cache, number)]
    assert len(kept) > 10
    assert max(kept) > 190  # a put that finds no room while some is being made is let go
    assert 0 < cache.state()["bytes"] <= 2 * MB


def test_the_limit_holds_for_threads_and_for_what_was_there_before(tmp_path: Path) -> None:
    first = DiskCache(tmp_path, 100 * MB)
    for number in range(100):
        put(first, number)
    cache = DiskCache(tmp_path, 2 * MB)

    def work(seed: int) -> None:
        for number in range(40):
            cache.put(version(1000 + seed * 100 + number), [(0, len(BLOCK), BLOCK)])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.folder.wait_idle()
    assert disk_usage(tmp_path) <= 2 * MB + 4096
    assert any(has(cache, 1000 + seed * 100 + number) for seed in range(5) for number in range(40))


def test_two_caches_in_one_folder_hold_the_limit_together(tmp_path: Path) -> None:
    one, two = DiskCache(tmp_path, 4 * MB), DiskCache(tmp_path, 4 * MB)
    for number in range(100):
        put(one, number)
        put(two, 1000 + number)
        # Each learns of what the other wrote after a 32nd of the limit.
        assert disk_usage(tmp_path) <= 4 * MB + 4 * MB // 32 + 2 * len(BLOCK)
    assert has(one, 1099)
    assert has(two, 99)


def test_a_put_larger_than_the_cache_is_let_go(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MB)
    put(cache, 1)
    cache.put(version(2), [(0, 2 * MB, bytes(2 * MB))])
    cache.folder.wait_idle()
    assert cache.get(version(2), 0, 2 * MB) is None
    assert has(cache, 1)
    nothing = DiskCache(tmp_path / "other", 0)
    put(nothing, 1)
    assert not has(nothing, 1)


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2 * MB)
    for number in range(10):
        put(cache, number)
    paths = {path: number for number in range(10) for path in files(tmp_path) if path.stem.startswith(_digest(number))}
    for path, number in paths.items():
        os.utime(path, (number, number))
    fresh = DiskCache(tmp_path, 2 * MB)
    assert has(fresh, 0), "which makes it the one used last"
    before = evicted()
    for number in range(100, 122):
        put(fresh, number)
    assert evicted() > before
    assert has(fresh, 0)
    assert not has(fresh, 1)
    assert has(fresh, 121)


def _digest(number: int) -> str:
    from desfs.disk_cache import identity

    return identity(version(number))[0]


def test_a_use_is_noted_once_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    cache = DiskCache(tmp_path, 2 * MB, clock=clock)
    put(cache, 1)
    (data,) = [path for path in files(tmp_path) if path.suffix == ".data"]
    os.utime(data, (5, 5))
    assert has(cache, 1)
    assert data.stat().st_mtime == 5
    clock.now_s += 61
    assert has(cache, 1)
    assert data.stat().st_mtime > 5


def test_one_segment_of_a_large_object_goes_before_another(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2 * MB)
    for part in range(40):
        put(cache, 1, part * SEGMENT)
    kept = [part for part in range(40) if has(cache, 1, part * SEGMENT)]
    assert 10 < len(kept) < 40
    assert kept == list(range(40 - len(kept), 40))


def test_a_strangers_files_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MB)
    put(cache, 1)
    below = files(tmp_path)[0].parent
    strange = [
        tmp_path / "notes.txt",
        tmp_path / LAYOUT / "notes.txt",
        tmp_path / LAYOUT / "blocks" / ("0" * 40 + ".data"),
        below / "notes.txt",
        below / ("g" * 40 + "-0.data"),
        below / ("0" * 40 + "-0.data.bak"),
        tmp_path / "desfs-2" / "blocks" / "00" / ("0" * 40 + "-0.data"),
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(MB))
        os.utime(path, (1, 1))
    link = tmp_path / LAYOUT / "blocks" / "zz"
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / ("0" * 40 + "-0.data")
    target.write_bytes(bytes(MB))
    link.symlink_to(tmp_path / "elsewhere")
    fresh = DiskCache(tmp_path, MB)
    for number in range(30):
        put(fresh, number)
    assert any(has(fresh, number) for number in range(30))  # one put may be let go while room is made
    assert all(path.stat().st_size == MB for path in [*strange, target])


def test_what_a_crash_has_left_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MB)
    for number in range(6):
        put(cache, number)
    folder = tmp_path / LAYOUT / "index" / "ab"
    folder.mkdir(parents=True)
    torn, being_written = (folder / f"{'ab' * 20}.{number}.tmp" for number in (1, 2))
    for path in (torn, being_written):
        path.write_bytes(bytes(200_000))
    os.utime(torn, (1, 1))
    fresh = DiskCache(tmp_path, MB)
    for number in range(6, 10):
        put(fresh, number)
    assert not torn.exists()
    assert being_written.exists()


# --- removed under its users ----------------------------------------------------------------------------------------


def test_a_cache_whose_files_are_removed_goes_on(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 10 * MB)
    for number in range(4):
        put(cache, number)
    assert has(cache, 0)
    subprocess.run(["rm", "-r", tmp_path / "cache"], check=True)
    for number in range(4):
        has(cache, number)  # its files are open: what is in them is still right
        put(cache, number)
        assert has(cache, number)
        assert has(DiskCache(tmp_path / "cache", 10 * MB), number)


def test_space_is_free_at_once_though_another_process_has_the_segment_open(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * MB) as disk:
        reader = DiskCache(disk / "cache", 60 * MB)
        for number in range(64):
            put(reader, number)
        used = os.statvfs(disk).f_bfree
        other = DiskCache(disk / "cache", MB)
        other.folder.wait_idle()
        put(other, 100)
        assert os.statvfs(disk).f_bfree > used + 2 * MB // 4096
        assert sum(has(reader, number) for number in range(64)) < 20


# --- disks that are full, or refuse ----------------------------------------------------------------------------------


def test_some_of_the_disk_stays_free(tmp_path: Path) -> None:
    """docs/operations.md: 5 % of the disk stay free."""
    with small_disk(tmp_path / "disk", 8 * MB) as disk:
        cache = DiskCache(disk / "cache", 100 * MB)
        for number in range(200):
            put(cache, number)
            assert os.statvfs(disk).f_bavail >= os.statvfs(disk).f_blocks * 0.04
        assert cache.state()["fault"] is None, "it makes room, and goes on"
        assert has(cache, 199)
        assert sum(has(cache, number) for number in range(200)) > 60


def test_a_disk_that_others_fill(tmp_path: Path, announced_logs: list[str]) -> None:
    """docs/operations.md: the cache shrinks, turns itself off when that does not help, and comes back."""
    announced_logs.append("less than 5% of the disk is free")
    clock, problems = Clock(), Problems()
    with small_disk(tmp_path / "disk", 8 * MB) as disk:
        cache = DiskCache(disk / "cache", 100 * MB, problems=problems, clock=clock)
        for number in range(32):
            put(cache, number)
        (disk / "others").write_bytes(bytes(5 * MB))
        put(cache, 100)
        put(cache, 101)
        assert cache.state()["fault"] is None
        assert has(cache, 101)
        assert disk_usage(disk / "cache") < 3 * MB
        subprocess.run(["rm", "-r", disk / "cache" / LAYOUT / "blocks"], check=True)
        del cache
        cache = DiskCache(disk / "cache", 100 * MB, problems=problems, clock=clock)
        with contextlib.suppress(OSError), (disk / "more").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for number in range(102, 110):
            put(cache, number)
        assert "5%" in cache.state()["fault"]
        assert [line for line in problems.lines() if "5% of the disk" in line] == problems.lines() != []
        assert not has(cache, 109)
        (disk / "others").unlink()
        (disk / "more").unlink()
        put(cache, 110)
        assert not has(cache, 110), "it is left alone for a while"
        clock.now_s += 61
        put(cache, 111)
        assert has(cache, 111)
        assert (cache.state()["fault"], problems.lines()) == (None, [])


def test_a_full_disk(tmp_path: Path, announced_logs: list[str]) -> None:
    """docs/semantics.md: A full disk is never an error for a reader."""
    announced_logs.append("No space left")
    problems = Problems()
    with small_disk(tmp_path / "disk", 8 * MB) as disk:
        cache = DiskCache(disk / "cache", 100 * MB, problems=problems)
        cache.folder.free_fraction = -1.0  # as it is with quotas, which the free space of the disk does not tell
        for number in range(500):
            put(cache, number)
            assert disk_usage(disk) <= 8 * MB
        kept = [number for number in range(500) if has(cache, number)]
        assert len(kept) > 50
        assert max(kept) >= 490
        # A record that was torn by the full disk hides no other.
        again = DiskCache(disk / "cache", 100 * MB)
        again.folder.wait_idle()  # it removes some while it is asked
        found = [number for number in range(500) if has(again, number)]
        assert found == kept[-len(found) :]
        assert len(found) > 50, "all but those that it removed so that some of the disk is free"


def test_a_disk_that_cannot_be_written_to_still_gives_what_it_has(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("Read-only")
    clock, problems = Clock(), Problems()
    with small_disk(tmp_path / "disk", 8 * MB) as disk:
        before = DiskCache(disk / "cache", 10 * MB, problems=problems, clock=clock)
        put(before, 1)
        del before  # a file open for writing keeps the disk busy
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True, timeout=30)
        cache = DiskCache(disk / "cache", 10 * MB, problems=problems, clock=clock)
        for number in range(2, 6):
            put(cache, number)
            clock.now_s += 61
        assert has(cache, 1)
        assert not has(cache, 2)
        assert "Read-only" in cache.state()["fault"]
        assert len(problems.lines()) == 1
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True, timeout=30)
        clock.now_s += 61
        put(cache, 7)
        put(cache, 1, 2 * MB)
        assert has(cache, 1)
        assert has(cache, 7)
        assert has(cache, 1, 2 * MB)
        assert problems.lines() == []


def test_a_disk_that_refuses_is_left_alone_and_warned_of_once(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("Not a directory")
    clock, problems = Clock(), Problems()
    cache = DiskCache(tmp_path, 10 * MB, problems=problems, clock=clock)
    (tmp_path / LAYOUT / "blocks").write_bytes(b"a file in the way")
    errors = metrics.snapshot().get("desfs_disk_cache_errors_total.write", 0)
    for number in range(10):
        put(cache, number)
        assert not has(cache, number)
    assert metrics.snapshot()["desfs_disk_cache_errors_total.write"] - errors == 1
    clock.now_s += 61
    put(cache, 1)
    assert metrics.snapshot()["desfs_disk_cache_errors_total.write"] - errors == 2
    assert len(problems.lines()) == 1
    (tmp_path / LAYOUT / "blocks").unlink()
    clock.now_s += 61
    put(cache, 1)
    assert has(cache, 1)
    assert problems.lines() == []


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("No space left|Read-only")
    with small_disk(tmp_path / "disk", MB) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True, timeout=30)
        cache = DiskCache(disk / "cache", MB)
        put(cache, 1)
        assert not has(cache, 1)
        assert "Read-only" in cache.state()["fault"]


def test_the_state_is_json(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 5)
    folder.wait_idle()
    assert folder.state() == {"folder": str(tmp_path), "max_bytes": 5, "bytes": 0, "fault": None}
