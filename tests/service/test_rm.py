"""`desfs rm` as a user runs it, and beside others."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from assignment.catalog import Catalog, ContainerState, Lease
from des_format.shards import part_name
from desfs.errors import DesfsError, ObjectExists
from desfs.merging.leases import LeaseBusy
from desfs.removal.rm import NotRemoved
from desfs.store.delegating import Delegating
from desfs.store.file import FileStore
from tests import servers
from tests.mount.mounting import desfs
from tests.removing import BIG, DAY, World, put_day, put_part, shard_of

FILES = {name: name.encode() for name in ("a", "b", "c", "d/1", "d/2", "d/e/3")} | {"big": b"x" * BIG}
SHARD = shard_of("a")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    put_day(world.root, FILES)
    world.repair()
    return world


def but(*names: str) -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if name not in names}


# --- the command -----------------------------------------------------------------------------------------------------


def test_files_and_directories(world: World) -> None:
    """One line that says what was done; the same again says that it is done already."""
    rm = ("rm", world.root, "--catalog", world.url)
    done = desfs(*rm, f"{DAY}/a", f"/{DAY}//./c")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("removed 2 files: ")
    assert world.shown() == but("a", "c")
    done = desfs(*rm, "-r", f"{DAY}/d/", f"{DAY}/a", "--json", "--wait", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "files": [f"{DAY}/d/1", f"{DAY}/d/2", f"{DAY}/d/e/3"],
        "containers": len(set(map(shard_of, ("d/1", "d/e/3")))),
        "days": 1,
        "gone": [f"{DAY}/a"],
        "missing": [],
    }
    assert world.shown() == but("a", "c", "d/1", "d/2", "d/e/3")
    world.assert_agrees()
    done = desfs(*rm, "--recursive", str(DAY))
    assert (done.returncode, world.shown()) == (0, {})
    done = desfs(*rm, "--recursive", str(DAY))
    assert (done.returncode, done.stdout) == (0, "removed 0 files; 1 path gone already\n")


def test_all_or_nothing(world: World) -> None:
    """docs/semantics.md: All of the paths are removed that it is given, or, when one of them is not there, none.

    Each of those that are not has a line."""
    before = world.objects()
    done = desfs("rm", world.root, f"{DAY}/a", f"{DAY}/nope", f"{DAY}/d", "x/y", f"{DAY}/a/b", "--catalog", world.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "desfs: x/y: is not below a day, such as 2026-11-20/x/y",
        f"desfs: {DAY}/d: is a directory: -r removes it with what is in it",
        f"desfs: {DAY}/nope: no such file or directory",
        f"desfs: {DAY}/a/b: no such file or directory",
    ]
    assert world.objects() == before
    # With --force what is not there is no error; a directory is.
    assert desfs("rm", "--force", world.root, f"{DAY}/nope", f"{DAY}/d", "--catalog", world.url).returncode == 1
    done = desfs("rm", "-f", world.root, f"{DAY}/a", f"{DAY}/nope", "2020-01-01/x", "--catalog", world.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "removed 1 file: 1 container of tombstones in 1 day; 2 paths never there\n"
    assert world.shown() == but("a")


def test_what_was_removed_before_is_no_error(world: World) -> None:
    """docs/semantics.md: A path that was removed before is no error, so that a command which was interrupted can be
    started again."""
    world.remove(f"{DAY}/a")
    done = desfs("rm", world.root, f"{DAY}/a", f"{DAY}/b", "--catalog", world.url)
    assert (done.returncode, done.stderr, world.shown()) == (0, "", but("a", "b"))


def test_a_dry_run_names_what_would_go(world: World) -> None:
    before = world.objects()
    done = desfs("rm", "--dry-run", "-r", world.root, f"{DAY}/d", "--catalog", world.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:-1] == [f"{DAY}/d/1", f"{DAY}/d/2", f"{DAY}/d/e/3"]
    assert done.stdout.splitlines()[-1].startswith("would remove 3 files: ")
    assert world.objects() == before


def test_a_container_that_is_none_is_named(world: World) -> None:
    """Nobody knows what is in it; exit status 1, though the rest was done."""
    (world.root / f"{DAY}/{part_name(SHARD, 9)}").write_bytes(b"no container" * 100)
    done = desfs("rm", world.root, f"{DAY}/a", "--catalog", world.url)
    assert done.returncode == 1
    assert done.stderr.startswith(f"desfs: not all was looked at: {DAY}/{part_name(SHARD, 9)}: header at byte 0: ")
    assert world.compare().counts["damage"] == 1


@pytest.mark.parametrize(
    ("catalog", "said"),
    [
        ((), "--catalog is missing"),
        (("--catalog", "/not/there"), "--catalog /not/there: no such file"),
        (("--catalog", "postgresql://u:secret@host/d"), "a password on a command line"),
    ],
)
def test_usage(world: World, catalog: tuple[str, ...], said: str) -> None:
    done = desfs("rm", world.root, f"{DAY}/a", *catalog)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "secret" not in done.stderr


def test_in_s3_with_postgres(s3: servers.S3Server, bucket: str, postgres: str, tmp_path: Path) -> None:
    """What a packer has put is removed, and stays removed when the packer goes on."""
    env = {**s3.environ(), "DESFS_CATALOG": postgres, "DESFS_LOG_LEVEL": "error"}
    url = f"s3://{bucket}/store"

    def pack(**files: bytes) -> None:
        for name, data in files.items():
            (tmp_path / "spool").mkdir(exist_ok=True)
            (tmp_path / "spool" / name).write_bytes(data)
        done = desfs(
            "packer", "--once", "--spool", tmp_path / "spool", "--store", url, "--settle", "0", "--shard-bits", "1",
            env=env,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")

    pack(a=b"1", b=b"2", c=b"3")
    day = desfs("ls", url, env=env).stdout.strip()
    done = desfs("rm", url, f"{day}/a", f"{day}/b", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert desfs("ls", url, day, env=env).stdout == "c\n"
    pack(d=b"4", b=b"new")
    assert desfs("ls", url, day, env=env).stdout == "b\nc\nd\n"
    assert desfs("cat", url, f"{day}/b", env=env).stdout == "new"
    done = desfs("verify", url, env=env)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


# --- beside others ---------------------------------------------------------------------------------------------------


def test_a_shard_that_others_hold_is_waited_for(world: World) -> None:
    """Until they let it go; not for ever."""

    async def work(catalog: Catalog) -> None:
        lease = await catalog.acquire(DAY, SHARD, "packer", 600.0)
        assert lease is not None
        env = {"DESFS_CATALOG": world.url}
        busy = await asyncio.to_thread(desfs, "rm", world.root, f"{DAY}/a", "--wait", "0", env=env)
        assert busy.returncode == 1
        assert busy.stderr.startswith(f"desfs: shard {SHARD} of {DAY}: ")
        assert f"{DAY}/{part_name(SHARD, 2)}" not in world.objects()
        waiting = asyncio.create_task(asyncio.to_thread(desfs, "rm", world.root, f"{DAY}/a", env=env))
        await catalog.release(lease)
        assert (await waiting).returncode == 0

    world.run(work)
    assert world.shown() == but("a")
    with pytest.raises(LeaseBusy):
        world.run(lambda catalog: _hold(catalog, world))


async def _hold(catalog: Catalog, world: World) -> None:
    assert await catalog.acquire(DAY, shard_of("b"), "packer", 600.0) is not None
    await asyncio.to_thread(world.remove, f"{DAY}/b")


def test_a_tombstone_that_was_not_committed_is_written_again(world: World) -> None:
    """A mount shows the file no more, but the collector would bring it back."""

    async def die(catalog: Catalog, lease: Lease) -> str:
        record = await catalog.begin_part(lease)
        put_part(world.root, record.object_key, {}, deleted=["a"])
        return record.object_key

    key = world.with_lease(SHARD, die)
    assert world.shown() == but("a")
    assert world.remove(f"{DAY}/a").files == [f"{DAY}/a"]
    world.end_leases()
    world.repair(grace=0)
    assert key not in world.objects()
    assert world.shown() == but("a")


class Rival(Delegating):
    """Somebody without a catalog, who is faster with a key, once."""

    def __init__(self, world: World) -> None:
        super().__init__(FileStore(world.root))
        self._world = world
        self.key = ""

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        if not self.key:
            self.key = key
            put_part(self._world.root, key, {"rival's": b"1"})
        return super().put(key, source, if_absent=if_absent)


def test_somebody_who_is_faster_with_a_key_loses_nothing(world: World) -> None:
    """What an import has put is content: its row is not left to the collector."""
    rival = Rival(world)
    world.remove(f"{DAY}/a", store=rival)
    with pytest.raises(ObjectExists):
        rival.put(rival.key, b"")
    assert world.rows()[rival.key].state is ContainerState.COMMITTED
    world.end_leases()
    world.repair(grace=0)
    world.assert_agrees(grace=0)
    assert world.shown() == but("a") | {"rival's": b"1"}


def test_what_an_import_has_put_is_removed_for_good(world: World) -> None:
    """The catalog gets to know its container, so that a merge finds what the tombstone hides, and keeps it as long."""
    key = f"{DAY}/{part_name(SHARD, 5)}"
    put_part(world.root, key, {"imported": b"1", "a": b"newer"})
    world.remove(f"{DAY}/a")
    assert world.rows()[key].state is ContainerState.COMMITTED
    assert world.shown() == but("a") | {"imported": b"1"}
    assert f"{DAY}/{part_name(SHARD, 6)}" in world.objects()


def test_what_was_modified_in_the_future_cannot_be_hidden(world: World) -> None:
    """By a tombstone of another shard, that is; said so, and not waited for."""
    path = put_part(world.root, f"{DAY}.des", {"whole": b"1"})
    world.remove(f"{DAY}/whole")
    path = put_part(world.root, f"{DAY}/shard_10.des", {"decimal": b"1"})
    future = path.stat().st_mtime_ns + 3600 * 10**9
    os.utime(path, ns=(future, future))
    with pytest.raises(DesfsError, match="modified in the future"):
        world.remove(f"{DAY}/decimal")


def test_an_empty_store(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(NotRemoved):
        world.remove(f"{DAY}/a")
    assert world.remove(f"{DAY}/a", force=True).missing == [f"{DAY}/a"]
