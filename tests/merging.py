"""A store and its catalog whose shards are merged, for tests: parts are put and committed as a packer does."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from assignment.catalog import Catalog, ContainerRecord, Lease
from assignment.opening import open_catalog
from des_format import DesWriter
from desfs.merging.leases import held
from desfs.merging.seal import Sealer, Summary
from desfs.settings import SealSettings
from desfs.store import open_store
from desfs.store.base import S3Options
from desfs.store.retrying import Retrying
from tests.crash import Shown
from tests.mount.stores import meta_of

T = TypeVar("T")
Effect = Callable[[str], None]

DAY = date(2020, 2, 29)
BIG = 4096  # bytes: files of this size are external where a test wants some
LAYOUT = b'{"shard_bits": 4, "placement": "directory", "naming": "path"}'


def build_part(files: Mapping[str, bytes], deleted: Sequence[str] = (), *, first_id: str = "") -> bytes:
    """A container as an import writes it, without external files, or as a packer does, whose first file has an id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.des"
        with DesWriter(path) as writer:
            for name, data in files.items():
                given = {"id": first_id} if first_id and not writer.file_count else {}
                writer.add_file(name, data, meta_of(data, mtime=1_600_000_000, mode=0o640, **given))
            for name in deleted:
                writer.add_deleted(name)
        return path.read_bytes()


async def commit_part(
    store: Retrying,
    catalog: Catalog,
    lease: Lease,
    raw: bytes,
    *,
    files: int = 1,
    external: Mapping[str, bytes] | None = None,
) -> ContainerRecord:
    """Put a container under the next generation, and commit it."""
    begun = await catalog.begin_part(lease)
    for name, data in (external or {}).items():
        await asyncio.to_thread(store.put, f"{lease.day}/_bigFiles/{name}", data)
    etag = await asyncio.to_thread(store.put, begun.object_key, raw)
    record = ContainerRecord(
        object_key=begun.object_key,
        day=lease.day,
        shard=lease.shard,
        generation=begun.generation,
        size=len(raw),
        files=files,
        etag=etag,
    )
    await catalog.commit_container(lease, record)
    return record


@dataclass(slots=True)
class World:
    """A store by its URL and a SQLite catalog in `folder`; closed by nobody: each call opens what it needs."""

    folder: Path
    store_url: str = ""
    options: S3Options = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        if not self.store_url:
            self.store_url = str(self.folder / "store")

    @property
    def catalog_url(self) -> str:
        return str(self.folder / "catalog.sqlite")

    def store(self) -> Retrying:
        return open_store(self.store_url, self.options, create=True)

    def run(self, work: Callable[[Retrying, Catalog], Awaitable[T]]) -> T:
        """Do something with store and catalog open."""

        async def main() -> T:
            store = self.store()
            catalog = await open_catalog(self.catalog_url)
            try:
                return await work(store, catalog)
            finally:
                await catalog.close()
                store.close()

        return asyncio.run(main())

    def under_lease(self, shard: str, work: Callable[[Retrying, Catalog, Lease], Awaitable[T]], day: date = DAY) -> T:
        """The same, as the holder of a shard."""

        async def main(store: Retrying, catalog: Catalog) -> T:
            async with held(catalog, day, shard, "test") as lease:
                return await work(store, catalog, lease)

        return self.run(main)

    def put_layout(self) -> None:
        store = self.store()
        store.put(".desfs.json", LAYOUT)
        store.close()

    def put_parts(self, shard: str, *raws: bytes, day: date = DAY) -> list[ContainerRecord]:
        """Commit containers, the oldest first."""

        async def work(store: Retrying, catalog: Catalog, lease: Lease) -> list[ContainerRecord]:
            return [await commit_part(store, catalog, lease, raw) for raw in raws]

        return self.under_lease(shard, work, day)

    def put(
        self, shard: str, files: Mapping[str, bytes], *, deleted: Sequence[str] = (), day: date = DAY
    ) -> ContainerRecord:
        """Commit a part with these files; those of `BIG` bytes and more as objects of their own."""
        external = {name: data for name, data in files.items() if len(data) >= BIG}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part.des"
            with DesWriter(path, external_prefix=f"{day}/") as writer:
                for name, data in files.items():
                    if name in external:
                        writer.add_external(name, len(data), meta_of(data, mtime=1_600_000_000))
                    else:
                        writer.add_file(name, data, meta_of(data, mtime=1_600_000_000, mode=0o640))
                for name in deleted:
                    writer.add_deleted(name)
            raw = path.read_bytes()

        async def work(store: Retrying, catalog: Catalog, lease: Lease) -> ContainerRecord:
            count = len(files) + len(deleted)
            return await commit_part(store, catalog, lease, raw, files=count, external=external)

        return self.under_lease(shard, work, day)

    def seal(self, day: date | None = DAY, *, effect: Effect = lambda name: None, **settings: Any) -> Summary:
        """One run of `desfs seal`."""

        async def work(store: Retrying, catalog: Catalog) -> Summary:
            sealer = Sealer(store, catalog, SealSettings(**settings), holder="test:seal", effect=effect)
            await (sealer.seal_past() if day is None else sealer.seal_day(day))
            return sealer.summary

        return self.run(work)

    def rows(self) -> dict[str, ContainerRecord]:
        async def work(store: Retrying, catalog: Catalog) -> dict[str, ContainerRecord]:
            return {record.object_key: record for record in await catalog.list_containers()}

        return self.run(work)

    def states(self) -> dict[str, str]:
        """The state of each row, by the container's name in its day."""
        return {key.rpartition("/")[2]: str(row.state) for key, row in self.rows().items()}

    def shown(self) -> Shown:
        """What a mount shows, and what of it."""
        store = self.store()
        try:
            return Shown.of(store)
        finally:
            store.close()

    def objects(self) -> list[str]:
        """The keys of all objects, without the layout's."""
        store = self.store()
        try:
            return [info.key for info in store.list().objects if not info.key.startswith(".")]
        finally:
            store.close()
