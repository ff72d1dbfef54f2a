"""Histories of a spool beside a dict: what was written last, and closed, is what the store shows in the end.

A step of a program or of a packer at a time; packers die for real, before any of their effects (`tests.crash`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from desfs.store import open_store
from tests.crash import PackerForks, Shown, catalog_rows, packer_forks, spool_files, unfinished

PATHS = ["a", "b.txt", "d/a", "d/b", "e/f/g"]
SETTINGS: dict[str, Any] = {"settle": 0, "shard_bits": 2, "big_file_threshold": 64, "log_level": "error"}
FORKS: list[PackerForks] = []


@pytest.fixture(scope="module", autouse=True)
def forks() -> Iterator[None]:
    """One process to fork from for all histories."""
    with packer_forks() as started:
        FORKS.append(started)
        yield
        FORKS.clear()


class SpoolHistories(RuleBasedStateMachine):
    """Programs that write into a spool, and packers that take from it."""

    paths = st.sampled_from(PATHS)
    contents = st.binary(max_size=8) | st.binary(min_size=64, max_size=70)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.spool = Path(self.folder.name) / "spool"
        self.store = Path(self.folder.name) / "store"
        self.spool.mkdir()
        # The versions of each path that were left in the spool at some time, oldest first: one that is written over, or
        # deleted, before it is taken is none.
        self.versions: dict[str, list[bytes]] = {path: [] for path in PATHS}
        self.held: dict[str, int] = {}  # files that a program holds open
        self.others: list[int] = []  # open files that have no name any more
        self.kept_folders: set[str] = set()
        self.emptied_by_programs: set[str] = set()  # perhaps: the packer removes what it has emptied itself

    @initialize(older=st.booleans())
    def begin(self, older: bool) -> None:
        if older:
            self.write("a", b"older")
            self.pack()

    def teardown(self) -> None:
        for descriptor in [*self.held.values(), *self.others]:
            os.close(descriptor)
        try:
            self.held.clear()
            self.pack()
            left = set(spool_files(self.spool))
            assert self.kept_folders <= left <= self.kept_folders | self.emptied_by_programs
            assert unfinished(self.spool) == []
            assert self.shown() == {path: versions[-1] for path, versions in self.versions.items() if versions}
            rows = catalog_rows(self.spool)
            assert all((self.store / key).stat().st_size == row.size for key, row in rows.items())
        finally:
            self.folder.cleanup()

    def shown(self) -> dict[str, bytes]:
        if not self.store.exists():
            return {}
        return Shown.of(open_store(str(self.store))).contents

    def in_spool(self, path: str) -> bool:
        return (self.spool / path).exists()

    def make_folder(self, path: str) -> Path:
        target = self.spool / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    # --- programs ------------------------------------------------------------------------------------------------

    @rule(path=paths, content=contents)
    def write(self, path: str, content: bytes) -> None:
        if self.in_spool(path):
            self.versions[path].pop()
        self.make_folder(path).write_bytes(content)
        self.versions[path].append(content)

    @rule(path=paths, content=contents)
    def append(self, path: str, content: bytes) -> None:
        before = self.versions[path].pop() if self.in_spool(path) else b""
        with open(self.make_folder(path), "ab") as file:
            file.write(content)
        self.versions[path].append(before + content)

    @rule(path=paths, content=contents)
    def rename_in(self, path: str, content: bytes) -> None:
        outside = Path(self.folder.name) / "outside"
        outside.write_bytes(content)
        if self.in_spool(path):
            self.versions[path].pop()
        os.replace(outside, self.make_folder(path))
        self.lose_name(path)
        self.versions[path].append(content)

    @rule(path=paths)
    def delete(self, path: str) -> None:
        if self.in_spool(path):
            (self.spool / path).unlink()
            self.lose_name(path)
            self.versions[path].pop()
            self.emptied_by_programs |= {str(above) for above in Path(path).parents}

    def lose_name(self, path: str) -> None:
        if path in self.held:
            self.others.append(self.held.pop(path))

    @rule(path=paths)
    def hold_open(self, path: str) -> None:
        if path not in self.held:
            if not self.in_spool(path):
                self.versions[path].append(b"")
            self.held[path] = os.open(self.make_folder(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), content=contents)
    def write_to_held(self, data: st.DataObject, content: bytes) -> None:
        path = data.draw(st.sampled_from(sorted(self.held)))
        os.write(self.held[path], content)
        self.versions[path][-1] += content

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        os.close(self.held.pop(data.draw(st.sampled_from(sorted(self.held)))))

    @rule()
    def make_a_folder_of_its_own(self) -> None:
        (self.spool / "kept").mkdir(exist_ok=True)
        self.kept_folders.add("kept")

    # --- packers -------------------------------------------------------------------------------------------------

    @rule()
    def pack(self) -> None:
        run = FORKS[0].run(self.spool, str(self.store), **SETTINGS)
        assert run.status == 0, run
        assert unfinished(self.spool) == []
        left = [path for path in spool_files(self.spool) if (self.spool / path).is_file()]
        assert left == sorted(self.held), run
        expected = {}
        for path, versions in self.versions.items():
            packed = versions[:-1] if path in self.held else versions
            if packed:
                expected[path] = packed[-1]
        assert self.shown() == expected

    @rule(die_at=st.integers(1, 40))
    def pack_and_die(self, die_at: int) -> None:
        run = FORKS[0].run(self.spool, str(self.store), die_at=die_at, **SETTINGS)
        assert run.status in (0, -9), run

    @invariant()
    def held_files_stay(self) -> None:
        for path in self.held:
            assert self.in_spool(path)


SpoolHistories.TestCase.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSpoolHistories = SpoolHistories.TestCase
