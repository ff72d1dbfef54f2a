"""The stage of the benchmark: a real S3 server, a proxy 20 ms before it, the corpus on the disk and in the store."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests import servers
from tests.bench.corpus import Corpus, Packed, copy_to_day, fill_spool, make_corpus, pack, past_day
from tests.bench.machine import drop_caches, fstype_of, read_all
from tests.bench.proxy import DelayProxy, delay_proxy
from tests.bench.raw import RawClient

DELAY_S = 0.020
LEAST_MB_S = 500.0
_PROBE = 256 * 1024 * 1024
_COPY_ROOT = Path("/dev/shm")


class NotMeasurable(Exception):
    """This machine is no place for this benchmark; the message says why."""


@dataclass(slots=True)
class Store:
    """Containers of one day in the store. `tree` is where a mount of `url` shows the files; `open_day` has the same as
    containers of today."""

    bucket: str
    prefix: str
    tree: str
    packed: Packed
    open_day: Store | None = None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix.rstrip('/')}"


@dataclass(slots=True)
class World:
    """One thread. `work` is on the local disk; `copies`, for what is copied out of a mount, in memory if possible."""

    work: Path
    copies: Path
    server: servers.S3Server
    proxy: DelayProxy
    raw: RawClient
    say: Callable[[str], None]

    @property
    def env(self) -> dict[str, str]:
        """The variables of a program that goes through the proxy."""
        return self.server.environ(endpoint_url=self.proxy.url)

    def make_cold(self) -> None:
        """Drop the kernel's caches, and warm those that everybody is to find warm: the server's."""
        drop_caches()
        read_all(self.work / "server")

    def check_proxy(self, *, strict: bool) -> float:
        """MB/s that the proxy lets through. Raises: NotMeasurable if it would be the limit."""
        bucket = self.server.new_bucket("probe")
        try:
            self.server.client().put_object(Bucket=bucket, Key="probe/object", Body=os.urandom(_PROBE))
            objects = self.raw.signed(self.server, bucket, "probe/")
            rate = max(_PROBE / 1e6 / self.raw.download(objects, 8 * 1024 * 1024) for _ in range(5))
        finally:
            self.server.delete_bucket(bucket)
        if rate < LEAST_MB_S:
            message = f"the proxy lets {rate:.0f} MB/s through, want {LEAST_MB_S:.0f}: is the machine busy?"
            if strict:
                raise NotMeasurable(message)
            self.say(message)
        return rate

    def corpus(self, files: int) -> Corpus:
        self.say(f"writing {files:,} files")
        return make_corpus(self.work / f"corpus-{files}", files)

    def pack_closed_day(self, corpus: Corpus, name: str, *options: str) -> Store:
        """Pack a corpus as users do, and show it as a day of last week."""
        self.say(f"packing {len(corpus.names):,} files")
        today = self.pack_open_day(corpus, f"{name}-open", *options)
        bucket = self.server.new_bucket(name)
        day = past_day()
        copy_to_day(self.server, (today.bucket, today.prefix), (bucket, "store/"), day)
        return Store(bucket, "store/", day, today.packed, today)

    def pack_open_day(self, corpus: Corpus, name: str, *options: str) -> Store:
        bucket = self.server.new_bucket(name)
        spool = Path(tempfile.mkdtemp(prefix="spool-", dir=self.work))
        try:
            fill_spool(corpus, spool)
            packed = pack(spool, self.server, f"s3://{bucket}/store", self.proxy.url, *options)
        finally:
            shutil.rmtree(spool)
        return Store(bucket, "store/", datetime.now(UTC).date().isoformat(), packed)

    @contextlib.contextmanager
    def copy_target(self) -> Iterator[Path]:
        """A name to copy to; what is there is removed."""
        target = self.copies / "copy"
        try:
            yield target
        finally:
            shutil.rmtree(target, ignore_errors=True)


@contextlib.contextmanager
def open_world(say: Callable[[str], None], folder: Path | None = None) -> Iterator[World]:
    """Set the stage; everything is gone at the end, also after Ctrl-C or SIGTERM. Raises: NotMeasurable."""
    if os.geteuid() != 0:
        raise NotMeasurable("dropping the kernel's caches and mounting take root")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        # /var/tmp is a disk where /tmp may be memory.
        work = Path(tempfile.mkdtemp(prefix="desfs-bench-", dir=folder or "/var/tmp"))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        if fstype_of(work) in ("tmpfs", "ramfs"):
            raise NotMeasurable(f"{work} is in memory: name a folder on a disk with --folder")
        copies = Path(tempfile.mkdtemp(prefix="desfs-bench-", dir=_COPY_ROOT if _COPY_ROOT.is_dir() else work))
        stack.callback(shutil.rmtree, copies, ignore_errors=True)
        say("starting SeaweedFS and the proxy")
        (work / "server").mkdir()
        server = stack.enter_context(servers.s3_server(work / "server"))
        proxy = stack.enter_context(delay_proxy(server.host, server.port, DELAY_S))
        yield World(work, copies, server, proxy, RawClient(proxy.port), say)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
