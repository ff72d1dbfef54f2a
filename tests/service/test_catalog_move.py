"""A store that began on one machine goes on with a catalog in Postgres: docs/operations.md, Many writers."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from des_format.shards import parse_container_name
from desfs.store import open_store
from desfs.store.base import S3Options
from tests import servers
from tests.crash import PROGRAM, Shown, catalog_rows, spool_files, unfinished

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"
LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Database:
    """A database as the documentation has it made. `owner` and `user` are roles, `url` a URL without a password."""

    server: servers.PostgresServer
    name: str
    owner: str
    user: str
    password: str

    def url(self, role: str, *, password: str = "", options: str = "") -> str:
        secret = f":{password}" if password else ""
        return f"postgresql://{role}{secret}@{self.server.host}:{self.server.port}/{self.name}{options}"


@pytest.fixture
def database(postgres_session: servers.PostgresServer) -> Iterator[Database]:
    """Made by the documentation's own statements, with names of the test's."""
    found = re.search(r"```sql\n(.*?)```", OPERATIONS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    name, password = f"test_{secrets.token_hex(6)}", secrets.token_hex(8)
    text = re.sub(r"--.*", "", found[1]).replace("desfs_owner", f"{name}_owner")
    text = re.sub(r"\bdesfs\b", name, text)
    text = re.sub(r"PASSWORD '[^']*'", f"PASSWORD '{password}'", text)
    outside, inside = text.split(f"\\connect {name}\n")
    made = Database(postgres_session, name, f"{name}_owner", name, password)
    try:
        postgres_session.run(*_statements(outside))
        postgres_session.run(*_statements(inside), database=name)
        yield made
    finally:
        postgres_session.drop_database(name)
        postgres_session.run(f"DROP ROLE IF EXISTS {made.owner}", f"DROP ROLE IF EXISTS {made.user}")


def _statements(text: str) -> list[str]:
    return [each.strip() for each in text.split(";") if each.strip()]


def desfs(*words: str | Path, **environ: str) -> str:
    """The output of a command that must succeed, with no settings but these."""
    done = run(*words, **environ)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def run(*words: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    foreign = ("DESFS_", "PG")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return subprocess.run(
        [PROGRAM, *words],
        env=env | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def password_by(way: str, database: Database, folder: Path) -> tuple[str, dict[str, str]]:
    """The URL for the command line and the environment, where the password comes in one of the documented ways."""
    file = folder / ".pgpass"
    file.write_text(f"{database.server.host}:*:{database.name}:{database.user}:{database.password}\n")
    file.chmod(0o600)
    nowhere = {"HOME": str(folder / "none")}
    url = database.url(database.user)
    match way:
        case "PGPASSWORD":
            return url, nowhere | {"PGPASSWORD": database.password}
        case "PGPASSFILE":
            return url, nowhere | {"PGPASSFILE": str(file)}
        case "~/.pgpass":
            return url, {"HOME": str(folder)}
        case _:
            return database.url(database.user, options=f"?passfile={file}"), nowhere


def write(spool: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (spool / path).parent.mkdir(parents=True, exist_ok=True)
        (spool / path).write_bytes(content)


def pack(spool: Path, store: Path, *words: str, **environ: str) -> None:
    common = ("--spool", spool, "--store", store, "--once", "--settle", "0")
    assert "packed" in desfs("packer", *common, *words, **environ)
    assert (spool_files(spool), unfinished(spool)) == ([], [])


def generations(shown: Shown) -> dict[str, list[int]]:
    """Of each shard, ascending."""
    found: dict[str, list[int]] = {}
    for key in shown.containers:
        name = parse_container_name(key.rpartition("/")[2])
        assert name is not None
        found.setdefault(f"{key.partition('/')[0]}/{name.group}", []).append(name.last)
    return {shard: sorted(numbers) for shard, numbers in found.items()}


@pytest.mark.parametrize(
    ("naming", "way"),
    [("path", "PGPASSWORD"), ("assigned", "PGPASSFILE"), ("assigned", "~/.pgpass"), ("path", "?passfile=")],
)
def test_a_store_that_began_embedded_goes_on_with_postgres(
    database: Database, tmp_path: Path, naming: str, way: str
) -> None:
    """One command, as the role that packers have: names and generations go on where they were."""
    spool, store = tmp_path / "spool", tmp_path / "store"
    spool.mkdir()
    first = {f"d{n}/{n}.txt": b"first %d" % n for n in range(40)}
    write(spool, first)
    pack(spool, store, "--shard-bits", "2", "--naming", naming)
    old = catalog_rows(spool)
    assert len(old) > 1

    owner = {"DESFS_CATALOG": database.url(database.owner, password=database.password)}
    assert desfs("catalog", "migrate", **owner) == "the catalog is up to date\n"
    url, environ = password_by(way, database, tmp_path)
    embedded = spool / ".desfs/catalog.sqlite"
    said = desfs("catalog", "copy", embedded, url, **environ)
    assert said == f"copied {len(old)} containers and {len(old)} shards\n"
    embedded.unlink()

    # Older names again, which with assigned names would be other files.
    second = {f"d{n}/{n + 20 * (naming == 'path')}.txt": b"second %d" % n for n in range(40, 80)}
    second |= {f"d{n}/{n}.txt": b"newer %d" % n for n in range(20)} if naming == "path" else {}
    write(spool, second)
    pack(spool, store, "--catalog", url, **environ)
    assert not embedded.exists()

    shown = Shown.of(open_store(str(store), S3Options(), deadline_s=LIMIT_S))
    assert (shown.contents if naming == "path" else shown.originals) == first | second
    names = [name for entries in shown.entries.values() for name in entries]
    assert len(names) == len(first) + len(second)
    assert len({file.meta["id"] for file in shown.files.values()}) == len(shown.files)
    assert set(generations(shown)) == {f"{row.day}/x{row.shard}" for row in old.values()}
    assert all(found == [1, 2] for found in generations(shown).values())
    desfs("verify", store, "--catalog", url, **environ)


def test_what_packers_connect_as_cannot_change_the_tables(database: Database) -> None:
    """docs/operations.md, Postgres: desfs_owner makes and changes the tables; nobody else gets in."""
    server = database.server
    owner = {"DESFS_CATALOG": database.url(database.owner, password=database.password)}
    user = {"DESFS_CATALOG": database.url(database.user, password=database.password)}
    assert run("catalog", "migrate", **user).returncode == 1
    desfs("catalog", "migrate", **owner)
    stranger = f"{database.name}_stranger"
    server.run(f"CREATE ROLE {stranger} LOGIN PASSWORD '{database.password}'")

    async def execute(role: str, statement: str) -> None:
        connection = await asyncpg.connect(database.url(role, password=database.password), timeout=LIMIT_S)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    forbidden = ("DROP TABLE container", "ALTER TABLE node ADD x int", "CREATE TABLE x (y int)", "TRUNCATE node")
    try:
        for statement in forbidden:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                asyncio.run(execute(database.user, statement))
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            asyncio.run(execute(stranger, "SELECT 1"))
    finally:
        server.run(f"DROP ROLE {stranger}")


def test_a_packer_that_is_killed_while_it_packs_is_finished_in_postgres(database: Database, tmp_path: Path) -> None:
    """Its batch goes on by the catalog that was copied, when its leases have passed."""
    spool, store = tmp_path / "spool", tmp_path / "store"
    spool.mkdir()
    files = {f"d{n}/{n}.txt": b"content %d" % n for n in range(20)}
    write(spool, files)
    settings = "PackerSettings(settle=0, shard_bits=1, lease_ttl=0.5)"
    die = "lambda name: name.startswith('commit') and os.kill(os.getpid(), 9)"
    program = (
        "import os, sys; from desfs.packer.run import run_packer; from desfs.settings import PackerSettings; "
        f"run_packer(*sys.argv[1:], {settings}, once=True, effect={die})"
    )
    python = PROGRAM.with_name("python")
    killed = subprocess.run([python, "-c", program, spool, store], capture_output=True, timeout=LIMIT_S, check=False)
    assert killed.returncode == -9, killed.stderr
    assert unfinished(spool)

    environ = {"HOME": str(tmp_path), "PGPASSWORD": database.password}
    desfs("catalog", "migrate", "--catalog", database.url(database.owner), **environ)
    url = database.url(database.user)
    embedded = spool / ".desfs/catalog.sqlite"
    while (done := run("catalog", "copy", embedded, url, **environ)).returncode:
        assert "stop it first" in done.stderr
    pack(spool, store, "--catalog", url, **environ)
    shown = Shown.of(open_store(str(store), S3Options(), deadline_s=LIMIT_S))
    assert shown.contents == files
    assert sum(map(len, shown.entries.values())) == len(files)
    desfs("verify", store, "--catalog", url, "--repair", "--grace", "0", **environ)
    desfs("verify", store, "--catalog", url, **environ)
