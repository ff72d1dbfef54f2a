"""docs/semantics.md: Bytes with a checksum in their metadata are verified before anybody sees them.

Wherever a byte is flipped, in the store, in the disk cache or in Redis, nobody is given a wrong one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest

from des_format import DesWriter
from des_format.blocks import BLOCK, BlockSummer
from tests.mount.mounting import KINDS, mounted, outcome, source_of
from tests.mount.stores import meta_of
from tests.servers import RedisServer

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
KEY = f"{DAY}/0.des"
MIB = 1 << 20
DICE = Random(9)
SMALL = {f"d/f{n:03}": DICE.randbytes(2_000 + n) for n in range(200)}
LARGE = DICE.randbytes(17 * MIB + 1)
BLOCKS, WHOLE = DICE.randbytes(3 * BLOCK + 5), DICE.randbytes(2 * BLOCK + 5)
FILES: Mapping[str, bytes] = {**SMALL, "d/large": LARGE, "d/blocks": BLOCKS, "d/whole": WHOLE}


def put_store(root: Path) -> Path:
    """A store with files of every kind, each with the checksum that the packer, or another writer, gives it."""
    (root / DAY / "_bigFiles" / "d").mkdir(parents=True)
    with DesWriter(root / KEY, external_prefix=f"{DAY}/") as writer:
        for name, data in FILES.items():
            if name not in ("d/blocks", "d/whole"):
                writer.add_file(name, data, meta_of(data))
                continue
            summer = BlockSummer(len(data))
            summer.update(data)
            (root / DAY / "_bigFiles" / name).write_bytes(data)
            writer.add_external(name, len(data), meta_of(data, **(summer.meta() if name == "d/blocks" else {})))
    return root


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1 << at % 8]))


def read_or_nothing(file: int, at: int) -> bytes | None:
    """64 KiB of a file; None for EIO."""
    try:
        return os.pread(file, 64 * 1024, at)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None


def check(day: Path, damaged: set[str]) -> None:
    """Every file that is not damaged is read right, in the order of a scan and then by pieces at random; of those that
    are no piece is read that is wrong."""
    dice = Random(1)
    for name, data in FILES.items():
        if name in damaged:
            assert outcome((day / name).read_bytes) == "EIO", name
        else:
            assert (day / name).read_bytes() == data, name
    for name in [*damaged, *dice.sample(list(FILES), 20)]:
        data = FILES[name]
        for flags in (os.O_RDONLY, os.O_RDONLY | os.O_DIRECT):
            file = os.open(day / name, flags)
            try:
                for _ in range(4):
                    at = dice.randrange(len(data)) // 4096 * 4096
                    piece = read_or_nothing(file, at)
                    assert piece == data[at : at + 64 * 1024] or (name in damaged and piece is None), name
            finally:
                os.close(file)


@pytest.mark.parametrize("levers", ["auto", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_store(kind: str, levers: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """docs/semantics.md: Bytes with a checksum in their metadata are verified before anybody sees them. External files
    that have the checksums of their blocks are verified block by block."""
    store = put_store(tmp_path / "store")
    whole = (store / KEY).read_bytes()
    damaged = {"d/f000", "d/f100", "d/f199", "d/large", "d/blocks", "d/whole"}
    for name in sorted(damaged):
        data = FILES[name]
        if name in ("d/blocks", "d/whole"):
            flip(store / DAY / "_bigFiles" / name, BLOCK + 77)
        else:
            flip(store / KEY, whole.index(data) + len(data) // 2)
    with source_of(kind, store, request) as source:
        options = f"levers={levers},cache_dir={tmp_path / 'cache'}"
        for where in ("one", "two"):  # the second time what is good comes from the disk
            with mounted(source.url, tmp_path / where, options, env=source.env) as mount:
                check(mount / DAY, damaged)
                with (mount / DAY / "d/blocks").open("rb", 0) as file:
                    for block in (0, 2, 3):
                        assert os.pread(file.fileno(), 4096, block * BLOCK) == BLOCKS[block * BLOCK :][:4096]
                problems = (mount / ".desfs/problems").read_text()
                for name in damaged:
                    assert name in problems
        # Repaired in the store, nothing of the damage is left over.
    shutil.rmtree(store)
    put_store(store)
    with (
        source_of(kind, store, request) as source,
        mounted(source.url, tmp_path / "mnt", options, env=source.env) as mount,
    ):
        check(mount / DAY, set())


@pytest.mark.parametrize("what", ["cut", "swapped"])
def test_in_the_store_other_damage(what: str, tmp_path: Path) -> None:
    """External objects that have lost their end, or their bytes' order."""
    store = put_store(tmp_path / "store")
    for name in ("d/blocks", "d/whole"):
        path = store / DAY / "_bigFiles" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] if what == "cut" else data[BLOCK : 2 * BLOCK] + data[:BLOCK] + data[2 * BLOCK :])
    with mounted(store, tmp_path / "mnt") as mount:
        check(mount / DAY, {"d/blocks", "d/whole"})


@pytest.mark.parametrize("every", [4096, 100_003])
def test_in_the_disk_cache(every: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """docs/semantics.md: A wrong byte in a cache is never seen: it is a miss."""
    store, cache = put_store(tmp_path / "store"), tmp_path / "cache"
    with source_of("s3", store, request) as source:
        for round_number in range(3):
            with mounted(source.url, tmp_path / "mnt", f"cache_dir={cache}", env=source.env) as mount:
                check(mount / DAY, set())
            dice = Random(every + round_number)
            for path in sorted(path for path in cache.rglob("*") if path.suffix in (".idx", ".data", ".rec")):
                for at in range(dice.randrange(every), path.stat().st_size, every):
                    flip(path, at)


def test_in_the_disk_cache_of_a_mount_that_runs(tmp_path: Path) -> None:
    store, cache = put_store(tmp_path / "store"), tmp_path / "cache"
    with mounted(store, tmp_path / "mnt", f"cache_dir={cache},memory=2M") as mount:
        for number in range(3):
            check(mount / DAY, set())
            for path in sorted(cache.rglob("*.data")):
                for at in range(number, path.stat().st_size, 50_021):
                    flip(path, at)


def test_in_redis(redis: RedisServer, tmp_path: Path) -> None:
    store = put_store(tmp_path / "store")
    dice = Random(2)
    for _ in range(6):
        with mounted(store, tmp_path / "mnt", f"redis={redis.url}") as mount:
            check(mount / DAY, set())
        with redis.client() as client:
            keys = client.keys("*")
            assert keys
            for key in keys:
                value = client.get(key)
                assert isinstance(value, bytes)
                at = dice.randrange(len(value))
                client.set(key, value[:at] + bytes([value[at] ^ 1 << dice.randrange(8)]) + value[at + 1 :])
