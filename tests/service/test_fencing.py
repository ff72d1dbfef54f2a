"""A packer that is paused past its lease, and another one that takes over: nothing is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assignment.catalog import ContainerRecord, ContainerState
from assignment.opening import open_catalog
from desfs.store import open_store
from tests.crash import PROGRAM as DESFS
from tests.crash import Shown, spool_files, unfinished

PATIENCE_S = 60.0
# Of one shard: a process that is stopped inside a transaction of SQLite keeps everybody else out of the catalog until
# it goes on, and two containers at a time would make that likely.
FILES = {f"d/{number}": f"content {number}".encode() * (number % 40) for number in range(60)}

# Packs a spool that it shares with others, and stops itself (SIGSTOP) before its first effect with the given name.
PROGRAM = """
import os, signal, sys
from desfs.packer.run import run_packer
from desfs.settings import PackerSettings

spool, store, catalog, stop_at = sys.argv[1:]
stopped = False

def effect(name):
    global stopped
    if not stopped and stop_at and name.startswith(stop_at):
        stopped = True
        os.kill(os.getpid(), signal.SIGSTOP)

settings = PackerSettings(settle=0, shard_bits=1, catalog=catalog, lease_ttl=1.0)
summary = run_packer(spool, store, settings, once=True, effect=effect)
sys.exit(1 if summary.failures else 0)
"""


@pytest.fixture(params=["sqlite", "postgres"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A catalog that several packers share."""
    if request.param == "sqlite":
        return str(tmp_path / "catalog.sqlite")
    url: str = request.getfixturevalue("postgres")
    return url


def start(spool: Path, store: Path, catalog: str, stop_at: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(spool), str(store), catalog, stop_at],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_stopped(packer: subprocess.Popen[str]) -> None:
    """Wait until it has stopped itself."""
    _, status = os.waitpid(packer.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), f"{status}: {packer.communicate(timeout=PATIENCE_S)[0]}"


def rows(catalog: str) -> list[ContainerRecord]:
    async def read() -> list[ContainerRecord]:
        opened = await open_catalog(catalog)
        try:
            return await opened.list_containers()
        finally:
            await opened.close()

    return asyncio.run(read())


def pack_until_empty(spool: Path, store: Path, catalog: str) -> None:
    """Others work on the spool until nothing is left in it: the paused one's lease has to pass before."""
    deadline = time.monotonic() + PATIENCE_S
    while any((spool / name).is_file() for name in spool_files(spool)) or "/claims/" in "".join(unfinished(spool)):
        assert time.monotonic() < deadline, unfinished(spool)
        packer = start(spool, store, catalog)
        packer.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize("stop_at", ["claim", "begin", "fsync journal.json", "build", "put", "commit", "unlink"])
def test_a_packer_that_is_paused_past_its_lease_cannot_commit(stop_at: str, catalog: str, tmp_path: Path) -> None:
    """docs/semantics.md: A packer that was paused, for however long, loses nothing and stores nothing twice. What it
    had claimed is packed by another one of its spool when its lease has passed, and its own commit is refused.

    Between its PUT and its commit its lease passes, and another one packs its files: the commit is refused."""
    spool, store = tmp_path / "spool", tmp_path / "store"
    for name, data in FILES.items():
        (spool / name).parent.mkdir(parents=True, exist_ok=True)
        (spool / name).write_bytes(data)
    paused = start(spool, store, catalog, stop_at)
    try:
        wait_stopped(paused)
        before = Shown.of(open_store(str(store))).containers if store.exists() else {}
        pack_until_empty(spool, store, catalog)
        committed = {row.object_key: row for row in rows(catalog) if row.state is ContainerState.COMMITTED}
        os.kill(paused.pid, signal.SIGCONT)
        output, _ = paused.communicate(timeout=PATIENCE_S)
    finally:
        paused.kill()
        paused.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in output, output
    shown = Shown.of(open_store(str(store)))
    assert shown.contents == FILES
    assert spool_files(spool) == unfinished(spool) == []
    after = {row.object_key: row for row in rows(catalog)}
    assert {key for key, row in after.items() if row.state is ContainerState.COMMITTED} == committed.keys()
    orphans = {key for key in shown.containers if after[key].state is ContainerState.UPLOADING}
    if stop_at == "commit":
        assert orphans or before.keys() & committed.keys()  # it was packed again, or committed for it
    assert shown.containers.keys() == committed.keys() | orphans


def test_a_packer_is_fenced_off_by_one_of_another_spool(catalog: str, tmp_path: Path) -> None:
    """A packer that comes back after its lease has passed packs its files again, and what it had put is an orphan.

    Stopped between its PUT and its commit, until its lease has passed and another packer has worked on the shard, it
    cannot commit. Its files are packed again, under the same names, and the orphan is collected."""
    store = tmp_path / "store"
    spools = tmp_path / "paused", tmp_path / "other"
    for spool in spools:
        for name, data in FILES.items():
            target = spool / f"{name}-{spool.name}"  # of one directory, and so of one shard
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    paused = start(spools[0], store, catalog, "commit")
    try:
        wait_stopped(paused)
        (orphan,) = Shown.of(open_store(str(store))).containers
        pack_until_empty(spools[1], store, catalog)
        os.kill(paused.pid, signal.SIGCONT)
        output, _ = paused.communicate(timeout=PATIENCE_S)
    finally:
        paused.kill()
        paused.communicate(timeout=PATIENCE_S)
    assert paused.returncode == 0, output
    assert "a lease passed" in output
    shown = Shown.of(open_store(str(store)))
    assert shown.contents == {f"{name}-{spool.name}": data for name, data in FILES.items() for spool in spools}
    assert orphan not in {file.container for file in shown.files.values()}
    assert {row.object_key: row.state for row in rows(catalog)}[orphan] is ContainerState.UPLOADING
    command = [str(DESFS), "verify", str(store), "--repair", "--grace", "0"]
    done = subprocess.run(
        command, env=os.environ | {"DESFS_CATALOG": catalog}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert orphan not in Shown.of(open_store(str(store))).containers
    assert {row.object_key: row.state for row in rows(catalog)}[orphan] is ContainerState.DELETED
    assert Shown.of(open_store(str(store))).contents == shown.contents
