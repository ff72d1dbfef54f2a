"""docs/security.md: the programs with the bucket policies, the database roles and the Redis users of the page."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from botocore.exceptions import ClientError

from tests import servers
from tests.crash import spool_files, unfinished
from tests.mount.mounting import desfs, mounted, wait_until
from tests.service.serving import replica

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "security.md").read_text(encoding="utf-8")
BUCKET, PREFIX = "my-bucket", "archive"
STORE = f"s3://{BUCKET}/{PREFIX}"
OLD_DAY = "2020-11-20"
LARGE = 65 << 20  # bytes: more than goes in one request (desfs/store/multipart.py)

READER, PACKER, SEALER = "desfs-reader", "desfs-packer", "desfs-sealer"
POLICIES: dict[str, dict[str, Any]] = {
    name: json.loads(text)
    for name, text in re.findall(r"^### (desfs-\w+)\n.*?^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
}


def actions_of(policy: Mapping[str, Any]) -> set[str]:
    """All actions that a policy allows."""
    allowed = [statement["Action"] for statement in policy["Statement"]]
    return {action for each in allowed for action in ([each] if isinstance(each, str) else each)}


# --- the bucket ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def granted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """An S3 server that knows the page's policies."""
    with servers.s3_server(tmp_path_factory.mktemp("s3"), policies=POLICIES) as server:
        yield server


@pytest.fixture
def server(granted: servers.S3Server) -> Iterator[servers.S3Server]:
    """The same, with the page's bucket, which is empty."""
    granted.client().create_bucket(Bucket=BUCKET)
    yield granted
    granted.delete_bucket(BUCKET)


def keys(server: servers.S3Server) -> list[str]:
    """The objects of the bucket."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [found["Key"] for page in pages for found in page.get("Contents", ()) if not found["Key"].endswith("/")]


def environ(server: servers.S3Server, who: str) -> dict[str, str]:
    return server.environ(access_key=who)


@dataclass(slots=True)
class Packed:
    """A spool, and what has been packed from it."""

    server: servers.S3Server
    spool: Path
    contents: dict[str, bytes]

    @property
    def catalog(self) -> Path:
        return self.spool / ".desfs/catalog.sqlite"

    def pack(
        self, who: str, files: Mapping[str, bytes], *options: str, environ: Mapping[str, str] | None = None
    ) -> str:
        """Pack files with somebody's credentials; what the packer says on stderr. AssertionError if that fails."""
        write(self.spool, files)
        words = ("packer", "--once", "--settle", "0", "--spool", self.spool, "--store", STORE, *options)
        done = desfs(*words, env=self.server.environ(access_key=who) | dict(environ or {}))
        assert done.returncode == 0, done.stderr
        assert spool_files(self.spool) == unfinished(self.spool) == []
        self.contents |= files
        return done.stderr

    def shown(self, folder: Path) -> dict[str, bytes]:
        """Everything below the day of a mount that has one."""
        (day,) = (each for each in folder.iterdir() if each.name != OLD_DAY)
        return {str(path.relative_to(day)): path.read_bytes() for path in day.rglob("*") if path.is_file()}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def packed(server: servers.S3Server, tmp_path: Path) -> Packed:
    """A store with files in several shards, one of them an object of its own."""
    spool = tmp_path / "spool"
    spool.mkdir()
    one = Packed(server, spool, {})
    files = {f"d{number % 5}/{number}.txt": b"%d" % number * number for number in range(50)}
    one.pack(server.access_key, {**files, "large.bin": b"large" * 2000}, "--big-file-threshold", "8K")
    return one


def test_the_page_has_a_policy_for_each_and_each_allows_more() -> None:
    assert list(POLICIES) == [READER, PACKER, SEALER]
    reader, packer, sealer = map(actions_of, POLICIES.values())
    assert reader == {"s3:ListBucket", "s3:GetObject"}
    assert packer - reader == {"s3:PutObject", "s3:AbortMultipartUpload"}
    assert reader < packer
    assert sealer - packer == {"s3:DeleteObject"}
    assert packer < sealer


def test_the_server_holds_everybody_to_the_policies(packed: Packed) -> None:
    """So that what is tested below means something: each policy is asked for one thing more than it allows."""
    key = f"{PREFIX}/.desfs.json"

    def refused(who: str, operation: str, **arguments: Any) -> bool:
        call = getattr(packed.server.client(access_key=who), operation)
        try:
            call(Bucket=BUCKET, **arguments)
        except ClientError as error:
            if error.response["Error"]["Code"] != "AccessDenied":
                raise
            return True
        return False

    for who in POLICIES:
        assert not refused(who, "get_object", Key=key)
        assert not refused(who, "list_objects_v2", Prefix=f"{PREFIX}/")
        assert refused(who, "get_object", Key="other/key")
        assert refused(who, "list_objects_v2", Prefix="other/")
        assert refused(who, "list_objects_v2")
        assert refused(who, "put_object", Key="other/key", Body=b"")
        assert refused(who, "delete_object", Key="other/key")
    for who, puts, deletes in ((READER, False, False), (PACKER, True, False), (SEALER, True, True)):
        new = f"{PREFIX}/{who}"
        assert refused(who, "put_object", Key=new, Body=b"") is not puts
        assert refused(who, "create_multipart_upload", Key=new) is not puts
        assert refused(who, "delete_object", Key=new) is not deletes


@pytest.mark.fuse
def test_a_mount_works_with_the_readers_policy(packed: Packed, tmp_path: Path) -> None:
    env = environ(packed.server, READER)
    with mounted(STORE, tmp_path / "mnt", env=env) as mount:
        assert packed.shown(mount) == packed.contents
        assert (mount / ".desfs/problems").read_bytes() == b""
        (day,) = (each.name for each in mount.iterdir())
    reading: tuple[tuple[object, ...], ...] = (
        ("verify", STORE),
        ("verify", STORE, "--catalog", packed.catalog),
        ("ls", "-lR", STORE),
        ("stat", STORE, f"{day}/large.bin"),
        ("extract", STORE, "--to", tmp_path / "copy"),
        ("status", STORE),
        ("doctor", STORE),
    )
    writing: tuple[tuple[object, ...], ...] = (
        ("import", "--store", STORE, tmp_path / "copy"),
        ("rm", STORE, f"{day}/large.bin", "--catalog", packed.catalog),
        ("doctor", STORE, "--write"),
    )
    for words in (*reading, *writing):
        done = desfs(*words, env=env)
        assert done.returncode == (0 if words in reading else 1), (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_packer_that_may_not_put_keeps_its_files(packed: Packed) -> None:
    write(packed.spool, {"new.txt": b"new"})
    words = ("packer", "--once", "--settle", "0", "--spool", packed.spool, "--store", STORE)
    done = desfs(*words, env=environ(packed.server, READER))
    assert done.returncode == 1
    assert "Access" in done.stderr
    write(packed.spool, {"newer.txt": b"newer"})
    packed.pack(PACKER, {"newest.txt": b"newest"})


@pytest.mark.fuse
def test_a_packer_packs_without_delete(server: servers.S3Server, tmp_path: Path) -> None:
    """Into a new store, uploads in parts among them, and one that is refused at its end, and aborted."""
    spool = tmp_path / "spool"
    spool.mkdir()
    one = Packed(server, spool, {})
    one.pack(PACKER, {"d/small": b"small", "huge.bin": b"1" * LARGE}, "--big-file-threshold", "1M")
    one.pack(PACKER, {"d/small": b"newer", "huge.bin": b"2" * LARGE}, "--big-file-threshold", "1M")
    assert sum("/_bigFiles/" in key for key in keys(server)) == 2
    assert server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []
    imported = tmp_path / "imported"
    write(imported, {"old.txt": b"old"})
    done = desfs("import", "--store", STORE, "--day", OLD_DAY, imported, env=environ(server, PACKER))
    assert done.returncode == 0, done.stderr
    with mounted(STORE, tmp_path / "mnt", env=environ(server, READER)) as mount:
        assert one.shown(mount) == one.contents
        assert (mount / OLD_DAY / "old.txt").read_bytes() == b"old"


# A container for each file, and of more than four of a shard one, whose parts go at once.
TRICKLE = ("--max-batch-files", "1", "--delete-grace", "0")
TIDY = (*TRICKLE, "--max-parts", "4")
CANNOT = "a shard cannot be compacted"


def files_of(number: int, count: int) -> dict[str, bytes]:
    """So many files of one directory, and so of one shard."""
    return {f"d/{name}": b"%d" % name for name in range(number, number + count)}


def containers(server: servers.S3Server) -> set[str]:
    return {key for key in keys(server) if key.endswith(".des")}


@pytest.mark.fuse
def test_a_packer_without_delete_merges_a_shard_once_and_goes_on_packing(
    server: servers.S3Server, tmp_path: Path
) -> None:
    """docs/security.md, desfs-packer: parts pile up, nothing is lost; who may delete tidies up."""
    spool = tmp_path / "spool"
    spool.mkdir()
    one = Packed(server, spool, {})
    assert CANNOT not in one.pack(PACKER, files_of(0, 8), *TIDY)
    first = containers(server)
    assert len(first) == 9
    assert CANNOT in one.pack(PACKER, files_of(8, 8), *TIDY)
    assert len(containers(server)) == 17
    assert first < containers(server)
    with mounted(STORE, tmp_path / "mnt", env=environ(server, READER)) as mount:
        assert one.shown(mount) == one.contents
    assert CANNOT not in one.pack(SEALER, {"d/last": b"last"}, *TIDY)
    (merged,) = first & containers(server)
    assert re.search(r"/\w-000001-000008\.des$", merged)
    with mounted(STORE, tmp_path / "mnt", env=environ(server, READER)) as mount:
        assert one.shown(mount) == one.contents


def test_a_packer_that_merges_nothing_asks_for_no_delete(server: servers.S3Server, tmp_path: Path) -> None:
    """docs/security.md, desfs-packer: with the settings that the page gives it."""
    (text,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    settings = tmp_path / "settings.toml"
    settings.write_text(text, encoding="utf-8")
    spool = tmp_path / "spool"
    spool.mkdir()
    one = Packed(server, spool, {})
    for number in (0, 20):
        assert CANNOT not in one.pack(PACKER, files_of(number, 20), *TRICKLE, "--config", str(settings))
    assert len(containers(server)) == 40


def test_what_deletes_works_with_the_sealers_policy_and_not_without(packed: Packed, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / str(number), {"d/a": b"%d" % number, f"d/{number}": b"x"})
        words = ("import", "--store", STORE, "--day", OLD_DAY, tmp_path / str(number))
        assert desfs(*words, env=environ(packed.server, PACKER)).returncode == 0
    catalog = ("--catalog", packed.catalog)
    no_grace = {"DESFS_DELETE_GRACE": "0"}

    def run(who: str, *words: object) -> int:
        done = desfs(*words, *catalog, env=environ(packed.server, who) | no_grace)
        assert "Traceback" not in done.stderr
        return done.returncode

    assert run(SEALER, "rm", STORE, f"{OLD_DAY}/d/2") == 0
    seal = ("seal", "--store", STORE)
    assert run(PACKER, *seal) == 0  # what was merged is deleted by the next run
    assert run(PACKER, *seal) == 1
    assert run(SEALER, *seal) == 0
    assert len([key for key in containers(packed.server) if f"/{OLD_DAY}/" in key]) == 1
    assert run(SEALER, "verify", STORE, "--repair") == 0
    expire = ("expire", STORE, "--older-than", "90d", "-y")
    assert run(PACKER, *expire) == 1
    assert run(SEALER, *expire) == 0
    assert not [key for key in containers(packed.server) if f"/{OLD_DAY}/" in key]
    assert desfs("doctor", STORE, "--write", env=environ(packed.server, SEALER)).returncode == 0


# --- the database ----------------------------------------------------------------------------------------------------

PASSWORD = "pg-role-51c7"
ROLES = ("desfs_owner", "desfs_packer", "desfs_sealer", "desfs_service")


@dataclass(frozen=True, slots=True)
class Database:
    """A catalog whose roles are those of the documentation."""

    postgres: servers.PostgresServer

    def url(self, role: str) -> str:
        return f"postgresql://{role}:{PASSWORD}@{self.postgres.host}:{self.postgres.port}/desfs"

    def environ(self, role: str) -> dict[str, str]:
        return {"DESFS_CATALOG": self.url(role)}

    def execute(self, text: str) -> None:
        """The SQL of a page, as psql executes it."""
        with_password = re.sub(r"PASSWORD '[^']*'", f"PASSWORD '{PASSWORD}'", re.sub(r"--.*", "", text))
        outside, inside = with_password.split("\\connect desfs\n")
        for statements, database in ((outside, "postgres"), (inside, "desfs")):
            self.postgres.run(*(each for each in statements.split(";") if each.strip()), database=database)


def sql_of(name: str) -> str:
    (text,) = re.findall(r"^```sql\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return str(text)


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """Set up as docs/operations.md and then docs/security.md have it."""
    with servers.postgres_server() as postgres:
        one = Database(postgres)
        one.execute(sql_of("operations.md"))
        done = desfs("catalog", "migrate", env=one.environ("desfs_owner"))
        assert done.returncode == 0, done.stderr
        one.execute(sql_of("security.md"))
        yield one


def privileges(database: Database, role: str) -> dict[str, set[str]]:
    """What a role may do with each table, besides reading it."""
    rows = database.postgres.run(
        "SELECT table_name AS name, privilege_type AS kind FROM information_schema.role_table_grants "
        f"WHERE table_schema = 'public' AND grantee = '{role}'",
        database="desfs",
    )
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["name"], set()).add(row["kind"])
    return found


@pytest.mark.postgres
def test_every_program_works_with_its_role(database: Database, tmp_path: Path) -> None:
    """Packers with and without the service, and with a merge; the service; and all that changes the catalog."""
    store, spool = tmp_path / "store", tmp_path / "spool"
    for folder in (store, spool):
        folder.mkdir()
    words = ("packer", "--once", "--settle", "0", "--spool", spool, "--store", store)
    day = datetime.now(UTC).date()

    def run(role: str, *words: object, **more: str) -> None:
        env = database.environ(role) | {"DESFS_DELETE_GRACE": "0"} | more
        done = desfs(*words, env=env)
        assert done.returncode == 0, (role, words, done.stdout, done.stderr)
        assert "permission denied" not in done.stderr

    with replica(database.url("desfs_service"), tmp_path / "service") as service, service.client() as client:
        for number in range(6):
            write(spool, {f"d/{number}": b"x"})
            run("desfs_packer", *words, "--max-parts", "3")
        token = tmp_path / "token"
        token.write_text(client.headers["Authorization"].removeprefix("Bearer "))
        write(spool, {"d/served": b"x"})
        run("desfs_packer", *words, "--assignment", service.url, "--assignment-token-file", str(token))
        for path in ("/v1/shards", "/v1/workers", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200, path
        assert client.post("/v1/assign", json={"path": "d/1"}).status_code == 200
    assert spool_files(spool) == unfinished(spool) == []
    write(tmp_path / "old", {"d/old": b"x", "d/older": b"x"})
    run("desfs_sealer", "import", "--store", store, "--day", OLD_DAY, tmp_path / "old")
    run("desfs_sealer", "verify", store, "--repair")
    run("desfs_sealer", "rm", store, f"{OLD_DAY}/d/old", f"{day}/d/1")
    run("desfs_sealer", "seal", "--store", store)
    run("desfs_sealer", "seal", "--store", store)
    # Rows that are deleted for long are forgotten, by a run that finds one.
    database.postgres.run("UPDATE container SET changed_at_ms = 0 WHERE state = 'deleted'", database="desfs")
    run("desfs_sealer", "seal", "--store", store)
    counted = database.postgres.run("SELECT count(*) FROM container WHERE changed_at_ms = 0", database="desfs")
    assert counted[0]["count"] == 0
    run("desfs_sealer", "expire", store, "--older-than", "90d", "-y")
    run("desfs_sealer", "verify", store, "--catalog", database.url("desfs_sealer").replace(f":{PASSWORD}", ""),
        PGPASSWORD=PASSWORD)  # fmt: skip


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("role", "statement"),
    [
        ("desfs_packer", "DELETE FROM container"),
        ("desfs_packer", "DELETE FROM shard_lease"),
        ("desfs_packer", "DROP TABLE container"),
        ("desfs_sealer", "UPDATE id_sequence SET last_ms = 0"),
        ("desfs_sealer", "UPDATE worker SET details = ''"),
        ("desfs_service", "UPDATE container SET state = 'deleted'"),
        ("desfs_service", "UPDATE shard_lease SET token = 1"),
        ("desfs_service", "CREATE TABLE mine (number integer)"),
    ],
)
def test_no_role_may_do_what_another_is_for(database: Database, role: str, statement: str) -> None:
    async def scenario() -> None:
        connection = await asyncpg.connect(database.url(role))
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(scenario())


@pytest.mark.postgres
def test_the_role_that_these_take_the_place_of_logs_in_no_more(database: Database, tmp_path: Path) -> None:
    done = desfs("verify", tmp_path, "--repair", env=database.environ("desfs"))
    assert done.returncode == 1
    assert "not permitted to log in" in done.stderr


# --- Redis -----------------------------------------------------------------------------------------------------------


@pytest.mark.fuse
@pytest.mark.redis
def test_mounts_and_packers_work_with_their_redis_users(packed: Packed, tmp_path: Path) -> None:
    """Indexes are kept and found, new days are heard of, and nothing is asked for that is not permitted."""
    with servers.redis_server(tmp_path) as server, server.client() as administrator:
        for line in re.findall(r"^ACL SETUSER .*$", PAGE, re.MULTILINE):
            administrator.execute_command(*line.split())
        urls = {
            name: f"redis://{name}:{password}@{server.host}:{server.port}/0"
            for name, password in re.findall(r"^ACL SETUSER (\S+) on >(\S+)", PAGE, re.MULTILINE)
        }
        env = environ(packed.server, READER) | {"DESFS_REDIS": urls["desfs-mount"]}
        with mounted(STORE, tmp_path / "first", env=env) as mount:
            assert packed.shown(mount) == packed.contents
        with mounted(STORE, tmp_path / "second", "refresh=600", env=env) as mount:
            assert packed.shown(mount) == packed.contents
            assert administrator.info("stats")["keyspace_hits"] > 0
            wait_until(lambda: administrator.pubsub_channels("desfs:new:*") != [], "the mount listens")
            packed.pack(PACKER, {"d/new": b"new"}, environ={"DESFS_REDIS": urls["desfs-packer"]})
            wait_until(lambda: packed.shown(mount) == packed.contents, "the announced container")
        assert administrator.execute_command("ACL", "LOG") == []
