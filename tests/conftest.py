"""Fixtures for real servers and mounts, and what every test is held to.

A server that is missing is an error of the tests that use it, never a reason to skip them. What the project logs as a
warning or worse during a test fails it, unless the test announced that (`announced_logs`). What the run starts ends
with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.fakes.certificates import make_certificate

OWN_LOGGERS = ("des_format", "desfs", "assignment")
MARKERS = {"s3": "s3", "bucket": "s3", "redis": "redis", "postgres_session": "postgres", "mount_dir": "fuse"}
# Daemons that were told to end may still be at it when the last test is over.
END_S = 5.0


def pytest_configure() -> None:
    os.environ[servers.RUN_VARIABLE] = uuid.uuid4().hex
    # A proxy for the outside must not be asked for loopback.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = servers.HOST


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in getattr(item, "fixturenames", ()):
            if name in MARKERS:
                item.add_marker(MARKERS[name])


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the last test no mount below the run's temporary directory is left, and no process that the run started."""
    yield
    base = tmp_path_factory.getbasetemp().resolve()
    deadline = time.monotonic() + END_S
    while (left := _leftovers(base)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for mount in _mounts_below(base):
        with servers.mount_point(mount, stop_s=0):
            pass
    for pid in _processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "left behind by the tests:\n" + "\n".join(left)


def _leftovers(base: Path) -> list[str]:
    mounts = [f"mount {path}" for path in _mounts_below(base)]
    return mounts + [f"process {pid} {servers.command_of(pid)}" for pid in _processes()]


def _mounts_below(base: Path) -> list[Path]:
    return [entry.path for entry in servers.mount_table() if entry.path.is_relative_to(base)]


def _processes() -> list[int]:
    marked = servers.processes_with(servers.RUN_VARIABLE, os.environ[servers.RUN_VARIABLE])
    return [
        pid
        for pid in sorted({*marked, *servers.child_processes()})
        # Python's own, which ends with this process.
        if "multiprocessing.resource_tracker" not in servers.command_of(pid)
    ]


@pytest.fixture
def announced_logs() -> list[str]:
    """Regular expressions for the warnings and errors that a test expects in the log; the test appends to it."""
    return []


@pytest.fixture(autouse=True)
def no_unannounced_logs(caplog: pytest.LogCaptureFixture, announced_logs: list[str]) -> Iterator[None]:
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    unannounced = [
        f"{record.levelname} {record.name}: {record.getMessage()}"
        for record in records
        if record.levelno >= logging.WARNING
        and record.name.partition(".")[0] in OWN_LOGGERS
        and not any(re.search(pattern, record.getMessage()) for pattern in announced_logs)
    ]
    assert not unannounced, "logged, and not announced:\n" + "\n".join(unannounced)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """One S3 server for the whole run, started when the first test needs it."""
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: servers.S3Server) -> Iterator[str]:
    """The name of an empty bucket, deleted afterwards with all that is in it."""
    name = s3.new_bucket()
    yield name
    s3.delete_bucket(name)


@pytest.fixture(scope="session")
def redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.RedisServer]:
    """One Redis for the whole run. Tests take `redis`, which is empty."""
    with servers.redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(redis_session: servers.RedisServer) -> servers.RedisServer:
    """The run's Redis, emptied for this test."""
    with redis_session.client() as client:
        client.flushall()
    return redis_session


@pytest.fixture(scope="session")
def postgres_session() -> Iterator[servers.PostgresServer]:
    """One Postgres for the whole run. Its database `catalog` is an empty catalog: a template, which nobody opens.

    A test that stops the server starts it again.
    """
    from assignment.opening import migrate  # sqlalchemy takes a while, and few tests need it

    with servers.postgres_server() as server:
        server.run("CREATE DATABASE catalog")
        asyncio.run(migrate(server.url("catalog")))
        yield server


@pytest.fixture
def postgres(postgres_session: servers.PostgresServer) -> Iterator[str]:
    """The URL of an empty catalog in the run's Postgres, dropped afterwards."""
    database = postgres_session.new_database("catalog")
    yield postgres_session.url(database)
    postgres_session.drop_database(database)


@pytest.fixture
def mount_dir(tmp_path: Path) -> Iterator[servers.MountPoint]:
    """A directory to mount on; afterwards it is no mount point, and its daemons have ended (`servers.mount_point`)."""
    with servers.mount_point(tmp_path / "mnt") as mount:
        yield mount


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, from an authority whose own certificate is `ca` beside it."""
    return make_certificate(tmp_path)
