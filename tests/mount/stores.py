"""Stores for tests of the mount, built with the library's own writer, and a store that is watched and tampered with."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import TypeVar

import google_crc32c

from des_format import DesWriter, placement_shard, shard_hex
from desfs.store.base import Answer, CopyRange, Listing, Store
from tests.servers import S3Server

R = TypeVar("R")

LAYOUT = b'{"shard_bits": 8, "placement": "directory", "naming": "path"}'


def meta_of(data: bytes, **more: object) -> dict[str, object]:
    """Metadata as the packer writes it: a checksum and what else is given."""
    return {**more, "crc32c": f"{google_crc32c.value(data):08x}"}


def put_container(path: Path, files: Mapping[str, bytes], **more: object) -> Path:
    """A container with checksums, whole under its name or not there; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with DesWriter(path) as writer:
        for name, data in files.items():
            writer.add_file(name, data, meta_of(data, **more))
    return path


def put_layout(root: Path, text: bytes = LAYOUT) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / ".desfs.json").write_bytes(text)


def put_sharded(root: Path, day: str, files: Mapping[str, bytes], *, all_shards: bool = False) -> dict[str, Path]:
    """A day of the layout in `LAYOUT`: which container has each file. With `all_shards` none of the 256 is missing."""
    shards: dict[str, dict[str, bytes]] = {f"{n:02x}": {} for n in range(256)} if all_shards else {}
    where = {}
    for name, data in sorted(files.items()):
        shard = shard_hex(placement_shard(name, 8), 8)
        shards.setdefault(shard, {})[name] = data
        where[name] = root / day / f"{shard}.des"
    for shard, members in shards.items():
        put_container(root / day / f"{shard}.des", members)
    put_layout(root)
    return where


def source_tree(root: Path, *, seed: int = 1, files: int = 300) -> Path:
    """A directory such as programs make: nested, names of all kinds, sizes from none to 300 KB, times in ns, modes."""
    random = Random(seed)
    folders = [
        "",
        "photos",
        "photos/2026",
        "photos/2026/summer trip",
        "src/lib/deep/er/still",
        "żółć/日本",
        "logs.d",
        "-x",
    ]
    for number in range(files):
        folder = root / random.choice(folders)
        folder.mkdir(parents=True, exist_ok=True)
        stem = random.choice(
            ["img", "note to self", "data", "ünï", "a'b\"c", "x\ny", ".hidden", "#tag", "$v*?", "back\\slash"]
        )
        path = folder / f"{stem}-{number:04d}{random.choice(['.txt', '.jpg', '', '.tar.gz'])}"
        size = random.choice([0, 1, 511, 4096, 4097, random.randrange(20_000), random.randrange(20_000)])
        size = 300_000 + number if number % 100 == 7 else size
        path.write_bytes(
            b"needle %d\n" % number + random.randbytes(size) if number % 10 == 3 else random.randbytes(size)
        )
        path.chmod(random.choice([0o644, 0o600, 0o755, 0o444, 0o640]))
        stamp = random.randrange(946_684_800_000_000_000, 1_790_000_000_000_000_000)
        os.utime(path, ns=(stamp, stamp))
    return root


def pack_tree(source: Path, root: Path, day: str, shard_bits: int = 2) -> Path:
    """A store with the files of a directory, as the packer would lay them out."""
    shards: dict[str, list[Path]] = {}
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        shard = shard_hex(placement_shard(str(path.relative_to(source)), shard_bits), shard_bits)
        shards.setdefault(shard, []).append(path)
    for shard, paths in shards.items():
        (root / day).mkdir(parents=True, exist_ok=True)
        with DesWriter(root / day / f"{shard}.des") as writer:
            for path in paths:
                status, data = path.stat(), path.read_bytes()
                writer.add_file(
                    str(path.relative_to(source)),
                    data,
                    {
                        "mtime": Decimal(status.st_mtime_ns).scaleb(-9).normalize(),
                        "mode": status.st_mode & 0o7777,
                        "sha256": sha256(data).hexdigest(),
                        "crc32c": f"{google_crc32c.value(data):08x}",
                        "id": f"id-{zlib.crc32(str(path).encode())}",
                    },
                )
    put_layout(root, b'{"shard_bits": %d, "placement": "directory", "naming": "path"}' % shard_bits)
    return root


def upload(server: S3Server, bucket: str, folder: Path, prefix: str = "") -> None:
    """Put a directory into a bucket, oldest file first: LastModified then orders them as their times do."""
    for path in sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns
    ):
        server.client().put_object(Bucket=bucket, Key=prefix + str(path.relative_to(folder)), Body=path.read_bytes())


class WatchedStore:
    """A store inside, each call of it written down, with hooks before and after. Any thread may call.

    `before(method, key)` runs in the calling thread and may raise, wait, or change what is stored; `change(method, key,
    data)` may give other bytes than were read.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda method, key: None
        self.change: Callable[[str, str, bytes], bytes] = lambda method, key, data: data
        self._lock = threading.Lock()
        self.running = 0
        self.most_running = 0

    @property
    def url(self) -> str:
        return self.inner.url

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        return self._call("list", prefix, lambda: self.inner.list(prefix, delimiter=delimiter))

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        answer = self._call("get", key, lambda: self.inner.get_range(key, start, stop, if_match=if_match))
        return Answer(self.change("get", key, bytes(answer.data)), answer.etag, answer.size)

    def get_tail(self, key: str, length: int) -> Answer:
        answer = self._call("tail", key, lambda: self.inner.get_tail(key, length))
        return Answer(self.change("tail", key, bytes(answer.data)), answer.etag, answer.size)

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        return self._call("put", key, lambda: self.inner.put(key, source, if_absent=if_absent))

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self.inner.delete(key))

    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        return self._call("copy", key, lambda: self.inner.copy_ranges(key, pieces, if_absent=if_absent))

    def close(self) -> None:
        self.inner.close()

    def keys(self, method: str) -> Sequence[str]:
        """The keys of the calls of a method so far, in order."""
        with self._lock:
            return [key for name, key in self.calls if name == method]

    def _call(self, method: str, key: str, call: Callable[[], R]) -> R:
        with self._lock:
            self.calls.append((method, key))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self.before(method, key)
            return call()
        finally:
            with self._lock:
                self.running -= 1
