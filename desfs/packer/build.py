"""From claimed files to a container file, and what imports share of that. Blocking."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c

from des_format.blocks import BlockSummer
from des_format.errors import SizeMismatch
from des_format.layout import BIG_FILES_FOLDER
from des_format.names import external_key
from des_format.writer import DesWriter, ReadableBytes
from desfs.errors import DesfsError, ObjectExists, StoreError
from desfs.file_lease import lease_is_broken, take_lease
from desfs.packer.batch import Cut, Item
from desfs.spool import FileChanged, FileState, Spool
from desfs.store.retrying import Retrying

_IN_MEMORY = 4 * 1024 * 1024  # bytes: larger files are streamed
_CHUNK = 1024 * 1024
_PERMISSIONS = 0o7777


class FileUnreadable(DesfsError):
    """A claimed file cannot be read: it is put aside, and does not hold up the others."""


class _Descriptor:
    """Reads an open file: a file object costs as much as the rest of what is done for a small file's bytes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int) -> bytes:
        return os.read(self._descriptor, size)


class Checksums:
    """A source of bytes that takes their SHA-256 and CRC-32C as they pass, and with `blocks` that of each block."""

    def __init__(self, source: ReadableBytes, blocks: BlockSummer | None = None) -> None:
        self._source = source
        self._blocks = blocks
        self._sha256 = sha256()
        self._crc32c = 0

    def read(self, size: int) -> bytes:
        """As of the source. Raises: FileUnreadable."""
        try:
            data = self._source.read(size)
        except OSError as error:
            raise FileUnreadable(str(error.strerror)) from error
        self._sha256.update(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        if self._blocks is not None:
            self._blocks.update(data)
        return data

    def meta(self) -> dict[str, Any]:
        """The keys of META for what has been read. Raises: SizeMismatch when it is not what `blocks` was made for."""
        blocks = {} if self._blocks is None else self._blocks.meta()
        return {"sha256": self._sha256.hexdigest(), "crc32c": f"{self._crc32c:08x}", **blocks}


def file_meta(mtime_ns: int | None, mode: int | None, checksums: Checksums) -> dict[str, Any]:
    """The keys of META for a file whose payload has been read, in the order that parses fast
    (`des_format.packed_meta`): its modification time, its permission bits, where they are known, its checksums.

    Raises: as `Checksums.meta`.
    """
    meta: dict[str, Any] = {}
    if mtime_ns is not None:
        meta["mtime"] = Decimal(mtime_ns).scaleb(-9).normalize()
    if mode is not None:
        meta["mode"] = mode & _PERMISSIONS
    return {**meta, **checksums.meta()}


def add_internal(
    writer: DesWriter, name: str, size: int, checksums: Checksums, meta: Callable[[], dict[str, Any]]
) -> None:
    """Add an entry whose payload lies in the container; `meta` is called when its last byte has been read.

    Raises: SizeMismatch when it has not `size` bytes, what the source and `meta` raise (the container can be continued
    without the entry); OSError.
    """
    if size > _IN_MEMORY:
        writer.add_stream(name, checksums, size, meta)
        return
    data = checksums.read(size + 1)
    if len(data) != size:
        raise SizeMismatch(f"{name!r}: found {len(data)} bytes or more, want {size}")
    writer.add_file(name, data, meta())


def put_external(
    store: Retrying,
    path: Path,
    key: str,
    name: str,
    folder: str,
    effect: Callable[[str], None] = lambda name: None,
    *,
    again: bool = False,
) -> str:
    """Store the payload of the entry `name` of the container `key` where every reader looks; the object's key. Where
    an earlier version of the name has taken that place, or a file has the name of a folder on the way there, which a
    directory store cannot hold, this one gets `folder` of its own, which META has to record. One that is there is used;
    with `again` it is stored again first, by those who hold no lease: it may be old, and about to be collected.

    Raises: StoreError.
    """
    usual = external_key(key, name)
    own = f"{key.rpartition('/')[0]}/{BIG_FILES_FOLDER}/{folder}/{name}"
    refused: StoreError | None = None
    for target in (usual, own):
        effect(f"put {target}")
        try:
            store.put(target, path)
            return target
        except ObjectExists as error:
            refused = error
            # Ours from before a crash, or another version: the bytes tell.
            if store.etag_if_holds(target, path) is not None:
                if again:
                    effect(f"put {target}")
                    store.put(target, path, if_absent=False)
                return target
        except StoreError as error:
            if type(error) is not StoreError:  # those that say more concern the store, not the key
                raise
            refused = error
    raise StoreError(f"{name!r} cannot be stored as an object of its own: {refused}") from refused


@dataclass(slots=True)
class Built:
    """A container file: the items in it, those that changed and go back, those that another worker has taken, and those
    that cannot be read, with the reason. `path` is None when nothing was left to write."""

    path: Path | None
    items: list[Item] = field(default_factory=list)
    changed: list[Item] = field(default_factory=list)
    gone: list[Item] = field(default_factory=list)
    unreadable: list[tuple[Item, str]] = field(default_factory=list)


class Builder:
    """Builds the containers of a spool's batches."""

    def __init__(
        self,
        spool: Spool,
        store: Retrying,
        *,
        big_file_threshold: int,
        naming: str,
        effect: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._spool = spool
        self._store = store
        self._big_file_threshold = big_file_threshold
        self._naming = naming
        self._effect = effect

    def build(self, batch: str, plan: Cut, key: str) -> Built:
        """Write the container for `key` into the spool's work folder; external payloads are put into the store first.

        A file that changes meanwhile, has gone, or cannot be read, is left out and named. Raises: StoreError; OSError.
        """
        path = self._spool.work_path(key)
        built = Built(path)
        self._effect(f"build {key}")
        with DesWriter(path, big_file_threshold=self._big_file_threshold) as writer:
            for item in plan.items:
                try:
                    self._add(writer, batch, item, key)
                except (FileChanged, SizeMismatch):
                    built.changed.append(item)
                except FileNotFoundError:
                    built.gone.append(item)
                except FileUnreadable as error:
                    built.unreadable.append((item, str(error)))
                else:
                    built.items.append(item)
            if not built.items:
                writer.discard()
                built.path = None
        return built

    def _add(self, writer: DesWriter, batch: str, item: Item, key: str) -> None:
        """Add one file, read under a lease and checked afterwards.

        Raises: FileChanged, SizeMismatch; FileNotFoundError; FileUnreadable.
        """
        path = self._spool.claimed(batch, item.path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FileUnreadable(str(error.strerror)) from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or FileState.of(status) != item.state or not take_lease(descriptor):
                raise FileChanged(item.path)
            size = item.state.size
            external = size >= self._big_file_threshold
            checksums = Checksums(_Descriptor(descriptor), BlockSummer(size) if external else None)

            def checked_meta() -> dict[str, Any]:
                if FileState.of(os.fstat(descriptor)) != item.state or lease_is_broken(descriptor):
                    raise FileChanged(item.path)
                return self._meta(item, status, checksums)

            if not external:
                add_internal(writer, item.name, size, checksums, checked_meta)
                return
            while checksums.read(_CHUNK):
                pass
            checked_meta()  # before the upload: what has changed already need not travel
            stored = put_external(self._store, Path(path), key, item.name, item.id, self._effect)
            writer.add_external(item.name, size, checked_meta(), key=stored)
        finally:
            os.close(descriptor)

    def _meta(self, item: Item, status: os.stat_result, checksums: Checksums) -> dict[str, Any]:
        meta = {**file_meta(status.st_mtime_ns, status.st_mode, checksums), "id": item.id}
        if self._naming == "assigned":
            meta["original_name"] = item.path
        return meta
