"""What is done with a mount, and measured: each session is one fresh mount and what is asked of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from botocore.exceptions import BotoCoreError, ClientError

from des_format.shards import placement_shard
from tests.bench.corpus import Corpus
from tests.bench.machine import TooSlow, timed
from tests.bench.proxy import Traffic
from tests.bench.report import Results, Row
from tests.bench.systems import LocalDisk, Mounted, System
from tests.bench.world import World

READY = "mount to ready"
LS_COLD, LS_WARM = "ls -lR, cold", "ls -lR, warm"
TAR_COLD, TAR_WARM = "tar | cat, cold", "tar | cat, warm"
CP_COLD, CP_WARM = "cp -r, cold", "cp -r, warm"
RANDOM_1, RANDOM_16 = "200 random files, 1 reader", "1,000 random files, 16 readers"
ALL_32 = "all files, 32 readers"
CAT_ONE = "cat of one file, indexes warm"
CP_FOLDER = "cp -r of 200 files, indexes warm"
EXTERNAL = "1 GiB, cold"
TAR_LARGE = "tar | cat of 100,000 files, cold"
MILLION_LS_F, MILLION_LS_L = "ls -f of 1,000,000 files, cold", "ls -l of 1,000,000 files, cold"
MILLION_AGAIN = "mount and ls -f of 1,000,000 files, disk cache"
PACKING = "packing"
ORDER = (
    *(READY, LS_COLD, LS_WARM, TAR_COLD, TAR_WARM, CP_COLD, CP_WARM, RANDOM_1, RANDOM_16, ALL_32, CAT_ONE, CP_FOLDER),
    *(EXTERNAL, TAR_LARGE, MILLION_LS_F, MILLION_LS_L, MILLION_AGAIN, PACKING),
)

SHARD_BITS = 4
WARM_RUNS = 5
CATS = 3
NOT_QUICK_S = 5.0  # what is quicker is worth more repetitions
SLOW_S = 60.0  # what takes longer is measured once: a median is for what is shorter than the machine's moods
_STRAYS_S = 0.2  # for requests that go on after the reader has what it wanted: they are its requests too
_SEED = 7


@dataclass(slots=True)
class _Sample:
    seconds: float
    requests: int
    received: int
    rss: int
    container_gets: int = 0
    capped: bool = False
    fuse: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Bench:
    """Runs sessions and keeps what they measured. `cap_s` is the deadline of each command."""

    world: World
    results: Results
    runs: int
    cap_s: float
    wanted: Callable[[str], bool]
    _samples: dict[tuple[str, str], list[_Sample]] = field(default_factory=dict)
    _systems: dict[str, tuple[System, bool]] = field(default_factory=dict)

    # --- sessions -----------------------------------------------------------------------------------------------

    def measure(
        self, system: System, corpus: Corpus, *, is_peer: bool = False, only: frozenset[str] = frozenset()
    ) -> None:
        """Every session of the small corpus, or `only` some. A system that fails in one is measured in the others."""
        self.introduce(system, is_peer=is_peer)
        sessions: dict[str, Callable[[System, Corpus], None]] = {
            "ready": self._ready,
            "ls": self._list,
            "cat": self._cat,
            "tar": self._tar,
            "cp": self._copy,
            "random": self._random,
            "all": self._all,
        }
        for name, session in sessions.items():
            if self.wanted(name) and (not only or name in only):
                self.repeat(system, name, lambda session=session: session(system, corpus))  # type: ignore[misc]

    def repeat(self, system: System, what: str, session: Callable[[], None]) -> None:
        """Run a session as often as wanted; one that takes long, or fails, only once."""
        for run in range(1 if what == "ready" else self.runs):
            self.world.say(f"{system.name}: {what}" + (f", {run + 1} of {self.runs}" if what != "ready" else ""))
            began = time.monotonic()
            done = False
            with self.guard(f"{system.name}, {what}"):
                session()
                done = True
            if not done or time.monotonic() - began > SLOW_S:
                return

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """What fails is a note in the results, and the benchmark goes on."""
        try:
            yield
        except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError, BotoCoreError, ClientError) as error:
            self.note(f"{what}: {type(error).__name__}: {str(error)[:400]}")

    def note(self, what: str) -> None:
        """Say something, and keep it with the results."""
        self.world.say(what)
        self.results.notes.append(what)

    def introduce(self, system: System, *, is_peer: bool) -> None:
        """Say what a system is, before it is measured."""
        self._systems[system.name] = (system, is_peer)

    def sample_local(self, workload: str, system: System, command: Sequence[str | Path]) -> None:
        """Measure a command on the local disk."""
        self._add(workload, system, _Sample(timed(command, self.cap_s), 0, 0, 0))

    def measure_local(self, system: System, corpus: Corpus) -> None:
        """The local disk, warm: what everything is held against."""
        self._systems[system.name] = (system, False)
        tree = corpus.root
        self.world.say(f"{system.name}: warm")
        for _ in range(WARM_RUNS):
            for workload, command in ((LS_WARM, _ls(tree)), (TAR_WARM, tar(tree))):
                self.sample_local(workload, system, command)
            self._add(CP_WARM, system, _Sample(self._cp(tree), 0, 0, 0))

    def _ready(self, system: System, corpus: Corpus) -> None:
        for run in range(self.runs + 1):
            self.world.proxy.take()
            with self._mounted(system) as mounted:
                traffic = self.world.proxy.take()
                if run:  # the first reads the programs from the disk
                    self._add(READY, system, _sample(mounted.ready_s, traffic, mounted))

    def _list(self, system: System, corpus: Corpus) -> None:
        with self.cold(system) as mounted:
            self.sample(LS_COLD, system, mounted, lambda: timed(_ls(mounted.tree), self.cap_s))
            self.sample(LS_WARM, system, mounted, lambda: timed(_ls(mounted.tree), self.cap_s))
            folders = _one_folder_a_shard(corpus)
            folder = mounted.tree / folders.pop()
            self.sample(CP_FOLDER, system, mounted, lambda: self._cp(folder))

    def _cat(self, system: System, corpus: Corpus) -> None:
        """One file of a container that nobody has read from, its index in memory: a mount for each."""
        for name in _one_folder_a_shard(corpus)[:CATS]:
            files = [each for each in corpus.names if each.startswith(f"{name}/")]
            file = files[len(files) // 2]
            with self.cold(system) as mounted:
                timed(_ls(mounted.tree), self.cap_s)
                self.sample(CAT_ONE, system, mounted, lambda file=file: timed(["cat", mounted.tree / file], self.cap_s))  # type: ignore[misc]

    def _tar(self, system: System, corpus: Corpus) -> None:
        with self.cold(system) as mounted:
            done = self.sample(TAR_COLD, system, mounted, lambda: timed(tar(mounted.tree), self.cap_s))
            if done and not system.one_object:
                self._warm(system, mounted)

    def _copy(self, system: System, corpus: Corpus) -> None:
        with self.cold(system) as mounted:
            self.sample(CP_COLD, system, mounted, lambda: self._cp(mounted.tree))

    def _random(self, system: System, corpus: Corpus) -> None:
        for workload, count, readers in ((RANDOM_1, 200, 1), (RANDOM_16, 1000, 16)):
            names = corpus.pick(min(count, len(corpus.names)), _SEED)
            with self.cold(system) as mounted:
                self.sample(
                    workload,
                    system,
                    mounted,
                    lambda tree=mounted.tree, readers=readers, names=names: self._read(tree, readers, names),  # type: ignore[misc]
                )

    def _all(self, system: System, corpus: Corpus) -> None:
        names = corpus.pick(len(corpus.names), _SEED)
        with self.cold(system) as mounted:
            done = self.sample(ALL_32, system, mounted, lambda: self._read(mounted.tree, 32, names))
            # With an object for each file this is the quick way to have everything in the caches.
            if done and system.one_object and len(self._samples.get((TAR_WARM, system.name), ())) < WARM_RUNS:
                self._warm(system, mounted)

    def _warm(self, system: System, mounted: Mounted) -> None:
        for run in range(WARM_RUNS):
            began = time.monotonic()
            if not self.sample(TAR_WARM, system, mounted, lambda: timed(tar(mounted.tree), self.cap_s)):
                return
            self.sample(CP_WARM, system, mounted, lambda: self._cp(mounted.tree))
            seconds = time.monotonic() - began
            if seconds > SLOW_S or (seconds > NOT_QUICK_S and run + 1 >= self.runs):
                return

    # --- measuring ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def cold(self, system: System) -> Iterator[Mounted]:
        """A fresh mount over caches that were dropped."""
        self.world.make_cold()
        with self._mounted(system) as mounted:
            yield mounted

    @contextlib.contextmanager
    def _mounted(self, system: System) -> Iterator[Mounted]:
        with system.mount(self.world.work / "mnt") as mounted:
            yield mounted

    def sample(self, workload: str, system: System, mounted: Mounted, action: Callable[[], float]) -> bool:
        """Measure an action, which gives its seconds; False when it was stopped at the deadline."""
        # Reading the counters makes requests: the first two readings tell how many.
        readings = [mounted.fuse_requests(), mounted.fuse_requests()]
        self.world.proxy.take()
        capped = False
        try:
            seconds = action()
        except TooSlow:
            seconds, capped = self.cap_s, True
        time.sleep(_STRAYS_S)
        traffic = self.world.proxy.take()
        readings.append(mounted.fuse_requests())
        first, before, after = readings
        fuse = {name: int(after[name] - 2 * before.get(name, 0) + first.get(name, 0)) for name in after}
        fuse = {name: count for name, count in fuse.items() if count > 0}
        sample = _sample(seconds, traffic, mounted)
        sample.capped, sample.fuse = capped, fuse
        self._add(workload, system, sample)
        return not capped

    def add_row(self, workload: str, system: System, seconds: float, mounted: Mounted, traffic: Traffic) -> None:
        """Keep what was measured elsewhere."""
        self._add(workload, system, _sample(seconds, traffic, mounted))

    def _add(self, workload: str, system: System, sample: _Sample) -> None:
        samples = self._samples.setdefault((workload, system.name), [])
        samples.append(sample)
        _, is_peer = self._systems.setdefault(system.name, (system, False))
        row = self.results.of(workload, system.name)
        if row is None:
            row = Row(workload, system.name, [], is_peer=is_peer, one_object=system.one_object)
            self.results.rows.append(row)
        row.seconds = [each.seconds for each in samples]
        row.capped = any(each.capped for each in samples)
        row.fuse = _medians([each.fuse for each in samples])
        if isinstance(system, LocalDisk):
            return
        row.requests = round(median(each.requests for each in samples))
        row.container_gets = max(each.container_gets for each in samples)
        row.received = round(median(each.received for each in samples))
        row.rss = max(each.rss for each in samples)

    def _cp(self, tree: Path) -> float:
        with self.world.copy_target() as target:
            return timed(["cp", "-r", tree, target], self.cap_s)

    def _read(self, tree: Path, readers: int, names: list[str]) -> float:
        return read_by(readers, tree, names, self.cap_s)


def read_by(readers: int, tree: Path, names: list[str], limit_s: float) -> float:
    """Read files by so many processes; seconds from their common start to the end of the last. Raises: TooSlow."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.readers", tree, str(readers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        printed, errors = process.communicate("\n".join(names), timeout=limit_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        if isinstance(error, subprocess.TimeoutExpired):
            raise TooSlow(f"{readers} readers") from error
        raise
    if process.returncode != 0:
        raise RuntimeError(f"readers failed: {errors[-2000:]}")
    return float(printed)


def _sample(seconds: float, traffic: Traffic, mounted: Mounted) -> _Sample:
    gets = sum(each.kind == "GET" and each.path.endswith(".des") for each in traffic.requests)
    return _Sample(seconds, len(traffic.requests), traffic.received, mounted.peak_rss(), gets)


def _medians(counts: list[dict[str, int]]) -> dict[str, int]:
    names = {name for each in counts for name in each}
    return {name: round(median(each.get(name, 0) for each in counts)) for name in names}


def _ls(tree: Path) -> list[str | Path]:
    return ["ls", "-lR", tree]


def tar(tree: Path) -> list[str | Path]:
    """The command that reads a tree as a backup does."""
    # Not to /dev/null itself: GNU tar would not read the files then.
    return ["bash", "-o", "pipefail", "-c", 'tar cf - -C "$0" "$1" | cat >/dev/null', tree.parent, tree.name]


def _one_folder_a_shard(corpus: Corpus) -> list[str]:
    """A folder of each shard that has one: reading it leaves the other containers alone."""
    found: dict[int, str] = {}
    for name in corpus.names:
        found.setdefault(placement_shard(name, SHARD_BITS), name.rpartition("/")[0])
    return list(found.values())
