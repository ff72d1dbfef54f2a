"""Random histories of disk caches that share a folder, against a dict: what is given is right, and what was put, and
neither damaged nor evicted, is given."""

from __future__ import annotations

import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from desfs.disk_cache import SEGMENT, DiskCache, ObjectVersion

# Adjacent blocks, around the border of two segments and elsewhere.
EDGES = [0, 700, 1500, 4096, 9000, SEGMENT - 3000, SEGMENT - 10, SEGMENT + 50, SEGMENT + 4000, 3 * SEGMENT]
BOUNDS = [(start, stop) for start, stop in pairwise(EDGES) if stop - start < 10_000]
VERSIONS = [
    ObjectVersion("s3://b", "k", "1"),
    ObjectVersion("s3://b", "k", "2"),
    ObjectVersion("s3://b", "k/1", "1"),
]
LARGE = 100_000_000

versions = st.sampled_from(VERSIONS)
bounds = st.lists(st.sampled_from(BOUNDS), min_size=1, max_size=5)


def content(version: ObjectVersion, start: int, stop: int) -> bytes:
    return (f"{version.key} {version.etag} {start} " * (stop - start)).encode()[: stop - start]


class SharedCaches(RuleBasedStateMachine):
    """Several caches over one folder, as processes would have them; each may begin anew at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="disk-cache-model-"))
        self.caches: list[DiskCache] = []
        self.kept: set[tuple[ObjectVersion, int, int]] = set()  # what must be given

    @initialize(count=st.integers(1, 3))
    def begin(self, count: int) -> None:
        self.caches = [DiskCache(self.folder, LARGE) for _ in range(count)]

    @rule(which=st.integers(0, 2), version=versions, bounds=bounds)
    def put(self, which: int, version: ObjectVersion, bounds: list[tuple[int, int]]) -> None:
        cache = self.caches[which % len(self.caches)]
        cache.put(version, [(start, stop, content(version, start, stop)) for start, stop in bounds])
        self.kept.update((version, start, stop) for start, stop in bounds)

    @rule(which=st.integers(0, 2), version=versions, bounds=bounds)
    def get(self, which: int, version: ObjectVersion, bounds: list[tuple[int, int]]) -> None:
        found = self.caches[which % len(self.caches)].get_many(version, bounds)
        for (start, stop), block in zip(bounds, found, strict=True):
            assert block in (None, content(version, start, stop))
            if (version, start, stop) in self.kept:
                assert block is not None, (start, stop)

    @rule(which=st.integers(0, 2), version=versions, first=st.integers(0, 8), count=st.integers(1, 4))
    def get_adjacent(self, which: int, version: ObjectVersion, first: int, count: int) -> None:
        edges = EDGES[first : first + count + 1]
        block = self.caches[which % len(self.caches)].get(version, edges[0], edges[-1])
        if block is not None:
            assert block == b"".join(content(version, start, stop) for start, stop in pairwise(edges))

    @rule(which=st.integers(0, 2))
    def restart(self, which: int) -> None:
        self.caches[which % len(self.caches)] = DiskCache(self.folder, LARGE)

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.files()))
        how = data.draw(st.sampled_from(["flip", "cut", "append", "remove"]))
        size = path.stat().st_size
        if how == "remove":
            path.unlink()
        elif how == "append":
            with path.open("ab") as file:
                file.write(data.draw(st.binary(min_size=1, max_size=90)))
        elif how == "cut":
            with path.open("r+b") as file:
                file.truncate(data.draw(st.integers(0, size)))
            # Who has it open would not see what is appended below the place that it has read up to.
            self.caches = [DiskCache(self.folder, LARGE) for _ in self.caches]
        elif size:
            at = data.draw(st.sampled_from([0, size - 1]) | st.integers(0, size - 1))
            with path.open("r+b") as file:
                file.seek(at)
                old = file.read(1)
                file.seek(at)
                file.write(bytes([old[0] ^ data.draw(st.integers(1, 255))]))
        self.kept.clear()

    @rule()
    def evict(self) -> None:
        small = DiskCache(self.folder, 20_000)
        small.folder.wait_idle()
        self.kept.clear()

    @invariant()
    def no_fault(self) -> None:
        assert all(cache.state()["fault"] is None for cache in self.caches)

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.suffix in (".data", ".rec"))

    def teardown(self) -> None:
        for cache in self.caches:
            cache.folder.wait_idle()
        shutil.rmtree(self.folder)


TestSharedCaches = SharedCaches.TestCase
TestSharedCaches.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
