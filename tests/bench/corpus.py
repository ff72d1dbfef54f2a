"""The files that the mounts are measured with: many, small, of log-normal sizes, random bytes, the same each time."""

from __future__ import annotations

import math
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from des_format.shards import is_day
from tests.bench.machine import clean_environ
from tests.servers import S3Server

DESFS = Path(sys.executable).with_name("desfs")
FOLDER_FILES = 200
MEDIAN = 8 * 1024  # bytes
MEAN = 12 * 1024
SEED = 20_251_125
_PACK_S = 1200.0
_CITIES = ("berlin", "lyon", "oslo", "porto", "turin", "ghent", "malmo", "graz", "brno", "cork")
_KINDS = ("camera", "lidar", "frames", "audio", "events")
_SUFFIXES = (".jpg", ".jpg", ".json", ".csv", ".npz")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tree of files on the local disk. `names` are relative to `root`, in path order."""

    root: Path
    names: list[str]
    size: int

    def pick(self, count: int, seed: int) -> list[str]:
        return random.Random(seed).sample(self.names, count)


def make_corpus(root: Path, files: int) -> Corpus:
    """Write the corpus: folders of 200 files."""
    chance = np.random.default_rng(SEED)
    sigma = math.sqrt(2 * math.log(MEAN / MEDIAN))
    sizes = np.maximum(1, chance.lognormal(math.log(MEDIAN), sigma, files)).astype(np.int64).tolist()
    names = []
    for number, size in enumerate(sizes):
        folder = number // FOLDER_FILES
        kind = folder % len(_KINDS)
        station = f"{_CITIES[folder // len(_KINDS) % len(_CITIES)]}-{folder // 50 + 1:02d}/{_KINDS[kind]}"
        stamp = 60_000 + number * 7 % 29_000
        name = f"{station}/{_KINDS[kind]}_20251125T{stamp:06d}_{number:06d}{_SUFFIXES[kind]}"
        path = root / name
        if number % FOLDER_FILES == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(chance.bytes(size))
        names.append(name)
    return Corpus(root, sorted(names), sum(sizes))


def past_day(back: int = 7) -> str:
    """The name of a closed day."""
    return (datetime.now(UTC) - timedelta(days=back)).date().isoformat()


@dataclass(frozen=True, slots=True)
class Packed:
    """What the packer did: seconds of the whole command, and its PUTs."""

    seconds: float
    puts: int
    containers: int


def pack(spool: Path, server: S3Server, url: str, endpoint_url: str, *options: str) -> Packed:
    """Pack a spool, which is empty afterwards. Its files have to have settled."""
    command: list[str | Path] = [DESFS, "packer", "--spool", spool, "--store", url, "--once", *options]
    began = time.perf_counter()
    done = subprocess.run(
        command,
        env=clean_environ() | server.environ(endpoint_url=endpoint_url),
        capture_output=True,
        text=True,
        timeout=_PACK_S,
        check=False,
    )
    seconds = time.perf_counter() - began
    said = re.search(r"into (\d+) containers with (\d+) PUTs", done.stdout)
    if done.returncode != 0 or said is None:
        raise RuntimeError(f"the packer ended with {done.returncode}: {done.stderr[-2000:]}{done.stdout}")
    return Packed(seconds, int(said[2]), int(said[1]))


def fill_spool(corpus: Corpus, spool: Path) -> None:
    """Copy a corpus into a spool, and wait until no packer would take it for unfinished."""
    shutil.copytree(corpus.root, spool, dirs_exist_ok=True)
    time.sleep(2.5)  # a packer's default for `settle`, and some more


def copy_to_day(server: S3Server, source: tuple[str, str], target: tuple[str, str], day: str) -> list[str]:
    """Copy a packed store, all of whose days become one, to another bucket and prefix; the keys of its containers."""
    client = server.client()
    bucket, prefix = source
    keys = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for each in page.get("Contents", ()):
            name = each["Key"].removeprefix(prefix)
            first, slash, rest = name.partition("/")
            moved = f"{target[1]}{day}/{rest}" if slash and is_day(first) else f"{target[1]}{name}"
            client.copy({"Bucket": bucket, "Key": each["Key"]}, target[0], moved)
            keys.append(moved)
    return [key for key in keys if key.endswith(".des")]
