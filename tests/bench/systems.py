"""What is measured: the local disk and desfs here, the other programs in `peers`. Each shows the same tree of files."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from desfs.settings import MountSettings
from tests import servers
from tests.bench.corpus import DESFS
from tests.bench.machine import clean_environ, family, peak_rss, timed

START_S = 120.0


@dataclass(slots=True)
class Mounted:
    """A system at work: where its tree is, seconds until it was ready, its processes."""

    tree: Path
    ready_s: float = 0.0
    pids: list[int] = field(default_factory=list)
    control: Path | None = None

    def peak_rss(self) -> int:
        return peak_rss({pid for each in self.pids for pid in family(each)})

    def fuse_requests(self) -> dict[str, float]:
        """How many requests of each kind the kernel has made so far; empty when the system does not count them."""
        if self.control is None:
            return {}
        prefix = "desfs_fuse_requests_total."
        counts: dict[str, float] = {}
        for name, value in json.loads((self.control / "stats").read_text())["metrics"].items():
            if name.startswith(prefix):
                operation = name.removeprefix(prefix).partition(".")[0]
                counts[operation] = counts.get(operation, 0) + value
        return counts


class System(Protocol):
    """`one_object` says that it keeps an object, or more, for each file."""

    name: str
    one_object: bool

    def mount(self, where: Path) -> contextlib.AbstractContextManager[Mounted]:
        """Mount freshly, with nothing left of an earlier mount; all is gone at the end."""
        ...


@dataclass(slots=True)
class LocalDisk:
    """The reference: the same tree in a local directory."""

    root: Path
    name: str = "local disk"
    one_object: bool = False

    @contextlib.contextmanager
    def mount(self, where: Path) -> Iterator[Mounted]:
        yield Mounted(self.root)


@dataclass(slots=True)
class Desfs:
    """desfs over an S3 store. `tree` is the directory of the mount that has the files."""

    url: str
    env: Mapping[str, str]
    tree: str
    name: str = "desfs"
    options: Sequence[str] = ()
    cache_dir: Path | None = None
    one_object: bool = False
    program: Sequence[str | Path] = (DESFS,)

    @contextlib.contextmanager
    def mount(self, where: Path) -> Iterator[Mounted]:
        if self.cache_dir is not None and not self.cache_dir.exists():
            # Its disk cache is what an earlier mount has left.
            self.cache_dir.mkdir(parents=True)
            with self._mount(where) as mounted:
                timed(["cp", "-r", mounted.tree, self.cache_dir.with_name("filling")], START_S)
                shutil.rmtree(self.cache_dir.with_name("filling"))
        with self._mount(where) as mounted:
            yield mounted

    @contextlib.contextmanager
    def _mount(self, where: Path) -> Iterator[Mounted]:
        with servers.mount_point(where):
            began = time.perf_counter()
            done = subprocess.run(
                [
                    *self.program,
                    "mount",
                    self.url,
                    where,
                    *(word for option in self.options for word in ("-o", option)),
                ],
                env=clean_environ() | dict(self.env),
                capture_output=True,
                text=True,
                timeout=START_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            ready_s = time.perf_counter() - began
            if done.returncode != 0:
                raise RuntimeError(f"{self.name} was not mounted: {done.stderr}")
            yield Mounted(where / self.tree, ready_s, servers.mount_daemons(where), where / ".desfs")


def has_option(name: str) -> bool:
    """Whether this desfs knows a mount option."""
    return name in MountSettings.model_fields
