"""`desfs verify --catalog`: what it finds, what it repairs, and what it leaves alone."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from des_format.shards import part_name
from desfs.errors import AccessDenied, NoSuchObject, StoreError, StoreUnavailable
from desfs.store.base import Answer, Listing
from desfs.store.delegating import Delegating
from desfs.store.file import FileStore
from tests import servers
from tests.crash import Shown
from tests.fakes.faulty_store import FaultyStore
from tests.mount.mounting import desfs
from tests.mount.stores import WatchedStore
from tests.removing import BIG, DAY, LAYOUT, World, file_id, put_day, put_part, shard_of

FILES = {name: name.encode() for name in ("a", "b", "c", "d/1", "d/2")} | {"big": b"x" * BIG}
SHARD = shard_of("a")
KEY = f"{DAY}/{part_name(SHARD, 1)}"
BIG_KEY = f"{DAY}/_bigFiles/big"
OWN = {name: data for name, data in FILES.items() if shard_of(name) == SHARD}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A day whose containers the catalog knows."""
    world = World(tmp_path)
    put_day(world.root, FILES)
    world.repair()
    world.assert_agrees()
    return world


def found(world: World) -> list[tuple[str, str, str | None]]:
    return [(each.kind, each.container, each.entry) for each in world.findings]


def begin(world: World, *, put: bool = True, packed: bool = True, lives: bool = False) -> ContainerRecord:
    """A part whose upload has died, or is under way."""

    async def work(catalog: Catalog, lease: Lease) -> ContainerRecord:
        record = await catalog.begin_part(lease, at_least=2, mark=file_id(0))
        if put:
            put_part(world.root, record.object_key, {"a": b"orphan"}, packed=packed)
        return record

    return world.with_lease(SHARD, work, lives=lives)


def pack_again(world: World) -> None:
    """What the upload that died had is committed under a newer generation."""

    async def work(catalog: Catalog, lease: Lease) -> None:
        record = await catalog.begin_part(lease)
        put_part(world.root, record.object_key, {"a": FILES["a"]}, packed=True)
        info = world.objects()[record.object_key]
        committed = replace(record, size=info.size, etag=info.etag, files=1, state=ContainerState.COMMITTED)
        await catalog.commit_container(lease, committed)

    world.with_lease(SHARD, work)


def merge(world: World) -> ContainerRecord:
    """The part of the shard becomes a new one's content."""

    async def work(catalog: Catalog, lease: Lease) -> ContainerRecord:
        record = await catalog.begin_part(lease, at_least=2)
        put_part(world.root, record.object_key, OWN, packed=True)
        info = world.objects()[record.object_key]
        committed = replace(record, size=info.size, etag=info.etag, files=len(OWN), state=ContainerState.COMMITTED)
        await catalog.commit_container(lease, committed, supersedes=[KEY])
        return committed

    return world.with_lease(SHARD, work)


def forget(world: World, *keys: str) -> None:
    """Rows say that the containers of a shard are deleted."""

    async def work(catalog: Catalog, lease: Lease) -> None:
        await catalog.delete_containers(lease, keys)

    world.with_lease(SHARD, work)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_container_that_is_missing(world: World) -> None:
    """Damage, and none that a repair hides: whether data is lost people decide."""
    (world.root / KEY).unlink()
    for _ in range(2):
        world.compare()
        assert found(world) == [("damage", KEY, None)]
        assert world.findings[0].problem == "is in the catalog, and the store does not have it"
        world.repair(grace=0, external_grace=10**6)
    assert world.rows()[KEY].state is ContainerState.COMMITTED


def test_a_container_that_is_another_one(world: World) -> None:
    put_part(world.root, KEY, {"a": b"not what it was, and longer than that"})
    world.compare()
    ((kind, key, _),) = found(world)
    assert (kind, key) == ("damage", KEY)
    assert " bytes with the ETag " in world.findings[0].problem


def test_a_row_that_counts_other_entries(world: World) -> None:
    record = replace(begin(world), size=0)

    async def work(catalog: Catalog, lease: Lease) -> None:
        info = world.objects()[record.object_key]
        wrong = replace(record, size=info.size, etag=info.etag, files=2, state=ContainerState.COMMITTED)
        await catalog.adopt_containers(lease, [wrong])

    world.with_lease(SHARD, work)
    world.compare()
    assert found(world) == [("damage", record.object_key, None)]
    assert world.findings[0].problem == "found 1 entries, want 2 as in the catalog"


@pytest.mark.parametrize("size", [None, BIG - 1])
def test_an_external_object_that_is_missing_or_too_short(world: World, size: int | None) -> None:
    if size is None:
        (world.root / BIG_KEY).unlink()
    else:
        os.truncate(world.root / BIG_KEY, size)
    world.compare()
    assert found(world) == [("damage", f"{DAY}/{part_name(shard_of('big'), 1)}", "big")]
    assert BIG_KEY in world.findings[0].problem


def test_a_container_that_is_none(world: World) -> None:
    """Named, and not adopted."""
    path = world.root / f"{DAY}/{part_name(SHARD, 5)}"
    path.write_bytes(b"no container" * 100)
    assert world.repair(grace=0).adopted == 0
    world.compare()
    assert ("damage", f"{DAY}/{path.name}", None) in found(world)


# --- what is left over -----------------------------------------------------------------------------------------------


def test_an_object_without_a_row_is_adopted(world: World) -> None:
    key = f"{DAY}/{part_name(SHARD, 4)}"
    put_part(world.root, key, {"a": b"imported"})
    world.compare()
    assert found(world) == [("warning", key, None)]
    assert world.repair().adopted == 1
    world.assert_agrees()
    record = world.rows()[key]
    assert (record.state, record.generation, record.files) == (ContainerState.COMMITTED, 4, 1)
    assert world.shown() == FILES | {"a": b"imported"}


def test_what_no_catalog_can_have_is_left_alone(world: World) -> None:
    """Containers of another layout, and objects that are none. External objects of theirs are named all the same."""
    for key in ("2020-01-01.des", f"{DAY}/shard_10.des", "archive/0.des"):
        put_part(world.root, key, {f"big of {key[:4]}": b"y" * BIG})
    (world.root / "README").write_bytes(b"")
    before = world.objects()
    world.repair(grace=0, external_grace=0)
    world.assert_agrees(external_grace=0)
    assert world.objects() == before


def test_uploads_and_merges_that_are_young_are_nothing(world: World) -> None:
    """Work goes on while it is compared."""
    merged, orphan = merge(world), begin(world)
    world.end_leases()
    world.assert_agrees()
    world.repair()
    assert {KEY, merged.object_key, orphan.object_key} <= set(world.objects())


def test_an_upload_that_goes_on_is_nothing_however_old(world: World) -> None:
    """Its lease holds, and its token is the shard's."""
    record = begin(world, lives=True)
    world.assert_agrees(grace=0)
    world.repair(grace=0)
    assert record.object_key in world.objects()


@pytest.mark.parametrize("put", [True, False])
def test_an_upload_that_nobody_can_commit_any_more_is_collected(world: World, put: bool) -> None:
    """Its lease has passed, so that whoever takes the shard has another token. Its row stays, to tell an object that
    comes late."""
    record = begin(world, put=put)
    pack_again(world)
    world.compare(grace=0)
    assert found(world) == [("warning", record.object_key, None)]
    assert world.repair(grace=0).deleted == put
    world.assert_agrees(grace=0)
    assert world.shown() == FILES
    assert world.rows()[record.object_key].state is ContainerState.DELETED
    put_part(world.root, record.object_key, {"a": b"late"}, packed=True)
    world.compare()
    assert found(world) == [("warning", record.object_key, None)]
    assert world.repair().deleted == 1
    world.assert_agrees()
    assert world.shown() == FILES


def test_an_upload_whose_files_were_not_packed_again_is_committed(world: World) -> None:
    """Its spool may be lost: nothing says that anybody has them still."""
    record = begin(world)
    assert world.repair(grace=0).adopted == 1
    world.assert_agrees(grace=0)
    assert world.shown() == FILES | {"a": b"orphan"}
    assert world.rows()[record.object_key].state is ContainerState.COMMITTED


def test_a_container_of_an_import_is_never_taken_for_an_orphan(world: World) -> None:
    """An import knows no catalog: it may have taken the key of an upload that died before its PUT."""
    record = begin(world, packed=False)
    world.end_leases()
    assert world.repair(grace=0).adopted == 1
    world.assert_agrees(grace=0)
    assert world.shown() == FILES | {"a": b"orphan"}
    assert world.rows()[record.object_key].state is ContainerState.COMMITTED


def test_what_takes_the_key_of_a_deleted_container_is_adopted(world: World) -> None:
    """As after an import into a day that has expired: the row's ETag is another one."""
    forget(world, KEY)
    put_part(world.root, KEY, {"a": b"imported"})
    assert world.repair(grace=0).adopted == 1
    assert world.rows()[KEY].state is ContainerState.COMMITTED


def test_what_was_merged_or_deleted_goes(world: World) -> None:
    merge(world)
    world.end_leases()
    world.compare(grace=0)
    assert found(world) == [("warning", KEY, None)]
    assert world.repair(grace=0).deleted == 1
    world.assert_agrees(grace=0)
    assert (KEY in world.objects(), world.shown()) == (False, FILES)


@pytest.mark.parametrize("damage", ["missing", "none", "shorter"])
def test_what_was_merged_stays_as_long_as_its_successor_is_damaged(world: World, damage: str) -> None:
    """It may be all that there is."""
    merged = merge(world)
    path = world.root / merged.object_key
    if damage == "missing":
        path.unlink()
    elif damage == "none":
        with path.open("r+b") as file:  # the same object, by its size and time
            status = os.fstat(file.fileno())
            file.seek(-72, os.SEEK_END)
            file.write(b"?")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.truncate(path, 100)
    world.end_leases()
    assert world.repair(grace=0).deleted == 0
    assert [key for key, _ in world.left] == [merged.object_key]
    assert KEY in world.objects()


def test_external_objects_that_nobody_names_go(world: World) -> None:
    """When they are old enough: their container may be still to come."""
    key = f"{DAY}/_bigFiles/unnamed"
    (world.root / key).write_bytes(b"1")
    world.assert_agrees()
    world.repair()
    world.compare(external_grace=0)
    assert found(world) == [("warning", key, None)]
    assert world.repair(external_grace=0).external == 1
    world.assert_agrees(external_grace=0)
    assert BIG_KEY in world.objects()


def test_external_objects_stay_as_long_as_a_container_cannot_be_read(world: World) -> None:
    """It may name them."""
    key = f"{DAY}/_bigFiles/unnamed"
    (world.root / key).write_bytes(b"1")
    (world.root / "archive.des").write_bytes(b"no container" * 100)
    assert world.repair(external_grace=0).external == 0
    assert [each for each, _ in world.left] == ["archive.des"]
    assert key in world.objects()


def test_a_shard_that_others_work_on_is_left(world: World) -> None:
    key = f"{DAY}/{part_name(SHARD, 4)}"
    put_part(world.root, key, {"a": b"imported"})

    async def hold(catalog: Catalog) -> None:
        assert await catalog.acquire(DAY, SHARD, "another", 60.0) is not None

    world.end_leases()
    world.run(hold)
    assert world.repair().adopted == 0
    assert [each for each, _ in world.left] == [f"{DAY}/{SHARD}"]


# --- faults ----------------------------------------------------------------------------------------------------------


class Refusing(Delegating):
    """Refuses to read some objects."""

    def __init__(self, inner: FileStore, error: StoreError, *keys: str) -> None:
        super().__init__(inner)
        self._error = error
        self._keys = keys

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        self._check(key)
        return super().get_range(key, start, stop, if_match=if_match)

    def get_tail(self, key: str, length: int) -> Answer:
        self._check(key)
        return super().get_tail(key, length)

    def _check(self, key: str) -> None:
        if key in self._keys:
            raise self._error


class Forgetting(Delegating):
    """Leaves an object out of its listings."""

    def __init__(self, inner: FileStore, key: str) -> None:
        super().__init__(inner)
        self._key = key

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        listing = super().list(prefix, delimiter=delimiter)
        return Listing(tuple(info for info in listing.objects if info.key != self._key), listing.prefixes)


@pytest.mark.parametrize("error", [AccessDenied("403"), StoreUnavailable("timed out")])
def test_what_cannot_be_read_is_unverified(world: World, error: StoreError) -> None:
    """docs/semantics.md: A time-out or a refusal is never taken for an object that is missing.

    Neither a container that is not listed, nor an external object that is not, nor one that is."""
    for store in (
        Refusing(FileStore(world.root), error, KEY),
        Refusing(Forgetting(FileStore(world.root), KEY), error, KEY),  # type: ignore[arg-type]
        Refusing(Forgetting(FileStore(world.root), BIG_KEY), error, BIG_KEY),  # type: ignore[arg-type]
    ):
        compared = world.compare(store=store)
        assert {each.kind for each in world.findings} == {"unverified"}
        assert not compared.is_damaged


def test_a_listing_that_contradicts_a_get_is_believed_in_neither_way(world: World) -> None:
    """Both have to say that an object is not there."""
    for store in (
        Forgetting(FileStore(world.root), KEY),
        Refusing(FileStore(world.root), NoSuchObject("404"), KEY),
    ):
        world.compare(store=store)
        assert found(world) == [("unverified", KEY, None)]
    before = world.rows()
    world.repair(store=Forgetting(FileStore(world.root), KEY), grace=0)
    assert world.rows() == before


@pytest.mark.parametrize("word", ["503", "lost-answer"])
@pytest.mark.parametrize("calls", range(1, 13))
def test_a_repair_through_faults_loses_nothing(world: World, word: str, calls: int) -> None:
    """From the n-th call on the store fails. Whatever was done by then, nothing that is shown is gone, and the next one
    completes it."""
    merge(world)
    world.end_leases()
    put_part(world.root, f"{DAY}/{part_name(SHARD, 9)}", {"imported": b"1"})
    before = world.shown()
    store = FaultyStore(FileStore(world.root), " ".join(["ok"] * calls + [word]))
    try:
        world.repair(store=store, grace=0, external_grace=0)
        assert world.left or store.calls[-1][2] == "ok"
    except StoreError:
        pass  # it could not be listed
    assert world.shown() == before
    world.repair(grace=0, external_grace=0)
    world.assert_agrees(grace=0, external_grace=0)
    assert world.shown() == before


@pytest.mark.parametrize("seen_by", ["its bytes", "its row"])
def test_containers_that_change_meanwhile_are_no_damage(world: World, seen_by: str) -> None:
    """One is merged and deleted after it was listed, and before it is read; or it is missing in the listing, and its
    row says that it is merged when that is read again."""
    inner = FileStore(world.root)
    store = WatchedStore(inner if seen_by == "its bytes" else Forgetting(inner, KEY))
    merged: list[ContainerRecord] = []

    def change(method: str, key: str) -> None:
        if method == ("get" if seen_by == "its bytes" else "tail") and key == KEY and not merged:
            merged.append(asyncio.run(_in_thread(world)))
            (world.root / KEY).unlink()

    store.before = change
    compared = world.compare(store=store)
    assert merged
    assert (world.findings, compared.is_damaged) == ([], False)


async def _in_thread(world: World) -> ContainerRecord:
    return await asyncio.to_thread(merge, world)


# --- a catalog that was lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_catalog_that_was_lost_is_made_again(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """docs/semantics.md: The bucket alone is enough to mount; a catalog that was lost is made again from it.

    The packer goes on: no name, no generation comes twice, and all files are shown once. In a directory with SQLite,
    and in S3 with Postgres."""
    env: dict[str, str] = {}
    url, catalog, lost = str(tmp_path / "store"), str(tmp_path / "catalog"), str(tmp_path / "lost")
    options: tuple[str, ...] = ("--catalog", catalog)
    if kind == "s3":
        server: servers.S3Server = request.getfixturevalue("s3")
        url = f"s3://{request.getfixturevalue('bucket')}/store"
        # The one that is lost is SQLite's: what is made again is in Postgres.
        password = servers.POSTGRES_PASSWORD
        env = {**server.environ(), "PGPASSWORD": password}
        options = ("--catalog", request.getfixturevalue("postgres").replace(f":{password}@", "@"))
    written = {}

    def pack(number: int, *how: str) -> None:
        for each in range(20):
            path = tmp_path / "spool" / f"d{each % 5}/{number}-{each}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d %d" % (number, each))
            written[f"d{each % 5}/{number}-{each}"] = path.read_bytes()
        done = desfs(
            "packer", "--once", "--spool", tmp_path / "spool", "--store", url, "--settle", "0", "--shard-bits", "2",
            "--big-file-threshold", "1M", "--log-level", "error", *how, env=env,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")

    for number in range(3):
        pack(number, "--catalog", lost)
    Path(lost).unlink()
    done = desfs("ls", "-R", "--json", url, env=env)
    assert len(done.stdout.splitlines()) == len(written) + 1 + 5
    done = desfs("verify", url, *options, "--repair", "--json", env=env)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, done.stderr, summary["containers"], summary["adopted"]) == (0, "", 3 * 3, 3 * 3)
    pack(3, *options)
    done = desfs("verify", url, *options, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"compared 12 containers, {len(written)} entries with the catalog: no damage\n"
    out = tmp_path / "out"
    assert desfs("extract", url, "--to", out, env=env).returncode == 0
    (day,) = out.iterdir()
    assert {str(path.relative_to(day)): path.read_bytes() for path in day.rglob("*") if path.is_file()} == written


# --- the command -----------------------------------------------------------------------------------------------------


def test_exit_status_and_lines(world: World) -> None:
    """0 with warnings, 3 with damage, 2 for what makes no sense."""
    done = desfs("verify", world.root, "--catalog", world.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "compared 4 containers, 6 entries" if len({*map(shard_of, FILES)}) == 4 else "compared "
    )
    put_part(world.root, f"{DAY}/{part_name(SHARD, 4)}", {"a": b"imported"})
    done = desfs("verify", world.root, "--catalog", world.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{DAY}/{part_name(SHARD, 4)}: warning: is not in the catalog"
    assert done.stdout.splitlines()[1].endswith(": no damage; 1 warning")
    (world.root / BIG_KEY).unlink()
    done = desfs("verify", world.root, "--catalog", world.url, "--repair", "--json", "--wait", "5", "--grace", "0",
                 "--external-grace", "0")  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    finding, summary = map(json.loads, done.stdout.splitlines())
    assert finding == {
        "kind": "damage",
        "container": f"{DAY}/{part_name(shard_of('big'), 1)}",
        "entry": "big",
        "offset": None,
        "problem": f"external object {BIG_KEY!r} is missing",
    }
    assert {key: summary[key] for key in ("kind", "damage", "warnings", "unverified", "adopted")} == {
        "kind": "summary", "damage": 1, "warnings": 0, "unverified": 0, "adopted": 1,
    }  # fmt: skip
    assert {key: summary[key] for key in ("deleted", "deleted_external", "forgotten")} == dict.fromkeys(
        ("deleted", "deleted_external", "forgotten"), 0
    )


def test_what_cannot_be_repaired_is_a_failure(world: World) -> None:
    """Exit status 1, and a line for each."""
    put_part(world.root, f"{DAY}/{part_name(SHARD, 4)}", {"a": b"imported"})

    async def hold(catalog: Catalog) -> None:
        assert await catalog.acquire(DAY, SHARD, "another", 600.0) is not None

    world.end_leases()
    world.run(hold)
    done = desfs("verify", world.root, "--catalog", world.url, "--repair", "--wait", "0")
    assert done.returncode == 1
    assert done.stderr.startswith(f"desfs: not repaired: {DAY}/{SHARD}: ")


@pytest.mark.parametrize(
    "arguments",
    [
        lambda world: (world.root, "--repair"),
        lambda world: (world.root, "--catalog", f"{world.url}.not-there"),
        lambda world: (world.root, "--catalog", "mysql://host/database"),
        lambda world: (world.root / KEY, "--catalog", world.url),
    ],
)
def test_usage(world: World, arguments: Callable[[World], tuple[object, ...]]) -> None:
    done = desfs("verify", *arguments(world))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_catalog_in_the_environment_does_not_keep_payloads_from_being_read(world: World) -> None:
    """It is there for all commands; who wants the comparison says so, or wants a repair."""
    env = {"DESFS_CATALOG": world.url}
    assert desfs("verify", world.root / KEY, env=env).stdout.startswith("verified 1 container")
    assert desfs("verify", world.root, env=env).stdout.startswith("verified ")
    assert "compared " in desfs("verify", world.root, "--repair", env=env).stdout
    assert (world.root / ".desfs.json").read_bytes() == LAYOUT
    assert Shown.of(world.store()).contents == FILES
