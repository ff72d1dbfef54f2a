"""A day of a million files in 256 shards, as the packer lays it out, and what listing it costs.

`python -m tests.bench.million ROOT [flat]` builds the store alone.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from decimal import Decimal
from functools import partial
from hashlib import sha256
from pathlib import Path

import google_crc32c

from des_format import DesWriter, placement_shard, shard_hex

DAY = "2026-11-01"
FILES = 1_000_000
FILES_IN_A_DIRECTORY = 1000
SHARD_BITS = 8
LAYOUT = b'{"shard_bits": %d, "placement": "directory", "naming": "path"}' % SHARD_BITS
_BEGAN_NS = 1_793_491_200_000_000_000  # 2026-11-01, UTC


def build_million_day(root: Path, *, flat: bool = False, files: int = FILES) -> None:
    """Write the store: `files` small files in directories of a thousand, or all in the day itself; with the metadata
    that the packer writes. Uses all cores: about 20 s with two."""
    (root / DAY).mkdir(parents=True)
    (root / ".desfs.json").write_bytes(LAYOUT)
    shards: dict[str, list[int]] = {f"{n:02x}": [] for n in range(1 << SHARD_BITS)}
    folders: dict[str, str] = {}  # of which all names are placed alike
    for number in range(files):
        name = _name(number, flat)
        folder, slash, _ = name.rpartition("/")
        if not slash:
            shard = _shard(name)
        else:
            shard = folders.get(folder) or folders.setdefault(folder, _shard(name))
        shards[shard].append(number)
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        for _ in processes.map(partial(_write, root / DAY, flat), shards, shards.values()):
            pass


def _shard(name: str) -> str:
    return shard_hex(placement_shard(name, SHARD_BITS), SHARD_BITS)


def _name(number: int, flat: bool) -> str:
    if flat:
        return f"reading-{number:07d}.json"
    return f"station-{number // FILES_IN_A_DIRECTORY:04d}/reading-{number % FILES_IN_A_DIRECTORY:04d}.json"


def _write(day: Path, flat: bool, shard: str, numbers: list[int]) -> None:
    with DesWriter(day / f"{shard}.des") as writer:
        for name, number in sorted((_name(number, flat), number) for number in numbers):
            data = b'{"reading": %d}' % number
            meta = {
                "mtime": Decimal(_BEGAN_NS + number * 86_371_234).scaleb(-9).normalize(),
                "mode": 0o644,
                "sha256": sha256(data).hexdigest(),
                "crc32c": f"{google_crc32c.value(data):08x}",
                "id": f"{number << 12:016x}",
            }
            writer.add_file(name, data, meta)


if __name__ == "__main__":
    build_million_day(Path(sys.argv[1]), flat=sys.argv[2:] == ["flat"])
