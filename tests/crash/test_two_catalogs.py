"""Two spools that write to one store, each with its embedded catalog: neither knows of the other's containers, and
neither may harm them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from desfs.store import open_store
from tests.crash import PROGRAM, PackerForks, Run, Shown, packer_forks

SETTINGS: dict[str, Any] = {"settle": 0, "shard_bits": 1, "max_parts": 4, "delete_grace": 0, "log_level": "error"}
NODES = {"one": 1, "other": 2}


@pytest.fixture(scope="module")
def forks() -> Iterator[PackerForks]:
    with packer_forks() as started:
        yield started


class TwoSpools:
    """The spools `one` and `other`, and their store."""

    def __init__(self, forks: PackerForks, folder: Path) -> None:
        self._forks = forks
        self.folder = folder
        self.store = folder / "store"
        for name in NODES:
            (folder / name).mkdir()

    def pack(self, spool: str, files: dict[str, bytes], *, die_before: str = "", **settings: Any) -> Run:
        """Write files into a spool and pack them; the packer dies before its first effect of this kind."""
        for path, data in files.items():
            (self.folder / spool / path).write_bytes(data)
        given = SETTINGS | {"node_id": NODES[spool]} | settings
        run = self._forks.run(self.folder / spool, str(self.store), die_before=die_before, **given)
        assert (run.status == 0) == (not die_before), run
        return run

    def repair(self, spool: str) -> None:
        """`verify --repair` with a spool's catalog."""
        catalog = self.folder / spool / ".desfs/catalog.sqlite"
        command = [PROGRAM, "verify", self.store, "--catalog", catalog, "--repair", "--grace", "0"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    def shown(self) -> dict[str, bytes]:
        return Shown.of(open_store(str(self.store))).contents


@pytest.mark.parametrize("died_before", ["journal", "put"])
def test_a_key_that_another_has_taken_is_not_ours_to_delete(
    died_before: str, forks: PackerForks, tmp_path: Path
) -> None:
    """One begins a container and dies before its PUT; the other takes the key, and deletes its file from its spool."""
    world = TwoSpools(forks, tmp_path)
    world.pack("one", {"a": b"one's"}, die_before="rename journal" if died_before == "journal" else "put")
    world.pack("other", {"b": b"the other's"})
    assert world.shown() == {"b": b"the other's"}
    for number in range(8):  # it goes on, and merges what it has made
        world.pack("one", {f"c{number}": b"c"})
    wanted = {"a": b"one's", "b": b"the other's"} | {f"c{number}": b"c" for number in range(8)}
    assert world.shown() == wanted
    for spool in NODES:
        world.repair(spool)
        assert world.shown() == wanted


def test_nothing_is_merged_across_anothers_container(forks: PackerForks, tmp_path: Path) -> None:
    """The newest version of a file wins, whoever has packed it, and whatever is merged around it."""
    world = TwoSpools(forks, tmp_path)
    merged = 0
    for number in range(16):
        if number == 2:
            world.pack("one", {"file": b"old"})
        if number == 3:
            world.pack("other", {"file": b"new"})
        run = world.pack("one", {f"c{number}": b"c"})
        merged += any(effect.startswith("commit") and effect.count("-") > 3 for effect in run.effects)
        assert world.shown().get("file") == (None if number < 2 else b"old" if number < 3 else b"new")
    assert merged
    assert world.shown().keys() == {"file"} | {f"c{number}" for number in range(16)}


@pytest.mark.parametrize("effect", ["begin", "put", "commit", "unlink"])
def test_several_containers_of_one_shard_are_recovered(effect: str, forks: PackerForks, tmp_path: Path) -> None:
    world = TwoSpools(forks, tmp_path)
    files = {f"f{number}": b"%d" % number for number in range(6)}
    world.pack("one", files, die_before=effect, max_container_files=1)
    world.pack("one", {}, max_container_files=1)
    assert world.shown() == files


def test_a_journal_does_not_take_another_catalogs_container_for_its_own(forks: PackerForks, tmp_path: Path) -> None:
    """Tokens of two catalogs may be the same: a packer that comes back with another catalog finds the key of its
    journal committed there, under the same token, and has to look whose files it has."""
    world = TwoSpools(forks, tmp_path)
    catalog = str(tmp_path / "shared.sqlite")
    world.pack("one", {"a": b"one's"}, die_before="put")
    world.pack("other", {"b": b"the other's"}, catalog=catalog)
    world.pack("one", {}, catalog=catalog)
    assert world.shown() == {"a": b"one's", "b": b"the other's"}


def test_nothing_is_merged_across_an_import_under_the_key_of_a_dead_upload(forks: PackerForks, tmp_path: Path) -> None:
    world = TwoSpools(forks, tmp_path)
    catalog = str(tmp_path / "shared.sqlite")
    (source := tmp_path / "source").mkdir()
    (source / "file").write_bytes(b"imported, and the newest")
    for number in range(3):
        world.pack("one", {f"a{number}": b"a", "file": b"older"}, catalog=catalog)
    # Its lease has passed before the import has started.
    world.pack("one", {"dies": b"d"}, catalog=catalog, die_before="rename journal", lease_ttl=0.3)
    command = [PROGRAM, "import", "--store", world.store, source]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=60)
    for number in range(6):
        world.pack("other", {f"b{number}": b"b"}, catalog=catalog)
        assert world.shown()["file"] == b"imported, and the newest"


def test_a_catalog_of_another_store_is_refused(forks: PackerForks, tmp_path: Path) -> None:
    """What it takes for left over may be all that this store has: nobody begins to work with it."""
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()
    one, other = TwoSpools(forks, first), TwoSpools(forks, second)
    one.pack("one", {"a": b"a"})
    other.pack("one", {"b": b"b"})
    catalog = first / "one/.desfs/catalog.sqlite"
    for command in (
        ("packer", "--once", "--spool", second / "other", "--store", other.store),
        ("seal", "--store", other.store),
        ("rm", other.store, "2026-11-20/b"),
        ("expire", other.store, "--older-than", "1d", "--yes"),
        ("verify", other.store, "--repair"),
    ):
        done = subprocess.run(
            [str(PROGRAM), *map(str, command), "--catalog", str(catalog)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, (command, done)
        assert "the catalog is that of another store" in done.stderr, command
    assert other.shown() == {"b": b"b"}
