"""Packers that die, and what is in a store and a spool afterwards.

`PackerForks` runs packers in processes forked from one that has everything imported and no threads, so that one costs a
tenth of a second, and kills them where a test says. `Shown` is what a store shows, read from its containers.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assignment.catalog import LIVE, ContainerRecord
from assignment.client import open_embedded
from des_format.layout import BIG_FILES_FOLDER
from des_format.reader import BaseReader
from des_format.shards import is_day, parse_container_name
from des_format.source import DEFAULT_TAIL
from desfs.container import StoreSource
from desfs.store.base import ObjectInfo, Store
from desfs.tree import DayTree, Member

PROGRAM = Path(sys.executable).with_name("desfs")
KILLED = -9


@dataclass(frozen=True, slots=True)
class Run:
    """How a forked packer ended: its status (KILLED: it died where it was told to), the effects that it began, and the
    line it would have printed."""

    status: int
    effects: tuple[str, ...]
    message: str

    @property
    def survived(self) -> bool:
        return self.status != KILLED


class Forks:
    """A process that runs orders, each in a fork of itself: one order a line, one answer a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def order(self, order: dict[str, Any]) -> Run:
        """How the fork that carries it out ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Run(answer["status"], tuple(answer["effects"]), answer["message"])


@contextmanager
def forks_of(module: str, environ: dict[str, str] | None = None) -> Iterator[Forks]:
    """Start a module as the process that forks; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environ or {})},
        text=True,
    )
    with process:
        try:
            yield Forks(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


class PackerForks:
    """The process that packers are forked from; see `packer_forks`."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def run(
        self,
        spool: Path,
        store: str,
        *,
        die_at: int | None = None,
        die_before: str = "",
        uid: int = 0,
        **settings: Any,
    ) -> Run:
        """`packer --once` with these settings, as user `uid`, killed before its `die_at`-th effect, counted from 1, or
        before the first whose name begins so."""
        return self._forks.order(
            {
                "spool": str(spool),
                "store": store,
                "die_at": die_at,
                "die_before": die_before,
                "uid": uid,
                "settings": settings,
            }
        )


@contextmanager
def packer_forks(environ: dict[str, str] | None = None) -> Iterator[PackerForks]:
    """Start the process that packers are forked from; it ends with the block."""
    with forks_of("tests.crash.packing", environ) as forks:
        yield PackerForks(forks)


@dataclass(frozen=True, slots=True)
class ShownFile:
    """A file as a mount shows it: the container it comes from, its bytes, its metadata."""

    container: str
    data: bytes
    meta: dict[str, Any]


@dataclass(slots=True)
class Shown:
    """All that a store shows: the files by their paths below the day, newest version; and its objects."""

    files: dict[str, ShownFile] = field(default_factory=dict)
    entries: dict[str, list[str]] = field(default_factory=dict)  # container key -> names in data order
    containers: dict[str, ObjectInfo] = field(default_factory=dict)
    external: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, store: Store) -> Shown:
        """Read a store. Raises: AssertionError for a file that is shown twice."""
        shown = cls()
        days: dict[str, list[ObjectInfo]] = {}
        for info in store.list().objects:
            folder, _, name = info.key.rpartition("/")
            if is_day(folder) and parse_container_name(name) is not None:
                days.setdefault(folder, []).append(info)
                shown.containers[info.key] = info
            elif BIG_FILES_FOLDER in info.key.split("/"):
                shown.external.append(info.key)
        for infos in days.values():
            shown._add_day(store, infos)
        return shown

    def _add_day(self, store: Store, infos: list[ObjectInfo]) -> None:
        readers: dict[str, BaseReader] = {}
        members = []
        for ordinal, info in enumerate(infos, 1):
            reader = readers[info.key] = BaseReader(StoreSource(store, info), None, DEFAULT_TAIL)
            name = parse_container_name(info.key.rpartition("/")[2])
            assert name is not None
            members.append(Member(ordinal, ordinal, reader.get_index(), info.key, name, info.mtime_ns))
        tree = DayTree(members)
        for member in members:
            reader = readers[member.key]
            self.entries[member.key] = reader.list_files()
            rows = member.index.shown().tolist()
            names = [member.index.entry(row).name for row in rows if tree.is_shown(member, row)]
            for path, data in reader.get_files_batch(names).items():
                assert path not in self.files, f"{path} is shown twice"
                self.files[path] = ShownFile(member.key, data, reader.get_meta(path))

    @property
    def contents(self) -> dict[str, bytes]:
        """The bytes of each file, under its path."""
        return {path: file.data for path, file in self.files.items()}

    @property
    def originals(self) -> dict[str, bytes]:
        """The bytes of each file under its original name, for stores that name files by their ids."""
        found: dict[str, bytes] = {}
        for file in self.files.values():
            name = file.meta["original_name"]
            assert name not in found, f"{name} is stored under two ids"
            found[name] = file.data
        return found


def catalog_rows(spool: Path) -> dict[str, ContainerRecord]:
    """The rows of a spool's catalog by their keys, of containers that are committed."""

    async def read() -> list[ContainerRecord]:
        async with await open_embedded(spool / ".desfs/catalog.sqlite", shard_bits=1) as client:
            return await client.catalog.list_containers(states=LIVE)

    return {record.object_key: record for record in asyncio.run(read())}


def spool_files(spool: Path) -> list[str]:
    """What programs have in a spool: files and folders, without the packer's own."""
    found = []
    for folder, folders, names in os.walk(spool):  # not rglob, which fails when a folder goes away meanwhile
        if folder == str(spool) and ".desfs" in folders:  # there is none before its first packer
            folders.remove(".desfs")
        found += [os.path.relpath(os.path.join(folder, name), spool) for name in (*folders, *names)]
    return sorted(found)


def unfinished(spool: Path) -> list[str]:
    """What a packer has left of its work: claims, journals, containers being built."""
    internal = spool / ".desfs"
    return sorted(
        os.path.join(folder, name)
        for top in ("claims", "work")
        for folder, folders, names in os.walk(internal / top)
        for name in (*(folders if top == "claims" else ()), *names)
    )


def rejected(spool: Path) -> dict[str, str]:
    """The files that were put aside, by their names, with their reasons."""
    found = {}
    for place in (spool / ".desfs/rejected").iterdir():
        for path in place.iterdir():
            if path.name != "reason.txt":
                found[path.name] = (place / "reason.txt").read_text(encoding="utf-8")
    return found
