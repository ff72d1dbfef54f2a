"""A store and its catalog in a directory, for tests of what changes them beside the packers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from assignment.catalog import Catalog, ContainerRecord, Lease
from des_format import DesWriter, placement_shard, shard_hex
from des_format.shards import part_name
from desfs.catalog_check.check import Compared, Comparison
from desfs.catalog_check.repair import Repair, Repaired
from desfs.cli.catalog_option import opened_catalog
from desfs.layout import LAYOUT_KEY
from desfs.removal.expire import Expired, expire, find_expired
from desfs.removal.rm import Removed, remove
from desfs.settings import ExpireSettings, RemovalSettings, VerifySettings
from desfs.store.base import ObjectInfo, Store
from desfs.store.file import FileStore
from desfs.verify import Finding
from tests.crash import Shown
from tests.mount.stores import meta_of, put_layout

T = TypeVar("T")
Effect = Callable[[str], None]

DAY = date(2020, 11, 20)  # long over, whatever the clock of the machine says
BITS = 2
LAYOUT = b'{"shard_bits": 2, "placement": "directory", "naming": "path"}'
BIG = 4096
OPTIONS: dict[str, Any] = {"wait": 0}  # the leases of those who died have passed: `World.end_leases`


def shard_of(name: str) -> str:
    """The shard of a name in this layout."""
    return shard_hex(placement_shard(name, BITS), BITS)


def file_id(number: int) -> str:
    """The id of the n-th file of a container here."""
    return f"DES_20261120_({number:012X}_00)"


def put_part(
    root: Path, key: str, files: Mapping[str, bytes], *, deleted: Sequence[str] = (), packed: bool = False
) -> Path:
    """A container under a key, as an import writes it, or with ids as a packer does; large files are external."""
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with DesWriter(path, big_file_threshold=BIG, external_prefix=f"{path.parent.name}/") as writer:
        for number, (name, data) in enumerate(files.items()):
            ids = {"id": file_id(number)} if packed else {}
            writer.add_file(name, data, meta_of(data, **ids))
        for name in deleted:
            writer.add_deleted(name)
    return path


def put_day(root: Path, files: Mapping[str, bytes], day: date = DAY, *, generation: int = 1) -> None:
    """The files of a day, a part for each shard, and the store's layout."""
    put_layout(root, LAYOUT)
    for shard in sorted(set(map(shard_of, files))):
        own = {name: data for name, data in files.items() if shard_of(name) == shard}
        put_part(root, f"{day}/{part_name(shard, generation)}", own, packed=True)


@dataclass(slots=True)
class World:
    """A directory store and a SQLite catalog, or another one by its URL."""

    folder: Path
    catalog: str = ""
    findings: list[Finding] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.folder / "store"

    @property
    def url(self) -> str:
        return self.catalog or str(self.folder / "catalog.sqlite")

    def store(self) -> Store:
        self.root.mkdir(parents=True, exist_ok=True)
        return FileStore(self.root)

    def run(self, work: Callable[[Catalog], Awaitable[T]]) -> T:
        """Do something with the catalog open."""

        async def main() -> T:
            async with opened_catalog(self.url, self.store()) as catalog:
                return await work(catalog)

        return asyncio.run(main())

    def end_leases(self, day: date = DAY) -> None:
        """As when the leases of those who died have passed."""

        async def work(catalog: Catalog) -> None:
            for each in await catalog.list_holders(day):
                lease = await catalog.acquire(day, each.shard, each.holder, 60.0)
                assert lease is not None
                await catalog.release(lease)

        self.run(work)

    def remove(
        self, *paths: str, store: Store | None = None, effect: Effect = lambda name: None, **how: Any
    ) -> Removed:
        settings = RemovalSettings(**OPTIONS)
        return self.run(lambda catalog: remove(store or self.store(), catalog, paths, settings, effect=effect, **how))

    def expire(self, older_than: int, *, effect: Effect = lambda name: None, **how: Any) -> Expired:
        settings = ExpireSettings(older_than=older_than, **OPTIONS)

        async def work(catalog: Catalog) -> Expired:
            store = self.store()
            return await expire(
                store, catalog, await find_expired(store, catalog, settings), settings, effect=effect, **how
            )

        return self.run(work)

    def compare(self, *, store: Store | None = None, **settings: Any) -> Compared:
        """What `verify --catalog` finds: `findings` are those of this call."""
        self.findings = []
        chosen = VerifySettings(**(OPTIONS | settings))
        return self.run(lambda catalog: Comparison(store or self.store(), catalog, chosen, self.findings.append).run())

    def repair(self, *, store: Store | None = None, effect: Effect = lambda name: None, **settings: Any) -> Repaired:
        """`left` is what could not be repaired in this call."""
        self.left = []
        chosen = VerifySettings(**(OPTIONS | settings))

        def left(key: str, reason: str) -> None:
            self.left.append((key, reason))

        return self.run(lambda catalog: Repair(store or self.store(), catalog, chosen, left=left, effect=effect).run())

    def rows(self) -> dict[str, ContainerRecord]:
        async def work(catalog: Catalog) -> dict[str, ContainerRecord]:
            return {record.object_key: record for record in await catalog.list_containers()}

        return self.run(work)

    def with_lease(
        self, shard: str, work: Callable[[Catalog, Lease], Awaitable[T]], *, day: date = DAY, lives: bool = False
    ) -> T:
        """Do something as a holder that dies, and whose lease has passed, or one that `lives` and keeps it."""

        async def main(catalog: Catalog) -> T:
            lease = await catalog.acquire(day, shard, "test", 60.0)
            assert lease is not None
            done = await work(catalog, lease)
            if not lives:
                await catalog.release(lease)
            return done

        return self.run(main)

    def shown(self) -> dict[str, bytes]:
        """All that a mount shows, of all days: the paths below the day."""
        return Shown.of(self.store()).contents

    def objects(self) -> dict[str, ObjectInfo]:
        """All but the layout."""
        return {info.key: info for info in self.store().list().objects if info.key != LAYOUT_KEY}

    def assert_agrees(self, **settings: Any) -> None:
        """Nothing at all is found to differ."""
        compared = self.compare(**settings)
        assert self.findings == []
        assert not compared.counts.total()
