"""The larger things that a mount is asked for: one file of a gigabyte, 100,000 files, a day of a million."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench import workloads as names
from tests.bench.corpus import Corpus
from tests.bench.machine import read_all, timed
from tests.bench.million import DAY, build_million_day
from tests.bench.systems import Desfs, LocalDisk, System
from tests.bench.workloads import Bench, tar
from tests.bench.world import DELAY_S, World

EXTERNAL_SIZE = 1024**3
EXTERNAL_NAME = "recording.bin"
LARGE_FILES = 100_000
_ROUND_TRIPS = 4


def make_external(world: World) -> Corpus:
    """A directory with one file of a gigabyte."""
    folder = world.work / "external"
    folder.mkdir()
    with (folder / EXTERNAL_NAME).open("wb") as file:
        for _ in range(EXTERNAL_SIZE // 2**24):
            file.write(os.urandom(2**24))
    return Corpus(folder, [EXTERNAL_NAME], EXTERNAL_SIZE)


@dataclass(slots=True)
class External:
    """One file of a gigabyte, read from its start to its end."""

    bench: Bench
    corpus: Corpus

    def measure_local(self) -> None:
        local = LocalDisk(self.corpus.root)
        read_all(self.corpus.root)
        self.bench.repeat(local, "external", lambda: self._read(local))

    def measure_desfs(self) -> None:
        world = self.bench.world
        store = world.pack_closed_day(self.corpus, "external")
        objects = world.raw.signed(world.server, store.bucket, f"{store.prefix}{store.tree}/_bigFiles/")
        assert sum(each.size for each in objects) == EXTERNAL_SIZE
        world.raw.download(objects, 8 * 1024 * 1024)
        self.bench.results.floors[names.EXTERNAL] = world.raw.fastest(objects, self.bench.runs)
        system = Desfs(store.url, world.env, store.tree)
        self.bench.repeat(system, "external", lambda: self._read(system))

    def measure(self, system: System) -> None:
        self.bench.introduce(system, is_peer=True)
        self.bench.repeat(system, "external", lambda: self._read(system))

    def _read(self, system: System) -> None:
        if isinstance(system, LocalDisk):
            self.bench.sample_local(names.EXTERNAL, system, ["cat", self.corpus.root / EXTERNAL_NAME])
            return
        with self.bench.cold(system) as mounted:
            path = mounted.tree / EXTERNAL_NAME
            self.bench.sample(names.EXTERNAL, system, mounted, lambda: timed(["cat", path], self.bench.cap_s))


@dataclass(slots=True)
class Large:
    """A scan of more files, and of more bytes than the memory that desfs takes."""

    bench: Bench
    corpus: Corpus

    def measure_desfs(self) -> None:
        world, runs = self.bench.world, self.bench.runs
        store = world.pack_closed_day(self.corpus, "large", "--max-batch-files", str(len(self.corpus.names)))
        read_all(self.corpus.root)
        local_s = median(timed(tar(self.corpus.root), self.bench.cap_s) for _ in range(runs))
        objects = world.raw.signed(world.server, store.bucket, f"{store.prefix}{store.tree}/")
        world.raw.download(objects, 8 * 1024 * 1024)
        raw_s = world.raw.fastest(objects, runs)
        self.bench.results.floors[names.TAR_LARGE] = raw_s + local_s + _ROUND_TRIPS * DELAY_S
        self.bench.note(f"100,000 files: raw download {raw_s:.2f} s, tar of the local disk, warm, {local_s:.2f} s")
        system = Desfs(store.url, world.env, store.tree)
        self.bench.repeat(system, "large", lambda: self._read(system))

    def measure(self, system: System) -> None:
        self.bench.introduce(system, is_peer=True)
        self.bench.repeat(system, "large", lambda: self._read(system))

    def _read(self, system: System) -> None:
        with self.bench.cold(system) as mounted:
            self.bench.sample(names.TAR_LARGE, system, mounted, lambda: timed(tar(mounted.tree), self.bench.cap_s))


def measure_million(bench: Bench, *, cached: bool) -> None:
    """A day of a million files in one directory, listed by fresh mounts."""
    world = bench.world
    world.say("building a day of 1,000,000 files")
    folder = world.work / "million"
    build_million_day(folder, flat=True)
    bucket = world.server.new_bucket("million")
    upload_tree(world, folder, bucket, "store/")
    shutil.rmtree(folder)
    url = f"s3://{bucket}/store"
    system = Desfs(url, world.env, DAY)
    bench.repeat(system, "million", lambda: _list(bench, system, names.MILLION_LS_F, "-f"))
    bench.repeat(system, "million", lambda: _list(bench, system, names.MILLION_LS_L, "-l"))
    if cached:
        cache = world.work / "million-cache"
        again = Desfs(url, world.env, DAY, "desfs cache_dir", (f"cache_dir={cache}",))
        with bench.cold(again) as mounted:
            timed(["ls", "-f", mounted.tree], bench.cap_s)
        bench.repeat(again, "million", lambda: _list_again(bench, again))


def _list(bench: Bench, system: System, workload: str, how: str) -> None:
    with bench.cold(system) as mounted:
        bench.sample(workload, system, mounted, lambda: timed(["ls", how, mounted.tree], bench.cap_s))


def _list_again(bench: Bench, system: System) -> None:
    bench.world.make_cold()
    bench.world.proxy.take()
    began = time.perf_counter()
    with system.mount(bench.world.work / "mnt") as mounted:
        timed(["ls", "-f", mounted.tree], bench.cap_s)
        seconds = time.perf_counter() - began
        bench.add_row(names.MILLION_AGAIN, system, seconds, mounted, bench.world.proxy.take())


def upload_tree(world: World, folder: Path, bucket: str, prefix: str) -> None:
    """Put every file below a folder into the store."""
    client = world.server.client()
    paths = [path for path in folder.rglob("*") if path.is_file()]

    def put(path: Path) -> None:
        client.upload_file(str(path), bucket, f"{prefix}{path.relative_to(folder)}")

    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(put, paths):
            pass
