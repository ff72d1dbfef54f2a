"""The local store of daily containers."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from des_format import (
    DailyShardedDesStore,
    DesReader,
    InvalidMeta,
    NoSuchEntry,
    WriterClosed,
    parse_name,
    shard_hex,
    shard_of,
)
from des_format.layout import BIG_FILE_THRESHOLD

DAY = date(2025, 11, 25)


def all_entries(folder: Path) -> Iterator[tuple[str, bytes, str]]:
    """Every entry below a store's folder: name, payload, container."""
    for path in sorted(folder.rglob("*.des")):
        with DesReader(path) as reader:
            for name, payload in reader.get_files_batch(reader.list_files()).items():
                yield name, payload, str(path.relative_to(folder))


def test_files_are_read_back_before_and_after_closing(tmp_path: Path) -> None:
    payloads = [b"payload %d" % number * number for number in range(200)]
    with DailyShardedDesStore(tmp_path, shard_bits=4, day=DAY) as store:
        added = [store.add_file(payload, {"n": n}, ".txt") for n, payload in enumerate(payloads)]
        for n, (name, _) in enumerate(added):
            assert store.get_file(name) == payloads[n]
            assert store.get_meta(name) == {"n": n, "size": len(payloads[n])}
        assert list(tmp_path.rglob("*.des")) == [], "containers get their names when they are closed"
    for n, (name, path) in enumerate(added):
        parsed = parse_name(name)
        assert (parsed.prefix, parsed.day) == ("DES", DAY)
        assert name.endswith(").txt")
        # DES_V1: `{prefix}/{YYYY-MM-DD}/{shard}.des`, the shard being that of the name.
        assert path == tmp_path / "2025-11-25" / f"{shard_hex(shard_of(name, 4), 4)}.des"
        with DesReader(path) as reader:
            assert reader.get_file(name) == payloads[n]
        assert store.get_file(name) == payloads[n]
        assert store.get_meta(name) == {"n": n, "size": len(payloads[n])}
    assert len({name for name, _ in added}) == 200
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_names_that_are_not_there(tmp_path: Path) -> None:
    with DailyShardedDesStore(tmp_path / "other", day=DAY, node_id=9) as elsewhere:
        other, _ = elsewhere.add_file(b"y")
    with DailyShardedDesStore(tmp_path, day=DAY) as store:
        name, _ = store.add_file(b"x")
        for missing in ("x", "", "../../etc/passwd", name + "x", other, name.replace("DES_", "XYZ_")):
            with pytest.raises(NoSuchEntry):
                store.get_file(missing)
            with pytest.raises(NoSuchEntry):
                store.get_meta(missing)


@pytest.mark.parametrize(
    ("ext", "suffix"), [(None, ""), ("", ""), (".pdf", ".pdf"), ("pdf", ".pdf"), (".tar.gz", ".tar.gz"), (".ż", ".ż")]
)
def test_extensions(ext: str | None, suffix: str, tmp_path: Path) -> None:
    with DailyShardedDesStore(tmp_path, day=DAY) as store:
        name, _ = store.add_file(b"x", ext=ext)
    assert name.endswith(f"){suffix}")
    assert store.get_file(name) == b"x"


@pytest.mark.parametrize("ext", ["a/b", ".x/../y", "\0", "." + "x" * 300, "a:b", "\ud800"])
def test_an_extension_that_cannot_stand_in_a_name_is_refused(ext: str, tmp_path: Path) -> None:
    from des_format import DesFormatError

    with DailyShardedDesStore(tmp_path, day=DAY) as store:
        with pytest.raises(DesFormatError):
            store.add_file(b"x", ext=ext)
        name, _ = store.add_file(b"y")
    assert store.get_file(name) == b"y"


def test_files_from_a_path(tmp_path: Path) -> None:
    source = tmp_path / "report.PDF"
    source.write_bytes(b"content")
    with DailyShardedDesStore(tmp_path / "store", day=DAY, prefix="ABC1") as store:
        kept, _ = store.add_file_from_path(source, {"mime": "application/pdf"})
        plain, _ = store.add_file_from_path(str(source), keep_ext=False)
        with pytest.raises(FileNotFoundError):
            store.add_file_from_path(tmp_path / "missing")
    assert kept.startswith("ABC1_20251125_(")
    assert kept.endswith(").PDF")
    assert plain.endswith(")")
    assert store.get_file(kept) == store.get_file(plain) == b"content"
    assert store.get_meta(kept)["mime"] == "application/pdf"


def test_a_large_file_is_streamed_into_its_container(tmp_path: Path) -> None:
    source = tmp_path / "large.bin"
    content = bytes(range(256)) * 40_000  # above the limit up to which a file is copied through memory
    source.write_bytes(content)
    with DailyShardedDesStore(tmp_path / "store", day=DAY) as store:
        name, _ = store.add_file_from_path(source)
        assert store.get_file(name) == content
    assert store.get_file(name) == content


def test_a_big_file_becomes_a_file_of_its_own(tmp_path: Path) -> None:
    """External files: a payload of at least 100 MiB is stored as an object of its own."""
    source = tmp_path / "big.bin"
    with source.open("wb") as file:
        file.truncate(BIG_FILE_THRESHOLD)
        file.seek(12_345)
        file.write(b"needle")
    with DailyShardedDesStore(tmp_path / "store", day=DAY) as store:
        name, path = store.add_file_from_path(source)
    assert path.stat().st_size < 1000
    external = path.parent / "_bigFiles" / name
    assert external.stat().st_size == BIG_FILE_THRESHOLD
    meta = store.get_meta(name)
    assert meta["external_key"] == f"2025-11-25/_bigFiles/{name}"
    assert store.get_file(name)[12_340:12_355] == b"\0" * 5 + b"needle" + b"\0" * 4


def test_a_refused_file_leaves_the_store_usable(tmp_path: Path) -> None:
    with DailyShardedDesStore(tmp_path, day=DAY) as store:
        with pytest.raises(InvalidMeta):
            store.add_file(b"x", {"k": object()})
        name, _ = store.add_file(memoryview(b"12345678").cast("I"))
        assert store.get_file(name) == b"12345678"
    assert [entry[1] for entry in all_entries(tmp_path)] == [b"12345678"]
    with pytest.raises(WriterClosed):
        store.add_file(b"y")
    store.close()


class Clock:
    """Seconds since the epoch, as a test sets them."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at.timestamp()


def test_the_day_rolls_over(tmp_path: Path) -> None:
    """Rollover at the day's end, which is noticed when the next file is added; days are UTC."""
    clock = Clock(datetime(2025, 11, 25, 23, 59, 59, 999_000, UTC))
    with DailyShardedDesStore(tmp_path, shard_bits=1, clock=clock) as store:
        before = [store.add_file(b"before")[0] for _ in range(10)]
        clock.at = datetime(2025, 11, 26, 0, 0, 0, 0, UTC)
        after = [store.add_file(b"after")[0] for _ in range(10)]
        assert sorted(path.name for path in (tmp_path / "2025-11-25").glob("*.des")) == ["0.des", "1.des"]
        assert list((tmp_path / "2025-11-26").glob("*.des")) == []
        assert {store.get_file(name) for name in before} == {b"before"}
        assert {store.get_file(name) for name in after} == {b"after"}
        clock.at = datetime(2025, 11, 25, 12, tzinfo=UTC)  # the clock steps back
        back = [store.add_file(b"back")[0] for _ in range(10)]
    days = {name: container[:10] for name, _, container in all_entries(tmp_path)}
    assert days == dict.fromkeys(before + back, "2025-11-25") | dict.fromkeys(after, "2025-11-26")
    assert {parse_name(name).day for name in back} == {DAY}
    assert {store.get_file(name) for name in back} == {b"back"}


def test_a_second_run_on_the_same_day_writes_parts(tmp_path: Path) -> None:
    """Parts of this project are `{shard}-{generation}.des`."""
    names = {}
    for run in range(3):
        with DailyShardedDesStore(tmp_path, shard_bits=1, day=DAY, node_id=run) as store:
            for _ in range(10):
                name, path = store.add_file(b"run %d" % run)
                names[name] = b"run %d" % run
                assert store.get_file(name) == b"run %d" % run
                assert path.name[1:] == (".des" if run == 0 else f"-{run:06}.des")
            assert all(store.get_file(name) == payload for name, payload in names.items())
    assert {name: payload for name, payload, _ in all_entries(tmp_path)} == names


def test_two_stores_at_once_lose_nothing(tmp_path: Path) -> None:
    first = DailyShardedDesStore(tmp_path, shard_bits=1, day=DAY, node_id=1)
    second = DailyShardedDesStore(tmp_path, shard_bits=1, day=DAY, node_id=2)
    names = {store.add_file(b"%d" % n)[0]: b"%d" % n for n in range(20) for store in (first, second)}
    second.close()
    names |= {first.add_file(b"last")[0]: b"last"}
    first.close()
    assert {name: payload for name, payload, _ in all_entries(tmp_path)} == names
    assert all(second.get_file(name) == payload for name, payload in names.items())


PROGRAM = """
import sys
from datetime import date
from des_format import DailyShardedDesStore

for run in range(15):
    with DailyShardedDesStore(sys.argv[1], shard_bits=1, day=date(2025, 11, 25), node_id=int(sys.argv[2])) as store:
        for number in range(4):
            print(store.add_file(f"{sys.argv[2]} {run} {number}".encode())[0])
"""


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path, str(node)], stdout=subprocess.PIPE, cwd=root)
        for node in (1, 2, 3)
    ]
    printed = [process.communicate(timeout=60)[0].decode().split("\n")[:-1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    wanted = {
        name: f"{node} {index // 4} {index % 4}".encode()
        for node, names in enumerate(printed, 1)
        for index, name in enumerate(names)
    }
    assert len(wanted) == 180
    assert {name: payload for name, payload, _ in all_entries(tmp_path)} == wanted


def test_threads_share_a_store(tmp_path: Path) -> None:
    with DailyShardedDesStore(tmp_path, shard_bits=2, day=DAY) as store:
        barrier = threading.Barrier(8)

        def work(thread: int) -> dict[str, bytes]:
            barrier.wait()
            added = {}
            for number in range(50):
                payload = f"{thread} {number}".encode() * number
                name, _ = store.add_file(payload, {"thread": thread})
                added[name] = payload
                assert store.get_file(name) == payload
            return added

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(8)))
    wanted = {name: payload for result in results for name, payload in result.items()}
    assert len(wanted) == 400
    entries = list(all_entries(tmp_path))
    assert {name: payload for name, payload, _ in entries} == wanted
    assert max(Counter(name for name, _, _ in entries).values()) == 1


def test_an_exception_in_the_block_keeps_what_was_added(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), DailyShardedDesStore(tmp_path, day=DAY) as store:  # noqa: PT012
        name, _ = store.add_file(b"added")
        raise RuntimeError
    assert store.get_file(name) == b"added"


@pytest.mark.parametrize("bits", [0, 33])
def test_bits_out_of_range(bits: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="want 1 to 32"):
        DailyShardedDesStore(tmp_path, shard_bits=bits)
