"""A store whose objects are swapped while it is read, by a script with a seed, and contents that tell a mixture.

Every 32 bytes of a file say which file, version and place they are of. Run as a program it maps files into its memory,
again and again: whoever touches a page that cannot be read dies (SIGBUS), and no test should.
"""

from __future__ import annotations

import io
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Protocol
from zlib import crc32

import numpy as np
import xxhash

from des_format import DesWriter
from des_format.blocks import BlockSummer
from des_format.shards import placement_shard, shard_hex
from tests.mount.stores import meta_of
from tests.servers import S3Server

DAY = "archive"  # no calendar day, so it never closes
SHARD_BITS = 4
LAYOUT = b'{"shard_bits": %d, "placement": "directory", "naming": "path"}' % SHARD_BITS
SMALL_FILES = 60  # in each directory
_BLOCK = 32
_LARGE = 17 * 1024 * 1024  # larger than what is in blocks with others
_EXTERNAL = 9 * 1024 * 1024 + 1234


# --- contents --------------------------------------------------------------------------------------------------------


def size_of(name: str, version: int) -> int:
    """How long a version of a file is; external objects have one size in all versions."""
    if "ext-" in name:
        return _EXTERNAL
    if name.endswith("large"):
        return _LARGE + version % 3 * 5003
    return 64 + crc32(name.encode()) % 9000 + version % 3 * 517


def content(name: str, version: int, start: int = 0, stop: int | None = None) -> bytes:
    """[start, stop) of a version of a file."""
    stop = size_of(name, version) if stop is None else min(stop, size_of(name, version))
    first = start // _BLOCK
    blocks = np.empty((max(-(-stop // _BLOCK) - first, 0), 4), "<u8")
    tag = np.uint64(xxhash.xxh3_64_intdigest(name.encode()))
    blocks[:, 0] = tag
    blocks[:, 1] = version
    blocks[:, 2] = np.arange(first, first + len(blocks))
    blocks[:, 3] = (blocks[:, 2] * np.uint64(0x9E3779B97F4A7C15)) ^ tag ^ np.uint64(version)
    return blocks.tobytes()[start - first * _BLOCK : stop - first * _BLOCK]


def version_of(name: str, data: bytes, start: int = 0) -> int:
    """The version that all of the bytes from `start` on are of. AssertionError for a mixture, or what never was."""
    at = -start % _BLOCK
    assert len(data) >= at + _BLOCK, f"{name}: {len(data)} bytes from {start} on"
    version = int.from_bytes(data[at + 8 : at + 16], "little")
    wanted = content(name, version, start, start + len(data)) if version < 1 << 32 else b""
    if data != wanted:
        wrong = next((n for n, pair in enumerate(zip(data, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
        raise AssertionError(
            f"{name}: bytes from {start} begin as version {version}, and differ at byte {start + wrong}: "
            f"{data[wrong : wrong + 48].hex()}, {len(data)} bytes, want {len(wanted)}"
        )
    return version


# --- the store -------------------------------------------------------------------------------------------------------


class Objects(Protocol):
    """Whole objects under their keys."""

    def put(self, key: str, data: bytes) -> None: ...

    def delete(self, key: str) -> None: ...


class FileObjects(Objects):
    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, key: str, data: bytes) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(".fresh")
        fresh.write_bytes(data)
        fresh.rename(target)

    def delete(self, key: str) -> None:
        (self.root / key).unlink()


class S3Objects(Objects):
    def __init__(self, server: S3Server, bucket: str) -> None:
        self._client, self._bucket = server.client(), bucket

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=key)


def _directories() -> dict[str, str]:
    """A directory for each role, no two in one shard."""
    found: dict[str, str] = {}
    taken: set[int] = set()
    for role in ("moved", "over", "parts", "gone", "loose"):
        number = next(n for n in range(1000) if placement_shard(f"{role}{n}/f", SHARD_BITS) not in taken)
        taken.add(placement_shard(f"{role}{number}/f", SHARD_BITS))
        found[role] = f"{role}{number}"
    return found


DIRECTORIES = _directories()
# Nothing but the containers of these files changes: their readers must never notice anything.
STEADY = (DIRECTORIES["moved"] + "/", DIRECTORIES["loose"] + "/f")
# Files that are not there at times.
PASSING = (DIRECTORIES["gone"] + "/",)


class Swapper:
    """Swaps objects in steps. `started` and `ended` count them: nothing changes while they are equal and the same."""

    def __init__(self, objects: Objects, seed: int) -> None:
        self.objects = objects
        self.current: dict[str, int] = {}
        self.started = self.ended = 0
        self._random = Random(seed)
        self._parts: dict[str, dict[str, dict[str, int]]] = {role: {} for role in DIRECTORIES}
        self._generation = 0
        self._changed = threading.Lock()

    def names(self, role: str) -> list[str]:
        folder = DIRECTORIES[role]
        names = [f"{folder}/f{n:02}" for n in range(SMALL_FILES)]
        if role in ("moved", "over"):
            names.append(f"{folder}/large")
        names += {"gone": [f"{folder}/ext-blocks", f"{folder}/ext-whole"], "moved": [f"{folder}/ext-blocks"]}.get(
            role, []
        )
        return [*names, f"{folder}/ext-none"] if role == "loose" else names

    def fill(self) -> None:
        """The first version of everything."""
        for role in DIRECTORIES:
            self._publish(role, "", dict.fromkeys(self.names(role), 0))

    def step(self) -> str:
        """One change; what it was."""
        with self._changed:
            self.started += 1
            actions: dict[str, Callable[[], None]] = {
                "overwrite": self._overwrite,
                "delete": self._delete,
                "replace an external object": self._replace_external,
                "add a part": self._add_part,
                "merge": lambda: self._merge("parts"),
                "split": self._split,
                "move": lambda: self._merge("moved"),
            }
            # Each in turn, then as it comes.
            names = list(actions)
            name = names[self.started - 1] if self.started <= len(names) else self._random.choice(names)
            actions[name]()
            self.ended += 1
            return name

    def quiet(self) -> int | None:
        """The number of steps so far, None while one is under way."""
        started = self.started
        return started if started == self.ended else None

    # --- steps ---

    def _overwrite(self) -> None:
        self._publish("over", "", dict.fromkeys(self.names("over"), self.started))

    def _delete(self) -> None:
        """A container goes, the external objects that it names are replaced, and a new one comes."""
        self.objects.delete(self._key("gone", ""))
        for name in self.names("gone"):
            if "ext-" in name:
                self._put_external(name, self.started)
        self._publish("gone", "", dict.fromkeys(self.names("gone"), self.started))

    def _replace_external(self) -> None:
        name = f"{DIRECTORIES['loose']}/ext-none"
        self._put_external(name, self.started)
        self.current[name] = self.started

    def _add_part(self) -> None:
        names = self._random.sample(self.names("parts"), SMALL_FILES // 2)
        self._publish("parts", self._next(), dict.fromkeys([*names, f"{DIRECTORIES['parts']}/new"], self.started))

    def _merge(self, role: str) -> None:
        """What is shown in one new container; the others go."""
        old = [part for part in self._parts[role] if part]
        shown = {name: self.current[name] for name in self.current if name.startswith(DIRECTORIES[role] + "/")}
        self._publish(role, self._next() if role == "moved" else "", shown)
        for part in old:
            self._remove(role, part)
        if role == "moved" and "" in self._parts[role]:
            self._remove(role, "")

    def _split(self) -> None:
        """The same files in two new containers."""
        names = self.names("moved")
        old = list(self._parts["moved"])
        self._random.shuffle(names)
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            self._publish("moved", self._next(), {name: self.current[name] for name in half})
        for part in old:
            self._remove("moved", part)

    # --- objects ---

    def _next(self) -> str:
        self._generation += 1
        return f"-{self._generation:06d}"

    def _key(self, role: str, part: str) -> str:
        shard = shard_hex(placement_shard(f"{DIRECTORIES[role]}/f", SHARD_BITS), SHARD_BITS)
        return f"{DAY}/{shard}{part}.des"

    def _remove(self, role: str, part: str) -> None:
        self.objects.delete(self._key(role, part))
        del self._parts[role][part]

    def _publish(self, role: str, part: str, versions: Mapping[str, int]) -> None:
        file = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "c.des"
            with DesWriter(path, external_prefix=f"{DAY}/") as writer:
                for name in sorted(versions):
                    version = versions[name]
                    if "ext-" not in name:
                        data = content(name, version)
                        writer.add_file(name, data, meta_of(data, mtime=1_700_000_000 + version))
                        continue
                    if name not in self.current:
                        self._put_external(name, version)
                    writer.add_external(name, size_of(name, version), _external_meta(name, version))
            file.write(path.read_bytes())
        self.objects.put(self._key(role, part), file.getvalue())
        self._parts[role][part] = dict(versions)
        self.current.update(versions)

    def _put_external(self, name: str, version: int) -> None:
        self.objects.put(f"{DAY}/_bigFiles/{name}", content(name, version))


def _external_meta(name: str, version: int) -> dict[str, object]:
    if name.endswith("none"):
        return {"mtime": 1_700_000_000}
    data = content(name, version)
    if name.endswith("whole"):
        return meta_of(data, mtime=1_700_000_000 + version)
    summer = BlockSummer(len(data))
    summer.update(data)
    return meta_of(data, mtime=1_700_000_000 + version, **summer.meta())


# --- a program that maps files -----------------------------------------------------------------------------------


def map_files(day: Path, seed: int) -> None:
    """Map and check one file after another, for ever. Its name is written before it is touched, then its version, or
    the error of open."""
    random = Random(seed)
    while True:
        # A directory goes and comes again; so do its files.
        with suppress(OSError):
            names = [f"{folder.name}/{file.name}" for folder in day.iterdir() for file in folder.iterdir()]
            for name in random.sample(names, len(names)):
                print(name, flush=True)
                try:
                    with open(day / name, "rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                except OSError as error:
                    print(os.strerror(error.errno or 0), flush=True)
                    continue
                print(version_of(name, bytes(mapped)), flush=True)
                mapped.close()


if __name__ == "__main__":
    map_files(Path(sys.argv[1]), int(sys.argv[2]))
