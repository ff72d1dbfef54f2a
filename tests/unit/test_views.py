"""docs/architecture.md: which indexes are read when, refresh, and containers that change under us."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import pytest
import trio
import trio.testing

from des_format import placement_shard, shard_hex
from desfs.day import DayView
from desfs.errors import AccessDenied, DamagedDay, DesfsError, NoSuchPath, StoreError, StoreUnavailable, errno_of
from desfs.layout import Layout
from desfs.problems import Problems
from desfs.settings import MountSettings
from desfs.store.file import FileStore
from desfs.store_threads import StoreThreads
from desfs.surroundings import Changes
from desfs.tree import DayTree
from desfs.views import Views
from tests.fakes.faulty_store import FaultyStore
from tests.mount.stores import LAYOUT, WatchedStore, put_container, put_layout, put_sharded
from tests.unit.containers import Item, build, patched

DAY = "2026-11-20"


class World:
    """A store in a directory, watched, and the views of it."""

    def __init__(self, root: Path, *, strict: bool = False) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        self.store = WatchedStore(FileStore(root))
        self.problems = Problems()
        self.changes: list[Changes] = []
        self.views = Views(StoreThreads(self.store), self.problems, strict=strict, on_change=self.changes.append)

    async def start(self) -> None:
        await self.views.start()

    async def day(self, name: str = DAY) -> DayView:
        return await self.views.day(name)

    async def find(self, path: str, name: str = DAY) -> str | None:
        """The container that shows a file, None for a directory."""
        found = await (await self.day(name)).find(path.encode())
        return None if found is None else found.container.info.key

    async def names(self, name: str = DAY) -> list[bytes]:
        return sorted(walked(await (await self.day(name)).load()))

    def opened(self) -> list[str]:
        """The containers that were read since the last call."""
        keys = [key for method, key in self.store.calls if method == "get"]
        self.store.calls.clear()
        return sorted(keys)

    def put(self, key: str, *names: str, content: str = "") -> None:
        put_container(self.root / key, {name: f"{name}{content}".encode() for name in names})

    def remove(self, key: str) -> None:
        (self.root / key).unlink()


def walked(tree: DayTree, path: bytes = b"") -> Iterable[bytes]:
    for page in tree.pages(path):
        for name in page.names:
            full = path + b"/" + name if path else name
            if page.shares:
                yield full
            else:
                yield from walked(tree, full)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "store")


def run(main: Callable[[], Awaitable[None]], clock: trio.testing.MockClock | None = None) -> None:
    async def bounded() -> None:
        with trio.fail_after(600 if clock else 60):
            await main()

    trio.run(bounded, clock=clock)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of a thread, which sets no trio.Event
        await trio.sleep(0.001)


def shard(path: str) -> str:
    return f"{DAY}/{shard_hex(placement_shard(path, 8), 8)}.des"


# --- point lookups -----------------------------------------------------------------------------------------------


def test_a_point_lookup_opens_one_shard(world: World) -> None:
    """The shard follows from the name (or the directory): a lookup in a day of many shards loads one index."""
    put_sharded(world.root, DAY, dict.fromkeys(("a", "b", "dir/x", "dir/y", "dir/sub/z"), b"x"))

    async def main() -> None:
        await world.start()
        world.opened()
        assert await world.find("a") == shard("a")
        assert world.opened() == [shard("a")]
        assert await world.find("dir/y") == shard("dir/y")
        assert world.opened() == [shard("dir/y")]
        assert await world.find("dir/x") == shard("dir/y")
        assert world.opened() == []

    run(main)


def test_walking_down_a_path_opens_one_shard_a_level(world: World) -> None:
    """The directory `dir` of `dir/x` is found in the shard where its files lie."""
    put_sharded(world.root, DAY, {f"{n}": b"x" for n in range(100)} | {"dir/x": b"x"})

    async def main() -> None:
        await world.start()
        world.opened()
        assert await world.find("dir") is None
        assert await world.find("dir/x") == shard("dir/x")
        assert world.opened() == [shard("dir/x")]

    run(main)


def test_before_enoent_all_indexes_are_asked(world: World) -> None:
    """A name that is not in the shard where its hash puts it is found: before ENOENT all indexes of the day are
    asked."""
    where = put_sharded(world.root, DAY, dict.fromkeys("abcdef", b"x"))
    other = next(path for name, path in where.items() if path != where["a"])
    put_container(other, {"a": b"misplaced", "misplaced": b"y"})
    (world.root / shard("a")).unlink()

    async def main() -> None:
        await world.start()
        world.opened()
        assert await world.find("a") == f"{DAY}/{other.name}"
        assert len(world.opened()) == len(set(where.values()) - {where["a"]})
        with pytest.raises(NoSuchPath):
            await world.find("nothing")
        assert world.opened() == []

    run(main)


@pytest.mark.parametrize(
    "layout",
    [
        None,
        b'{"shard_bits": 8, "placement": "moonlight"}',
        b'{"placement": "directory"}',
        b'{"shard_bits": 0, "placement": "directory"}',
        b'{"shard_bits": 33, "placement": "directory"}',
        b"{}",
    ],
)
def test_without_a_known_rule_every_index_is_read(world: World, layout: bytes | None) -> None:
    """A store without `.desfs.json`, or with a rule that is not known, is mounted by reading every index."""
    put_sharded(world.root, DAY, dict.fromkeys("abcdef", b"x"))
    (world.root / ".desfs.json").unlink()
    if layout is not None:
        put_layout(world.root, layout)

    async def main() -> None:
        await world.start()
        world.opened()
        assert await world.find("a") == shard("a")
        assert world.opened() == sorted({shard(name) for name in "abcdef"})
        assert world.problems.lines() == []

    run(main)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"shard_bits": "8"}',
        b'{"shard_bits": 1e99}',
        b'{"x": ' + b"[" * 60_000,
        b'{"shard_bits": 8}' + b" " * 70_000,
        b'{"placement": "\\ud800"}',
    ],
    ids=range(10),
)
def test_a_layout_that_is_garbage_is_reported_and_not_relied_on(world: World, garbage: bytes) -> None:
    put_sharded(world.root, DAY, dict.fromkeys("abc", b"x"))
    put_layout(world.root, garbage)

    async def main() -> None:
        await world.start()
        assert world.views.layout == Layout()
        assert await world.find("a") == shard("a")
        (line,) = world.problems.lines()
        assert line.startswith(".desfs.json: ")

    run(main)


def test_a_layout_that_goes_between_list_and_get_is_none(world: World) -> None:
    put_layout(world.root)
    world.store.before = once(lambda: world.remove(".desfs.json"), ".desfs.json", "tail")

    async def main() -> None:
        await world.start()
        assert world.views.layout == Layout()
        assert world.problems.lines() == []

    run(main)


def test_a_layout_that_is_written_later_is_used(world: World) -> None:
    async def main() -> None:
        await world.start()
        put_layout(world.root, LAYOUT)
        await world.views.refresh_root()
        assert world.views.layout == Layout(8, "directory", "path")

    run(main)


# --- the root ----------------------------------------------------------------------------------------------------


def test_the_root_has_days_and_other_names_that_hold_containers(world: World) -> None:
    """docs/semantics.md: The root has one directory per day (`2026-11-20`), and one per other `NAME.des` or `NAME/`
    that holds containers. The folders `_bigFiles/` and objects that are no containers are not shown."""
    world.put("2026-11-20/0.des", "a")
    world.put("2026-11-21.des", "b")
    world.put("archive/0.des", "c")
    world.put("single.des", "d")
    world.put("both/0.des", "e")
    world.put("both.des", "f")
    world.put("_bigFiles/looks-like-a-container.des", "g")
    (world.root / "foreign").mkdir()
    (world.root / "foreign/readme.txt").write_text("x")
    (world.root / "notes.txt").write_text("x")
    (world.root / "2026-13-45").mkdir()
    (world.root / "2026-13-45/no-day").write_text("x")
    (world.root / "2026-11-20/_bigFiles").mkdir()
    (world.root / "2026-11-20/_bigFiles/looks-like-a-container.des").write_text("x")
    (world.root / "2026-11-20/notes.txt").write_text("x")

    async def main() -> None:
        await world.start()
        shown = ["2026-11-20", "2026-11-21", "archive", "both", "single"]
        assert await world.views.root_names() == shown
        assert [await world.names(name) for name in shown] == [[b"a"], [b"b"], [b"c"], [b"e", b"f"], [b"d"]]
        for name in ("foreign", "notes", "notes.txt", "_bigFiles", "2026-13-45", "2026-11-21.des", "nothing"):
            with pytest.raises(NoSuchPath):
                await world.day(name)
        assert world.problems.lines() == []

    run(main)


def test_folders_without_containers_are_looked_at_once_a_minute(world: World) -> None:
    """A folder of the root that is no day, and holds no containers, costs one listing, and none for a minute; then
    a refresh lists it again if somebody has asked for it."""
    for name in ("foreign", "other"):
        (world.root / name).mkdir()
        (world.root / name / "readme.txt").write_text("x")
    clock = trio.testing.MockClock(rate=1.0)

    def listed() -> list[str]:
        keys = sorted(key for key in world.store.keys("list") if key)
        world.store.calls.clear()
        return keys

    async def ls() -> list[str]:
        names = await world.views.root_names()
        for name in ("foreign", "other"):
            if name not in names:
                with pytest.raises(NoSuchPath):
                    await world.day(name)
        return names

    async def main() -> None:
        await world.start()
        assert await ls() == []
        assert listed() == ["foreign/", "other/"]
        world.put("other/0.des", "a")
        clock.jump(55)
        assert await ls() == []
        assert listed() == []
        clock.jump(10)
        assert await ls() == []
        assert listed() == []  # who asks again does not wait
        assert await world.views.refresh_folders() == {"other"}
        assert listed() == ["foreign/", "other/"]
        assert await ls() == ["other"]
        clock.jump(100)
        assert await world.views.refresh_folders() == set()
        assert listed() == ["foreign/"]
        clock.jump(100)
        assert await world.views.refresh_folders() == set()
        assert listed() == []  # nobody has asked

    run(main, clock)


def test_names_in_the_root_that_cannot_be_shown_are_reported(world: World) -> None:
    """Names that cannot be shown are reported, never silently dropped."""
    world.put(".desfs.des", "a")
    put_container(world.root / os.fsdecode(b"odd\xff.des"), {"a": b"x"})
    put_container(world.root / DAY / os.fsdecode(b"odd\xff.des"), {"a": b"x"})
    world.put(f"{DAY}/0.des", "b")

    async def main() -> None:
        await world.start()
        assert await world.views.root_names() == [DAY]
        assert await world.names() == [b"b"]
        lines = world.problems.lines()
        assert len(lines) == 3
        assert lines[0].startswith(".desfs.des: ")
        assert lines[1].startswith("odd\\udcff.des: ")
        assert lines[2].startswith(f"{DAY}/odd\\udcff.des: ")

    run(main)


def test_days_come_and_go(world: World) -> None:
    world.put(f"{DAY}/0.des", "a")

    async def main() -> None:
        await world.start()
        view = await world.day()
        world.put("2026-11-21/0.des", "b")
        assert await world.views.refresh_root() == {"2026-11-21"}
        assert await world.views.refresh_root() == set()
        shutil.rmtree(world.root / DAY)
        assert await world.views.refresh_root() == {DAY}
        assert await world.views.root_names() == ["2026-11-21"]
        assert not world.views.is_current(view)
        with pytest.raises(NoSuchPath):
            await world.day()

    run(main)


def test_a_file_that_a_directory_hides_is_reported(world: World) -> None:
    """docs/semantics.md: Where a file and a directory have one name, the directory is shown and the file reported."""
    world.put(f"{DAY}/0.des", "a", "d/b/c")
    world.put(f"{DAY}/1.des", "a/x", "d/b")

    async def main() -> None:
        await world.start()
        assert await world.names() == [b"a/x", b"d/b/c"]
        assert (await world.find("a"), await world.find("d/b")) == (None, None)
        assert sorted(world.problems.lines()) == [
            f"{DAY}/0.des: file 'a' is hidden by a directory of that name",
            f"{DAY}/1.des: file 'd/b' is hidden by a directory of that name",
        ]

    run(main)


# --- refused containers ------------------------------------------------------------------------------------------


def test_a_day_with_a_refused_container_lists_the_rest_and_says_so(world: World) -> None:
    """docs/semantics.md: A container that is none is left out and reported; the day's other containers are shown."""
    world.put(f"{DAY}/0.des", "a")
    (world.root / DAY / "1.des").write_bytes(b"garbage" * 100)
    (world.root / DAY / "2.des").write_bytes(b"")

    async def main() -> None:
        await world.start()
        assert await world.names() == [b"a"]
        lines = world.problems.lines()
        assert len(lines) == 2
        assert all(f"{DAY}/{n}.des" in line for n, line in zip((1, 2), sorted(lines), strict=True))
        states = {key: (state, files) for key, _, state, files in (await world.day()).containers()}
        assert states == {
            f"{DAY}/0.des": ("open", 1),
            f"{DAY}/1.des": ("refused", None),
            f"{DAY}/2.des": ("refused", None),
        }

    run(main)


def test_a_refused_container_is_shown_when_it_was_put_right(world: World) -> None:
    (world.root / DAY).mkdir()
    (world.root / DAY / "0.des").write_bytes(b"garbage" * 100)
    world.put(f"{DAY}/1.des", "b")

    async def main() -> None:
        await world.start()
        assert await world.names() == [b"b"]
        world.put(f"{DAY}/0.des", "a")
        await (await world.day()).refresh()
        assert await world.names() == [b"a", b"b"]
        assert world.problems.lines() == []

    run(main)


def test_what_was_said_of_a_container_goes_with_it(world: World) -> None:
    (world.root / DAY).mkdir()
    raw = build([Item(b"../escape", b"x"), Item(b"ok", b"y")])
    (world.root / DAY / "0.des").write_bytes(raw)
    (world.root / DAY / "1.des").write_bytes(patched(raw, -1, b"\xff"))
    world.put(f"{DAY}/2.des", "b")

    async def main() -> None:
        await world.start()
        assert await world.names() == [b"b", b"ok"]
        assert len(world.problems.lines()) == 2
        world.remove(f"{DAY}/0.des")
        world.remove(f"{DAY}/1.des")
        await (await world.day()).refresh()
        assert world.problems.lines() == []

    run(main)


def test_strict_answers_for_the_whole_day(tmp_path: Path) -> None:
    """docs/semantics.md: With `-o strict` the day of such a container answers EIO."""
    world = World(tmp_path, strict=True)
    put_sharded(world.root, DAY, {"a": b"x", "b": b"y"})
    (world.root / DAY / "zz.des").write_bytes(b"garbage" * 100)
    world.put("2026-11-21/0.des", "fine")

    async def main() -> None:
        await world.start()
        for path in ("a", "nothing"):
            with pytest.raises(DamagedDay, match=r"zz\.des") as caught:
                await world.find(path)
            assert errno_of(caught.value) == errno.EIO
        with pytest.raises(DamagedDay):
            await world.names()
        assert await world.names("2026-11-21") == [b"fine"]
        world.remove(f"{DAY}/zz.des")
        await (await world.day()).refresh()
        assert await world.find("a") == shard("a")

    run(main)


# --- containers that change under us -----------------------------------------------------------------------------


def once(action: Callable[[], object], key: str, method: str = "get") -> Callable[[str, str], None]:
    """A hook that does something before the first call of a method for a key."""
    done = threading.Event()

    def before(called: str, about: str) -> None:
        if (called, about) == (method, key) and not done.is_set():
            done.set()
            action()

    return before


@pytest.mark.parametrize("sharded", [True, False])
def test_a_container_replaced_between_list_and_open_is_read_as_it_is_now(world: World, sharded: bool) -> None:
    world.put(f"{DAY}/0.des", "old", "same")
    world.put(f"{DAY}/1.des", "other")
    if sharded:
        put_layout(world.root, b'{"shard_bits": 4, "placement": "directory"}')
    world.store.before = once(lambda: world.put(f"{DAY}/0.des", "new", "same", content="!"), f"{DAY}/0.des")

    async def main() -> None:
        await world.start()
        assert await world.names() == [b"new", b"other", b"same"]
        assert await world.find("new") == f"{DAY}/0.des"
        with pytest.raises(NoSuchPath):
            await world.find("old")

    run(main)


def test_a_container_removed_between_list_and_open_is_not_missed(world: World) -> None:
    world.put(f"{DAY}/0.des", "gone")
    world.put(f"{DAY}/1.des", "other")
    world.store.before = once(lambda: world.remove(f"{DAY}/0.des"), f"{DAY}/0.des")

    async def main() -> None:
        await world.start()
        assert await world.names() == [b"other"]
        assert world.problems.lines() == []

    run(main)


def test_a_container_that_never_holds_still_is_an_error_not_a_loop(world: World) -> None:
    world.put(f"{DAY}/0.des", "a")
    count = iter(range(1000))

    def before(method: str, key: str) -> None:
        if method == "get":
            world.put(f"{DAY}/0.des", "a", content=str(next(count)))

    world.store.before = before

    async def main() -> None:
        await world.start()
        with pytest.raises(StoreError, match="changed 3 times"):
            await world.names()
        world.store.before = lambda method, key: None
        assert await world.names() == [b"a"]

    run(main)


def test_what_another_lookup_finds_out_reaches_the_shards_that_were_open_already(world: World) -> None:
    """Shard x was open when a lookup in shard y found that the day has changed: x shows its new container too, and the
    kernel hears of it."""
    where = put_sharded(world.root, DAY, {"a": b"old a", "b": b"old b"})
    assert where["a"] != where["b"]

    async def main() -> None:
        await world.start()
        view = await world.day()
        old = await view.find(b"a")
        assert old is not None

        def replace() -> None:
            put_container(where["a"], {"a": b"new and longer"})
            put_container(where["b"], {"b": b"new and longer"})

        world.store.before = once(replace, shard("b"))
        assert await world.find("b") == shard("b")
        new = await view.find(b"a")
        assert new is not None
        assert new.container is not old.container
        assert [change.paths for change in world.changes] == [[b"a"]]
        assert (await view.load()).file_count() == 2

    run(main)


def test_what_all_indexes_together_show_otherwise_than_one_of_them_is_told(world: World) -> None:
    """docs/semantics.md: A lookup that needs one index alone decides by what is in that index, until the day is listed.

    Where a listing of the day then finds a newer container of that name in another shard, the kernel hears of this
    name, and of no other."""
    where = put_sharded(world.root, DAY, {"a": b"own shard", "b": b"b", "dir/c": b"c"})
    other = world.root / DAY / "zz.des"
    put_container(other, {"a": b"newer, elsewhere", "dir/new": b"x"})
    later = where["a"].stat().st_mtime_ns + 10**10
    os.utime(other, ns=(later, later))

    async def main() -> None:
        await world.start()
        for name in ("a", "b", "dir/c"):
            assert await world.find(name) == shard(name)
        assert world.changes == []
        await world.names()
        assert await world.find("a") == f"{DAY}/zz.des"
        assert world.changes == [Changes(DAY.encode(), [b"a"], [])]

    run(main)


def test_a_container_that_is_replaced_twice_during_a_refresh_leaves_no_slot_behind(world: World) -> None:
    """A version that was opened and replaced before the refresh was over has been seen by nobody."""
    keys = [f"{DAY}/0.des", f"{DAY}/1.des"]

    def put(version: int) -> set[str]:
        for key in keys:
            world.put(key, key[-5], content=f"version {version}")
        return {info.etag for info in world.store.inner.list(f"{DAY}/").objects}

    def shown() -> set[str]:
        return {container.info.etag for container in world.views.slots}

    go = threading.Event()

    async def main() -> None:
        first = put(1)
        await world.start()
        await world.names()
        passing = put(2)
        world.store.before = once(lambda: go.wait(20), keys[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon((await world.day()).refresh)
            await until(lambda: bool(shown() & passing))
            last = put(3)
            go.set()
        assert await world.names() == [b"0", b"1"]
        assert shown() == first | last  # the first stay open for a while, for those who have their files open
        assert len(list(world.views.slots)) == 4

    run(main)


def test_a_reader_who_was_cancelled_leaves_nothing_half_open(world: World) -> None:
    for n in range(8):
        world.put(f"{DAY}/{n}.des", f"f{n}")
    go = threading.Event()
    world.store.before = lambda method, key: None if method == "list" or key.endswith("0.des") else wait(go)

    async def main() -> None:
        await world.start()
        with trio.move_on_after(0.05):
            await world.names()
        go.set()
        assert await world.names() == [b"f%d" % n for n in range(8)]
        assert len(list(world.views.slots)) == 8

    run(main)


def wait(event: threading.Event) -> None:
    event.wait(20)


# --- refresh -----------------------------------------------------------------------------------------------------


def test_a_refresh_shows_what_came_and_what_went_and_tells_exactly_that(world: World) -> None:
    """New containers join the day's view; what the kernel knows and is not so any more is named, nothing else."""
    world.put(f"{DAY}/0.des", "stays", "dir/stays", "old/only")
    world.put(f"{DAY}/1.des", "goes", "changes", "becomes-a-directory")

    async def main() -> None:
        await world.start()
        await world.names()
        view = await world.day()
        await view.refresh()
        assert world.changes == []
        world.put(f"{DAY}/1-000001.des", "changes", "new", "dir/new")
        await view.refresh()
        assert world.changes == [Changes(DAY.encode(), [b"changes"], [b"dir"])]
        world.changes.clear()
        world.remove(f"{DAY}/1.des")
        world.put(f"{DAY}/2.des", "becomes-a-directory/x")
        await view.refresh()
        folders = [b"becomes-a-directory"]
        assert world.changes == [Changes(DAY.encode(), [b"becomes-a-directory", b"goes"], folders)]
        world.changes.clear()
        world.remove(f"{DAY}/0.des")
        await view.refresh()
        folders = [b"dir", b"old"]
        assert world.changes == [Changes(DAY.encode(), [b"dir/stays", b"old", b"old/only", b"stays"], folders)]
        assert await world.names() == [b"becomes-a-directory/x", b"changes", b"dir/new", b"new"]

    run(main)


def test_many_changes_are_told_in_pieces(world: World) -> None:
    """A seal concerns all names of a day: other requests go on between the pieces."""
    names = [f"f{number:04d}" for number in range(1200)]
    world.put(f"{DAY}/0-000001.des", *names)

    async def main() -> None:
        await world.start()
        assert len(await world.names()) == 1200
        (world.root / DAY / "0-000001.des").rename(world.root / DAY / "0.des")
        await (await world.day()).refresh()
        assert [path.decode() for change in world.changes for path in change.paths] == names
        assert max(len(change.paths) for change in world.changes) == 500

    run(main)


def test_a_refresh_opens_only_what_is_new_and_only_shards_in_use(world: World) -> None:
    put_sharded(world.root, DAY, dict.fromkeys("abcdef", b"x"))

    async def main() -> None:
        await world.start()
        await world.find("a")
        world.opened()
        part = shard("a").replace(".des", "-000001.des")
        world.put(part, "a")
        world.put(shard("b").replace(".des", "-000001.des"), "b")
        await (await world.day()).refresh()
        assert world.opened() == [part]
        assert await world.find("a") == part
        assert [change.paths for change in world.changes] == [[b"a"]]

    run(main)


@pytest.mark.parametrize("failing", ["list", "get"])
def test_a_refresh_that_fails_keeps_the_old_view_whole(world: World, failing: str) -> None:
    """A listing error keeps the last good view."""
    world.put(f"{DAY}/0.des", "a")
    world.put(f"{DAY}/1.des", "b")

    async def main() -> None:
        await world.start()
        await world.names()
        view = await world.day()
        world.remove(f"{DAY}/1.des")
        world.put(f"{DAY}/2.des", "c")
        world.put(f"{DAY}/3.des", "d")

        def fail(method: str, key: str) -> None:
            if method == failing and not key.endswith("2.des"):
                raise StoreUnavailable("down")

        world.store.before = fail
        slots = {container.slot for container in world.views.slots}
        with pytest.raises(StoreUnavailable):
            await view.refresh()
        assert await world.names() == [b"a", b"b"]
        assert world.changes == []
        assert {container.slot for container in world.views.slots} == slots
        world.store.before = lambda method, key: None
        await view.refresh()
        assert await world.names() == [b"a", b"c", b"d"]
        assert [change.paths for change in world.changes] == [[b"b"]]

    run(main)


@pytest.mark.parametrize("word", ["503", "reset", "stall", "short"])
def test_a_first_listing_that_fails_can_be_asked_again(tmp_path: Path, word: str) -> None:
    put_container(tmp_path / DAY / "0.des", {"a": b"x"})
    store = FaultyStore(FileStore(tmp_path))
    views = Views(StoreThreads(store), Problems())

    async def main() -> None:
        await views.start()
        view = await views.day(DAY)
        for script in (f"{word} ok", f"ok {word} ok"):
            store.script = script
            with pytest.raises(DesfsError):
                await view.load()
        store.script = "ok"
        assert (await view.load()).file_count() == 1

    run(main)


def test_an_object_that_may_not_be_read_fails_the_day_not_the_mount(world: World) -> None:
    world.put(f"{DAY}/0.des", "a")
    world.put("2026-11-21/0.des", "b")

    def deny(method: str, key: str) -> None:
        if (method, key) == ("get", f"{DAY}/0.des"):
            raise AccessDenied(key)

    world.store.before = deny

    async def main() -> None:
        await world.start()
        for _ in range(2):
            with pytest.raises(AccessDenied):
                await world.names()
        assert await world.names("2026-11-21") == [b"b"]
        assert world.problems.lines() == [f"{DAY}/0.des"]  # the store's words, which are its key here
        world.store.before = lambda method, key: None
        assert await world.names() == [b"a"]
        assert world.problems.lines() == []

    run(main)


@pytest.mark.parametrize("failing", ["list", "get"])
def test_those_who_wait_for_one_that_fails_fail_with_it(world: World, failing: str) -> None:
    """A store that answers after its deadline: the lookups that waited share the failure instead of trying in their
    turn; the next one tries again."""
    put_sharded(world.root, DAY, dict.fromkeys(("a", "b"), b"x"))
    go = threading.Event()

    def fail(method: str, key: str) -> None:
        if method == failing and key.startswith(DAY):
            go.wait(20)
            raise StoreUnavailable("no answer in time")

    def calls() -> int:
        return sum(key.startswith(DAY) for key in world.store.keys(failing))

    failures: list[str] = []

    async def lookup() -> None:
        try:
            await world.find("a")
        except StoreUnavailable as error:
            failures.append(str(error))

    async def main() -> None:
        await world.start()
        world.store.before = fail
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(lookup)
            await until(lambda: world.store.running == 1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            go.set()
        assert failures == ["no answer in time"] * 6
        assert calls() == 1
        await lookup()
        assert len(failures) == 7
        assert calls() == 2
        world.store.before = lambda method, key: None
        assert await world.find("a") == shard("a")

    run(main)


def test_closed_days_are_listed_again_much_more_rarely(world: World) -> None:
    """docs/semantics.md: Open days are listed again every `refresh=` seconds (10), other days sixty times more rarely.

    Old days do not change: their mtime is their end, and never changes."""
    world.put("2020-02-29/0.des", "a")
    world.put("2999-01-01/0.des", "b")
    world.put("archive/0.des", "c")

    async def main() -> None:
        await world.start()
        old, new, other = [await world.day(name) for name in ("2020-02-29", "2999-01-01", "archive")]
        assert not any(day.due(trio.current_time() + 1e9, 10) for day in (old, new, other))
        began = trio.current_time()
        for day in (old, new, other):
            await day.load()
        ended = trio.current_time()
        refresh_s = MountSettings().refresh
        assert refresh_s == 10
        due = {
            after: [day.due(since + after, refresh_s) for day in (old, new, other)]
            for since, after in ((began, 9.9), (ended, 10.1), (began, 599.9), (ended, 600.1))
        }
        assert due == {
            9.9: [False, False, False],
            10.1: [False, True, True],
            599.9: [False, True, True],
            600.1: [True, True, True],
        }
        assert old.mtime_ns == 1_583_020_800 * 10**9
        assert new.mtime_ns == (world.root / "2999-01-01/0.des").stat().st_mtime_ns

    run(main)


@pytest.mark.parametrize("name", ["2020-02-29", "2999-01-01"])
def test_no_two_contents_of_a_day_have_the_same_time(world: World, name: str) -> None:
    """docs/semantics.md: When a day's containers change under a mount, a nanosecond is added for each change, so that
    everybody notices.

    The kernel keeps a listing as long as the directory's mtime is the same: it changes with every change, also of a
    closed day, whatever the times of the containers; and not before the new content is there."""
    world.put(f"{name}/0.des", "a")
    os.utime(world.root / name / "0.des", ns=(10**18, 10**18))
    seen: list[tuple[int, list[bytes]]] = []

    async def look() -> None:
        view = await world.day(name)
        await view.ensure_listed()
        seen.append((view.mtime_ns, await world.names(name)))

    async def main() -> None:
        await world.start()
        await look()
        view = await world.day(name)
        during: list[int] = []
        world.store.before = lambda *_: during.append(view.mtime_ns)
        for number in (1, 2):  # no newer than what is there
            world.put(f"{name}/{number}.des", f"b{number}")
            os.utime(world.root / name / f"{number}.des", ns=(10**17, 10**17))
            during.clear()
            await view.refresh()
            assert set(during) == {seen[-1][0]}
            await look()
        world.remove(f"{name}/0.des")
        await view.refresh()
        await look()
        shutil.rmtree(world.root / name)
        await world.views.refresh_root()
        world.put(f"{name}/2.des", "again")
        os.utime(world.root / name / "2.des", ns=(10**18, 10**18))
        await world.views.refresh_root()
        await look()
        await (await world.day(name)).refresh()  # nothing new
        await look()
        assert len({time_ns for time_ns, _ in seen}) == len({tuple(names) for _, names in seen}) == 5
        assert seen[-1] == seen[-2]
        first, second, third = [time_ns for time_ns, _ in seen[:3]]
        assert (second, third) == (first + 1, first + 2)

    run(main)


def test_no_two_listings_of_the_root_have_the_same_time(world: World) -> None:
    """The same for the root, and a folder that is found to hold containers; until then it may show more at any time."""
    world.put(f"{DAY}/0.des", "a")
    times: list[int] = []
    clock = trio.testing.MockClock(autojump_threshold=0.01)

    async def look() -> list[str]:
        await world.views.refresh_root()
        await world.views.refresh_folders()
        names = await world.views.root_names()
        times.append(world.views.root_mtime_ns)
        return names

    async def main() -> None:
        await world.start()
        assert await look() == [DAY]
        assert not world.views.may_show_more()
        (world.root / "folder").mkdir()
        (world.root / "folder/readme.txt").write_bytes(b"x")
        assert await look() == [DAY]
        assert world.views.may_show_more()
        world.put("folder/0.des", "b")
        await trio.sleep(61)
        assert await look() == [DAY]
        assert await look() == [DAY, "folder"]
        assert not world.views.may_show_more()
        assert await look() == [DAY, "folder"]
        assert len(set(times)) == 3

    run(main, clock)


def test_names_that_are_not_there_are_remembered_up_to_a_limit(world: World) -> None:
    """Who was told that a name is not there need not ask again: it is told when it comes. Beyond a megabyte of such
    names, or ten thousand, each has to be asked for again."""
    world.put(f"{DAY}/0.des", "here")
    folders = "/".join(["f" * 250] * 15)

    async def absent(path: str) -> bool:
        with pytest.raises(NoSuchPath) as caught:
            await world.find(path)
        return caught.value.for_long

    async def main() -> None:
        await world.start()
        assert await absent("comes")
        assert await absent("d")
        assert await absent("d/comes")
        kept = [await absent(f"{folders}/{number}") for number in range(400)]
        assert 250 < sum(kept) == kept.index(False) < 300
        assert await absent("comes")
        view = await world.day()
        world.put(f"{DAY}/1.des", "comes", "d/comes", f"{folders}/0", f"{folders}/399")
        await view.refresh()
        (change,) = world.changes
        first = folders.encode() + b"/0"
        assert {b"comes", b"d", b"d/comes", first} == set(change.paths)
        world.put(f"{DAY}/2.des", "late")
        assert await absent("late")
        world.changes.clear()
        await view.refresh()
        assert world.changes[0].paths == [b"late"]

    run(main)


def test_shards_are_opened_side_by_side(world: World) -> None:
    """Lookups in different shards do not wait for one another, nor for a listing of the day that is under way."""
    put_sharded(world.root, DAY, dict.fromkeys(("a", "b", "c"), b"x"))
    assert len({shard(name) for name in "abc"}) == 3
    together = threading.Barrier(2, timeout=20)
    stalled = threading.Event()

    def meet(method: str, key: str) -> None:
        if method == "get" and key in (shard("a"), shard("b")):
            together.wait()
        if method == "list" and key:
            stalled.wait(20)

    async def main() -> None:
        await world.start()
        view = await world.day()
        await view.ensure_listed()
        world.store.before = meet
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.find, "a")
            nursery.start_soon(world.find, "b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.refresh)
            await until(lambda: world.store.running == 1)
            assert await world.find("c") == shard("c")
            assert await world.find("a") == shard("a")
            stalled.set()
        assert sorted(set(world.opened())) == sorted(shard(name) for name in "abc")

    run(main)


def test_a_lookup_and_a_listing_open_a_container_once(world: World) -> None:
    """Who finds a container being opened waits for it; the file's inode is the same for both."""
    put_sharded(world.root, DAY, {f"{n}": b"x" for n in range(40)})
    slots: set[int] = set()

    async def find(name: str) -> None:
        found = await (await world.day()).find(name.encode())
        assert found is not None
        slots.add(found.container.slot)

    async def main() -> None:
        await world.start()
        world.opened()
        async with trio.open_nursery() as nursery:
            for n in range(40):
                nursery.start_soon(find, f"{n}")
            nursery.start_soon(world.names)
        keys = world.opened()
        assert sorted(set(keys)) == keys
        assert slots == {container.slot for container in world.views.slots}

    run(main)


def test_a_refresh_that_was_asked_for_meanwhile_is_not_made_again(world: World) -> None:
    world.put(f"{DAY}/0.des", "a")

    async def main() -> None:
        await world.start()
        view = await world.day()
        await view.refresh()  # nothing is shown yet
        assert world.store.keys("list") == [""]
        before = trio.current_time()
        await world.names()
        await view.refresh(unless_since=before)
        assert world.store.keys("list") == ["", f"{DAY}/"]
        await view.refresh(unless_since=trio.current_time())
        assert world.store.keys("list") == ["", f"{DAY}/", f"{DAY}/"]

    run(main)


def test_readers_of_many_containers_share_the_work(world: World) -> None:
    """Ten lookups at once open each container once, and no more calls run than there are threads for."""
    for n in range(64):
        world.put(f"{DAY}/{n:02x}.des", f"f{n}")

    async def main() -> None:
        await world.start()
        async with trio.open_nursery() as nursery:
            for n in range(10):
                nursery.start_soon(world.find, f"f{n}")
        assert world.opened() == [f"{DAY}/{n:02x}.des" for n in range(64)]
        assert world.store.most_running <= 32

    run(main)
