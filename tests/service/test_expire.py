"""`desfs expire` as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from assignment.catalog import ContainerState
from desfs.removal.expire import _today
from desfs.settings import ExpireSettings
from tests import servers
from tests.mount.mounting import PATIENCE_S, PROGRAM, desfs
from tests.removing import BIG, DAY, World, put_day, put_part
from tests.unit.test_tombstones import FILES

OLDER = date(2020, 11, 19)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two days that are over, one with an external object, and one that is to come."""
    world = World(tmp_path)
    put_day(world.root, FILES | {"big": b"x" * BIG})
    put_day(world.root, {"older": b"1"}, OLDER)
    put_day(world.root, {"young": b"1"}, date(2999, 1, 1))
    world.repair()
    return world


def test_days_that_are_too_old_go(world: World) -> None:
    """docs/semantics.md: Whole days are deleted by desfs expire, their external objects too, and nothing else.

    The catalog knows it."""
    (world.root / f"{DAY}/README").write_bytes(b"foreign")
    (world.root / "README").write_bytes(b"foreign")
    put_part(world.root, f"{OLDER}.des", {"in the day's one container": b"1"})
    put_part(world.root, f"{DAY}/shard_10.des", {"decimal": b"1"})
    expire = ("expire", world.root, "--older-than", "52w", "--catalog", world.url)
    before = world.objects()
    done = desfs(*expire, "--dry-run", "--timezone", "UTC", "--wait", "5")
    assert (done.returncode, world.objects()) == (0, before)
    assert done.stdout.startswith(f"would delete 2 days ({OLDER} to {DAY}): ")
    done = desfs(*expire, "--yes", "--json")
    assert done.returncode == 0
    deleted = before.keys() - world.objects().keys()
    assert json.loads(done.stdout) == {
        "days": [str(OLDER), str(DAY)],
        "containers": len(deleted) - 1,
        "external": 1,
        "bytes": sum(before[key].size for key in deleted),
        "foreign": [f"{DAY}/README"],
    }
    assert done.stderr == f"desfs: {DAY}/README is left: it is neither a container nor an object that one names\n"
    assert world.objects().keys() - {f"{DAY}/README", "README"} == {
        key for key in before if key.startswith("2999-01-01/")
    }
    assert {row.state for row in world.rows().values() if row.day in (DAY, OLDER)} == {ContainerState.DELETED}
    world.assert_agrees()
    done = desfs(*expire, "--yes")
    assert (done.returncode, done.stdout) == (0, "deleted nothing: no day is that old; 1 foreign object left\n")


def test_a_store_without_old_days(world: World) -> None:
    done = desfs("expire", world.root, "--older-than", "100000d", "--catalog", world.url, "-y")
    assert (done.returncode, done.stdout, done.stderr) == (0, "deleted nothing: no day is that old\n", "")


def test_a_day_is_as_old_as_its_last_moment(world: World) -> None:
    """Of 2 days old is what ended 48 hours ago, in the time zone."""
    noon = datetime(2020, 11, 20, 12, tzinfo=UTC)
    assert _today(noon, "UTC") == DAY
    assert _today(noon + timedelta(hours=12), "UTC") == DAY + timedelta(1)
    assert _today(noon, "Pacific/Kiritimati") == DAY + timedelta(1)
    assert _today(noon - timedelta(hours=3), "Pacific/Honolulu") == DAY - timedelta(1)


@pytest.mark.parametrize(("text", "days"), [("90d", 90), ("12w", 84), ("0d", 0), (" 7D ", 7)])
def test_ages(text: str, days: int) -> None:
    assert ExpireSettings(older_than=text).older_than == days  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--older-than", "soon"), "'soon' is no age"),
        (("--older-than", "90"), "'90' is no age"),
        (("--older-than", "-1d"), "'-1d' is no age"),
        (("--older-than", "90d"), "--yes is missing"),
        (("--older-than", "90d", "--timezone", "Mars"), "'Mars' is no name of the time zone database"),
    ],
)
def test_usage(world: World, arguments: tuple[str, ...], said: str) -> None:
    before = world.objects()
    done = desfs("expire", world.root, "--catalog", world.url, *arguments)
    assert (done.returncode, done.stdout, world.objects()) == (2, "", before)
    assert said in done.stderr


@pytest.mark.parametrize(("answer", "status"), [(b"\n", 1), (b"no\n", 1), (b"y\n", 0)])
def test_somebody_at_a_terminal_is_asked(world: World, answer: bytes, status: int) -> None:
    """And sees a bar."""
    before = world.objects()
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [PROGRAM, "expire", world.root, "--older-than", "1d", "--catalog", world.url],
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
    ) as process:
        os.close(follower)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(leader, 65536)
        assert f"2 days, {OLDER} to {DAY}. Delete for good?".encode() in shown
        os.write(leader, answer)
        try:
            while piece := os.read(leader, 65536):
                shown += piece
        except OSError:  # EIO: the other side was closed
            pass
        assert process.wait(PATIENCE_S) == status
    os.close(leader)
    assert (world.objects() == before) == bool(status)
    assert ("deleting" in shown.decode()) == (status == 0)


def test_in_s3_with_postgres(s3: servers.S3Server, bucket: str, postgres: str, tmp_path: Path) -> None:
    """A day that an import has put, which the catalog does not know, goes too."""
    env = {**s3.environ(), "DESFS_CATALOG": postgres}
    url = f"s3://{bucket}/store"
    (tmp_path / "file").write_bytes(b"x" * BIG)
    for day in (OLDER, DAY):
        done = desfs("import", "--store", url, "--day", day, tmp_path / "file", "--big-file-threshold", BIG, env=env)
        assert done.returncode == 0
    assert desfs("verify", url, "--repair", env=env).returncode == 0
    done = desfs("import", "--store", url, "--day", OLDER - timedelta(1), tmp_path / "file", env=env)
    done = desfs("expire", url, "--older-than", "1w", "--yes", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("deleted 3 days (2020-11-18 to 2020-11-20): 3 containers, 2 external objects, ")
    done = desfs("expire", url, "--older-than", "1w", "--yes", env=env)  # the server may list the folders still
    assert (done.returncode, done.stdout) == (0, "deleted nothing: no day is that old\n")
    compare = ("--catalog", postgres.replace(f":{servers.POSTGRES_PASSWORD}@", "@"))
    done = desfs("verify", url, *compare, env={**s3.environ(), "PGPASSWORD": servers.POSTGRES_PASSWORD})
    assert (done.returncode, done.stdout) == (0, "compared 0 containers, 0 entries with the catalog: no damage\n")
