"""desfs/merging/compact.py: a day that is fed by a trickle of files, seen through a mount."""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest

from assignment.opening import open_catalog
from des_format.codec import encode_meta
from desfs.merging.compact import CompactionSettings, Compactor
from desfs.packer.leases import Leases
from desfs.store.base import CopyRange
from desfs.store.delegating import Delegating
from desfs.store.file import FileStore
from desfs.store.multipart import length_of
from desfs.store.retrying import Retrying
from tests.fakes.counting_proxy import CountingProxy
from tests.merging import LAYOUT, commit_part
from tests.mount.mounting import mounted, wait_until
from tests.mount.stores import meta_of, upload
from tests.servers import S3Server
from tests.unit.containers import Item, build

pytestmark = pytest.mark.fuse

# A part of a day: 2,000 parts, one every two seconds, on each of four shards take three times as long
# (docs/performance.md).
PARTS = {"0": 1_000, "5": 100, "a": 100, "f": 100}
# Fewer than 15 parts of a shard come in this time: each is three transactions that reach the disk.
GRACE_S = 0.1
MOST = 40


def content(shard: str, number: int) -> bytes:
    """A file of some kilobytes that no other is like; those whose number is below 20 come again and again."""
    return Random(f"{shard} {number}").randbytes(4_000 + number % 7 * 1_500)


def name_of(shard: str, number: int) -> str:
    return f"s{shard}/f{number:05}"


class Counted(Delegating):
    """A store that counts what is written to it, and the containers of each shard at any moment."""

    def __init__(self, store: FileStore) -> None:
        super().__init__(store)
        self.written = 0
        self.containers: Counter[str] = Counter()
        self.most = 0

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        etag = super().put(key, source, if_absent=if_absent)
        self._count(key, len(source) if isinstance(source, bytes) else source.stat().st_size)
        return etag

    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        etag = super().copy_ranges(key, pieces, if_absent=if_absent)
        self._count(key, sum(map(length_of, pieces)))
        return etag

    def delete(self, key: str) -> None:
        super().delete(key)
        self.containers[self._shard(key)] -= 1

    def _count(self, key: str, size: int) -> None:
        self.written += size
        self.containers[self._shard(key)] += 1
        self.most = max(self.most, *self.containers.values())

    @staticmethod
    def _shard(key: str) -> str:
        return key.rpartition("/")[2].partition("-")[0]


async def trickle(store: Counted, catalog_url: str, stop: threading.Event) -> int:
    """One file a part, a part a shard and round, and compaction in between, as a packer has it; bytes of all files."""
    day = datetime.now(UTC).date()
    retrying = Retrying(store)
    data = 0
    catalog = await open_catalog(catalog_url)
    try:
        async with Leases(catalog, "packer", 600.0) as leases:
            compactor = Compactor(retrying, catalog, CompactionSettings(delete_grace=GRACE_S))
            for number in range(max(PARTS.values())):
                for shard in [shard for shard, count in PARTS.items() if number < count]:
                    payload = content(shard, number)
                    data += len(payload)
                    raw = build(
                        [Item(name_of(shard, number).encode(), payload, encode_meta(meta_of(payload), len(payload)))]
                    )
                    await commit_part(retrying, catalog, await leases.of(day, shard), raw)
                await compactor.run_due(leases, [day])
                if stop.is_set():
                    break
    finally:
        await catalog.close()
    return data


class Reader:
    """Reads what a mount lists, again and again, past the kernel's cache and through it."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.read = 0
        self.seen: set[str] = set()
        self.errors: list[BaseException] = []
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._thread.join()

    def _loop(self) -> None:
        dice = Random(0)
        page = mmap.mmap(-1, 16 * 1024)
        try:
            while not self.ended.is_set():
                listed = [
                    f"{day}/{folder}/{file}"
                    for day in os.listdir(self.mount)
                    for folder in os.listdir(self.mount / day)
                    for file in os.listdir(self.mount / day / folder)
                ]
                # Not compared: a file can be in a listing twice, or not at all, when parts are merged and deleted while
                # it is read, for which the grace period is too short here. A look-up never fails.
                self.seen.update(listed)
                for path in dice.sample(sorted(self.seen), min(len(self.seen), 40)):
                    file = os.open(self.mount / path, os.O_RDONLY | dice.choice([0, os.O_DIRECT]))
                    try:
                        length = os.preadv(file, [page], 0)
                    finally:
                        os.close(file)
                    shard, number = path.rpartition("/s")[2].split("/f")
                    assert page[:length] == content(shard, int(number)), path
                    self.read += 1
        except BaseException as error:
            self.errors.append(error)
            self.ended.set()


@pytest.fixture
def quick() -> Iterator[Path]:
    """A directory in memory: the transactions of all parts, each made durable, would take minutes on a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.timeout(300)
def test_a_day_of_trickle_stays_cheap(quick: Path, tmp_path: Path, s3: S3Server, bucket: str) -> None:
    """Parts of one file each: at no moment more than 40 containers a shard, superseded ones included; no more
    than 6 times the data written; a mount that reads all along never sees an error; and a fresh one opens the day with
    at most 3 requests per container that is left."""
    store = Counted(FileStore(quick / "store", create=True))
    (quick / "store/.desfs.json").write_bytes(LAYOUT)
    log = tmp_path / "log"
    with (
        mounted(quick / "store", tmp_path / "mnt", f"refresh=0.2,memory=8M,log_file={log}") as mount,
        Reader(mount) as reader,
    ):
        data = asyncio.run(trickle(store, str(quick / "catalog.sqlite"), reader.ended))
        wait_until(lambda: reader.errors or len(reader.seen) == sum(PARTS.values()), "the last file")
        if reader.errors:
            raise reader.errors[0]
        assert reader.read > 1000
    assert "unexpected" not in log.read_text()
    assert store.most <= MOST
    assert store.written <= 6 * data
    left = sorted((quick / "store").rglob("*.des"))
    assert len(left) == store.containers.total()
    upload(s3, bucket, quick / "store")
    with (
        CountingProxy(s3.host, s3.port) as proxy,
        mounted(f"s3://{bucket}", tmp_path / "fresh", env=s3.environ(endpoint_url=proxy.url)) as mount,
    ):
        found = [path for path in mount.rglob("*") if path.is_file()]
        assert len(found) == sum(PARTS.values())
        assert len(proxy.requests) <= 3 * len(left)
        for path in Random(1).sample(found, 50):
            assert path.read_bytes() == content(path.parent.name[1:], int(path.name[1:]))
