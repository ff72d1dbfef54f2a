"""Blocks in the disk cache: what was put, and what becomes of it when files are damaged, shared or removed."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from desfs import metrics
from desfs.disk_cache import SEGMENT, DiskCache, ObjectVersion
from desfs.errors import UsageError

VERSION = ObjectVersion("s3://bucket", "day/f.des", "etag")
OTHERS = [
    ObjectVersion("s3://bucket", "day/f.des", "etag2"),
    ObjectVersion("s3://bucket", "day/g.des", "etag"),
    ObjectVersion("s3://bucket2", "day/f.des", "etag"),
    ObjectVersion("s3://bucketday", "/f.des", "etag"),
    ObjectVersion("", "", ""),
    ObjectVersion("ż", "\ud800\udc80", "\n\0"),
]
MB = 1024 * 1024


def content(start: int, stop: int, seed: str = "content") -> bytes:
    """Any range of an object of which every kilobyte is different."""
    first, last = start // 1024, -(-stop // 1024)
    whole = b"".join(random.Random(f"{seed} {number}").randbytes(1024) for number in range(first, last))
    return whole[start - first * 1024 : stop - first * 1024]


def block(start: int, stop: int, seed: str = "content") -> tuple[int, int, bytes]:
    return start, stop, content(start, stop, seed)


def files(folder: Path, ending: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{ending}") if path.is_file() and path.name != "CACHEDIR.TAG")


def counted(what: str) -> float:
    return metrics.snapshot().get(f"desfs_disk_cache_errors_total.{what}", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_what_was_put_under_exactly_this_version(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    for number, version in enumerate([VERSION, *OTHERS]):
        assert cache.get(version, 0, 5000) is None
        cache.put(version, [block(0, 5000, str(number))])
    for again in (cache, DiskCache(folder, 100 * MB)):
        for number, version in enumerate([VERSION, *OTHERS]):
            assert again.get(version, 0, 5000) == content(0, 5000, str(number))
        assert again.get(VERSION._replace(etag="etag3"), 0, 5000) is None


def test_blocks_anywhere_in_an_object(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    bounds = [(0, 1), (1, 7000), (SEGMENT - 10, SEGMENT + 10), (SEGMENT + 10, SEGMENT + 20), (2**40, 2**40 + 3000)]
    cache.put(VERSION, [block(*each) for each in bounds])
    for again in (cache, DiskCache(folder, 100 * MB)):
        assert again.get_many(VERSION, bounds) == [content(*each) for each in bounds]
        assert again.get_many(VERSION, bounds[::-1]) == [content(*each) for each in bounds[::-1]]
        assert again.get_many(VERSION, []) == []


def test_a_range_of_adjacent_blocks(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    edges = [0, 10, 5000, 5001, 70_000, SEGMENT - 5, SEGMENT + 5, SEGMENT + 10]
    cache.put(VERSION, [block(start, stop) for start, stop in pairwise(edges[:5])])
    cache.put(VERSION, [block(SEGMENT - 5, SEGMENT + 5), block(SEGMENT + 5, SEGMENT + 10)])
    assert cache.get(VERSION, 0, 70_000) == content(0, 70_000)
    assert cache.get(VERSION, 10, 5001) == content(10, 5001)
    assert cache.get(VERSION, SEGMENT - 5, SEGMENT + 10) == content(SEGMENT - 5, SEGMENT + 10)
    for start, stop in ((0, 9), (0, 11), (1, 10), (5001, 70_001), (5001, SEGMENT - 5), (70_000, SEGMENT + 5)):
        assert cache.get(VERSION, start, stop) is None


def test_a_block_in_pieces_of_another_size(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    cache.put(VERSION, [block(0, 1000)])
    cache.put(VERSION, [block(0, 400), block(400, 1000)])
    assert cache.get(VERSION, 0, 1000) == content(0, 1000)
    assert cache.get(VERSION, 0, 400) == content(0, 400)


def test_a_block_of_the_wrong_length_is_a_mistake(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    for start, stop, data in ((0, 4, b"123"), (0, 0, b""), (4, 0, b"1234"), (-4, 0, b"1234")):
        with pytest.raises(ValueError, match="block from"):
            cache.put(VERSION, [(start, stop, data)])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffers(kind: Callable[[bytes], bytes], folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    cache.put(VERSION, [(0, 1000, kind(content(0, 1000)))])
    found = cache.get(VERSION, 0, 1000)
    assert type(found) is bytes
    assert found == content(0, 1000)


def test_many_blocks_at_once(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    bounds = [(start, start + 10) for start in range(0, 20_000, 10)]
    cache.put(VERSION, [block(*each) for each in reversed(bounds)])
    assert cache.get_many(VERSION, bounds) == [content(*each) for each in bounds]


def test_more_segments_than_are_kept_open(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    before = len(os.listdir("/proc/self/fd"))
    versions = [VERSION._replace(key=str(number)) for number in range(300)]
    for version in versions:
        cache.put(version, [block(0, 100, version.key)])
    assert [cache.get(version, 0, 100) for version in versions] == [content(0, 100, v.key) for v in versions]
    assert len(os.listdir("/proc/self/fd")) - before <= 256


def test_threads_share_a_cache(folder: Path) -> None:
    cache = DiskCache(folder, 2 * MB)
    errors = [counted(what) for what in ("read", "write", "damaged")]
    wrong: list[object] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(150):
            version = VERSION._replace(key=str(dice.randrange(8)))
            start = dice.randrange(20) * 20_000
            found = cache.get(version, start, start + 20_000)
            if found not in (None, content(start, start + 20_000, version.key)):
                wrong.append((version, start))
            cache.put(version, [block(start, start + 20_000, version.key)])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.folder.wait_idle()
    assert not wrong
    assert [counted(what) for what in ("read", "write")] == errors[:2]


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".data", ".rec"])
def test_a_flipped_byte_anywhere_is_a_miss(ending: str, folder: Path) -> None:
    """docs/semantics.md: A wrong byte in a cache is never seen: it is a miss."""
    bounds = [(10, 300), (300, 520), (1000, 1010)]
    writer = DiskCache(folder, 100 * MB)
    writer.put(VERSION, [block(*each) for each in bounds])
    (path,) = files(folder, ending)
    good = path.read_bytes()
    right = [content(*each) for each in bounds]
    for at in range(len(good)):
        for flip in (0x01, 0x80):
            path.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
            found = DiskCache(folder, 100 * MB).get_many(VERSION, bounds)
            assert all(block in (None, wanted) for block, wanted in zip(found, right, strict=True))
            hit_by = 1 if ending == ".rec" or any(start <= at < stop for start, stop in bounds) else 0
            assert sum(block is None for block in found) == hit_by, at
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        found = DiskCache(folder, 100 * MB).get_many(VERSION, bounds)
        assert all(block in (None, wanted) for block, wanted in zip(found, right, strict=True))


def test_damage_is_counted_and_healed(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    cache.put(VERSION, [block(0, 1000), block(1000, 2000)])
    (path,) = files(folder, ".data")
    with path.open("r+b") as file:
        file.write(b"oops")
    before = counted("damaged")
    assert cache.get_many(VERSION, [(0, 1000), (1000, 2000)]) == [None, content(1000, 2000)]
    assert counted("damaged") - before == 1
    other = DiskCache(folder, 100 * MB)
    cache.put(VERSION, [block(0, 1000)])
    for each in (cache, other):
        assert each.get(VERSION, 0, 2000) == content(0, 2000)


def test_files_that_were_swapped_are_misses(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    cache.put(VERSION, [block(0, 1000)])
    mine = {ending: files(folder, ending)[0] for ending in (".data", ".rec")}
    kept = {ending: path.read_bytes() for ending, path in mine.items()}
    for other in [*OTHERS, VERSION]:
        start = SEGMENT if other is VERSION else 0
        cache.put(other, [block(start, start + 1000, "theirs")])
        for ending, path in mine.items():
            (theirs,) = set(files(folder, ending)) - {path}
            path.write_bytes(theirs.read_bytes())
            theirs.unlink()
        again = DiskCache(folder, 100 * MB)
        assert again.get(VERSION, 0, 1000) is None
        mine[".rec"].write_bytes(kept[".rec"])
        assert DiskCache(folder, 100 * MB).get(VERSION, 0, 1000) is None
        mine[".data"].write_bytes(kept[".data"])
        assert DiskCache(folder, 100 * MB).get(VERSION, 0, 1000) == content(0, 1000)


def test_a_torn_record_does_not_hide_later_ones(folder: Path) -> None:
    cache = DiskCache(folder, 100 * MB)
    cache.put(VERSION, [block(0, 1000)])
    (path,) = files(folder, ".rec")
    for torn in (1, 39, 17):
        with path.open("ab") as file:
            file.write(b"x" * torn)
        writer = DiskCache(folder, 100 * MB)
        writer.put(VERSION, [block(torn * 1000, torn * 1000 + 1000)])
        for each in (writer, cache, DiskCache(folder, 100 * MB)):
            assert each.get(VERSION, 0, 1000) == content(0, 1000)
            assert each.get(VERSION, torn * 1000, torn * 1000 + 1000) == content(torn * 1000, torn * 1000 + 1000)


# --- the folder ---------------------------------------------------------------------------------------------------


def test_the_folder_is_private(folder: Path) -> None:
    DiskCache(folder / "below", MB).put(VERSION, [block(0, 10)])
    assert (folder / "below").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files(folder)} == {0o600}
    assert (folder / "below" / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_folder_that_others_can_change_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o707)
    with pytest.raises(UsageError, match="written to by everybody"):
        DiskCache(folder, MB)
    folder.chmod(0o700)
    os.chown(folder, 12345, -1)
    with pytest.raises(UsageError, match="belongs to another user"):
        DiskCache(folder, MB)
    os.chown(folder, os.getuid(), -1)
    DiskCache(folder, MB)


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for place in ("file", "file/below", "loop"):
        with pytest.raises(UsageError, match="cache_dir"):
            DiskCache(tmp_path / place, MB)
