"""Large files through the packer: the checksums of their blocks are in the metadata, and hold for what is stored."""

from __future__ import annotations

import os
import random
from hashlib import sha256
from pathlib import Path

import google_crc32c
import pytest

from des_format import CorruptEntry
from des_format.blocks import BLOCK, block_bounds, block_count
from des_format.shards import is_day, parse_container_name
from desfs.container import LoadedContainer, load_container, read_external
from desfs.store import open_store
from desfs.store.base import S3Options, Store
from tests.mount.test_packed import pack, store_of

MIB = 1024 * 1024
KINDS = pytest.mark.parametrize("kind", ["file", pytest.param("s3", marks=pytest.mark.s3)])


def write(path: Path, size: int, seed: int) -> str:
    """A file of random pieces; its SHA-256."""
    digest = sha256()
    seeded = random.Random(seed)
    pieces = [seeded.randbytes(MIB) for _ in range(3)]
    with open(path, "wb") as file:
        for at in range(0, size, MIB):
            piece = (at.to_bytes(8, "big") + pieces[at // MIB % 3][8:])[: size - at]
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def opened(url: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return open_store(url, S3Options(endpoint_url=environ.get("AWS_ENDPOINT_URL")))


def containers(store: Store) -> list[LoadedContainer]:
    return [
        load_container(store, info)
        for info in store.list().objects
        if is_day(info.key.rpartition("/")[0]) and parse_container_name(info.key.rpartition("/")[2])
    ]


@KINDS
def test_every_block_of_a_packed_file_has_its_checksum(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/format.md: the packer writes `crc32c_blocks` for a payload of more than 4 MiB that is an object of its own.
    It never has the payload in memory whole (peak below 200 MiB)."""
    spool = tmp_path / "spool"
    spool.mkdir()
    sizes = {"large": 70 * MIB, "odd": 65 * MIB + 12_345, "inside": 5 * MIB}
    digests = {name: write(spool / name, size, seed) for seed, (name, size) in enumerate(sizes.items())}
    with store_of(kind, tmp_path, request) as (url, environ):
        assert pack(spool, url, environ, "--big-file-threshold", "64M", "--shard-bits", "1") < 200 * MIB
        store = opened(url, environ, monkeypatch)
        try:
            checked = {}
            for loaded in containers(store):
                index, meta = loaded.index, loaded.meta
                assert loaded.problems == ()
                for row in index.shown().tolist():
                    name, size = index.entry(row).name, int(index.data_length[row])
                    assert size == sizes[name]
                    checksums = meta.external_blocks.get(row)
                    assert meta.block_checksums(index, row) is checksums
                    if checksums is None:
                        continue
                    assert checksums.block_size == BLOCK
                    digest = sha256()
                    for number in range(block_count(size, BLOCK)):
                        bounds = block_bounds(size, BLOCK, number)
                        key = meta.external_key.get(row)
                        block = bytes(read_external(store, loaded.info.key, name, key, *bounds, size)[0].data)
                        checksums.check(number, block, name)
                        digest.update(block)
                        with pytest.raises(CorruptEntry, match=rf"{name}: block {number} at byte {number * BLOCK}: "):
                            checksums.check(number, block[:-1] + bytes([block[-1] ^ 1]), name)
                    checked[name] = digest.hexdigest()
            assert checked == {name: digests[name] for name in ("large", "odd")}
        finally:
            store.close()


def test_a_small_file_that_is_an_object_of_its_own_has_one_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload of one block has only `crc32c`, which is that block's."""
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "small").write_bytes(b"x" * 5000)
    url = (tmp_path / "store").as_uri()
    pack(spool, url, dict(os.environ), "--big-file-threshold", "4K")
    store = opened(url, {}, monkeypatch)
    (loaded,) = containers(store)
    store.close()
    assert loaded.meta.external_blocks == {}
    checksums = loaded.meta.block_checksums(loaded.index, 0)
    assert checksums is not None
    assert bytes(checksums.crc32c) == google_crc32c.value(b"x" * 5000).to_bytes(4, "little")
    checksums.check(0, b"x" * 5000)
