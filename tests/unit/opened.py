"""A store with one container that is open, and the data path of a mount on top of it, as tests use them."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
import trio.testing

from des_format.shards import parse_container_name
from desfs.container import OpenContainer, load_container
from desfs.disk_cache import DiskCache
from desfs.fetch import Fetcher
from desfs.inode import directory_inode
from desfs.prefetch import DayShape, Prefetcher
from desfs.problems import Problems
from desfs.route import Stop
from desfs.store.base import Answer
from desfs.store.file import FileStore
from desfs.store_threads import StoreThreads
from desfs.tree import DayTree, Member
from tests.mount.stores import WatchedStore

DAY = "2026-11-20"
KEY = f"{DAY}/0.des"


class RangesStore(WatchedStore):
    """A watched store that writes down the ranges too."""

    def __init__(self, root: Path) -> None:
        super().__init__(FileStore(root))
        self.ranges: list[tuple[str, int, int]] = []

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        self.ranges.append((key, start, stop))
        return super().get_range(key, start, stop, if_match=if_match)


class World:
    """Everything from the store to the prefetch. Reads need `run`, or a nursery with `fetcher.run`."""

    def __init__(
        self,
        root: Path,
        *,
        memory: int = 64 << 20,
        max_prefetch: int = 64 << 20,
        max_gap: int = 1 << 20,
        deadline_s: float = 60.0,
        disk: DiskCache | None = None,
        keys: tuple[str, ...] = (KEY,),
    ) -> None:
        self.root = root
        self.store = RangesStore(root)
        self.problems = Problems()
        self.threads = StoreThreads(self.store, deadline_s)
        self.fetcher = Fetcher(self.threads, self.problems, memory, max_gap=max_gap, disk=disk)
        self.prefetcher = Prefetcher(self.fetcher, memory, max_prefetch)
        infos = {info.key: info for info in self.store.list(f"{DAY}/", delimiter=True).objects}
        self.containers = [
            OpenContainer(load_container(self.store, infos[key]), slot) for slot, key in enumerate(keys, 7)
        ]
        self.container = self.containers[0]
        stops = tuple(Stop(container, member_of(container)) for container in self.containers)
        tree = DayTree([stop.member for stop in stops])
        self.shape = DayShape(DAY, stops, tree, lambda path: int(directory_inode(path)))
        self.forget_calls()

    def forget_calls(self) -> None:
        self.store.calls.clear()
        self.store.ranges.clear()

    def row(self, name: str, container: OpenContainer | None = None) -> int:
        return (container or self.container).loaded.index.find_shown(name)

    async def payload(self, name: str) -> bytes:
        """A small payload, from the fetcher alone: nothing is fetched ahead."""
        return bytes(await self.fetcher.payload(self.container, self.row(name)))

    async def read(
        self, name: str, offset: int = 0, size: int = 1 << 30, container: OpenContainer | None = None
    ) -> bytes:
        """As the file system reads."""
        container = container or self.container
        row = self.row(name, container)
        return bytes(await self.prefetcher.read(self.shape, container, row, offset, size))

    def gets(self) -> int:
        return len(self.store.keys("get"))

    async def idle(self) -> None:
        """Until nothing is being fetched."""
        await trio.testing.wait_all_tasks_blocked()  # what was asked for has begun
        await until(lambda: not self.fetcher.bytes_in_flight)
        await trio.testing.wait_all_tasks_blocked()

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run a test with the fetcher running, within a time."""

        async def bounded() -> None:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.fetcher.run)
                    await main()
                    nursery.cancel_scope.cancel()

        try:
            trio.run(bounded)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None


def member_of(container: OpenContainer) -> Member:
    """What a day's tree knows of a container."""
    name = parse_container_name(container.info.key.rpartition("/")[2])
    assert name is not None
    loaded = container.loaded
    return Member(container.slot, container.slot, loaded.index, container.info.key, name, 0, loaded.folders)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread does."""
    while not condition():  # noqa: ASYNC110 - of a thread, which sets no trio.Event
        await trio.sleep(0.001)


class Gate:
    """A hook of a watched store: GETs of matching keys wait until it opens. `waiting` counts those that came."""

    def __init__(self, matches: Callable[[str, str], bool] = lambda method, key: True) -> None:
        self._matches = matches
        self._open = threading.Event()
        self._lock = threading.Lock()
        self.waiting = 0

    def open(self) -> None:
        self._open.set()

    def __call__(self, method: str, key: str) -> None:
        if self._matches(method, key):
            with self._lock:
                self.waiting += 1
            assert self._open.wait(20), "nobody opened the gate"
