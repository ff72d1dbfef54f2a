"""The assignment service for tests: in this process without a socket, or as processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from assignment.errors import CatalogUnavailable
from assignment.opening import open_catalog
from assignment.service import create_app
from assignment.service_settings import ServiceSettings
from tests import servers
from tests.crash import PROGRAM
from tests.fakes.watched_catalog import WatchedCatalog

NOON_NS = 1_795_176_000_000_000_000  # 2026-11-20T12:00:00Z
TOKEN = "t0ken-of-the-tests"
LIMIT_S = 60.0


@dataclass
class Served:
    """A service over a SQLite catalog, and what a test does to it."""

    client: httpx.AsyncClient
    watched: WatchedCatalog
    app: Any

    def reached(self) -> list[str]:
        """The calls of the catalog but for those that keep the node id."""
        return [name for name in self.watched.calls if not name.endswith("_node_id")]


@contextlib.asynccontextmanager
async def served(
    tmp_path: Path,
    *,
    clock_ns: Callable[[], int] = lambda: NOON_NS,
    monotonic: Callable[[], float] = time.monotonic,
    token: str | None = TOKEN,
    **settings: Any,
) -> AsyncIterator[Served]:
    """The service with a node id; the client has the token."""
    watched = WatchedCatalog(await open_catalog(str(tmp_path / "catalog.sqlite")))

    async def opened() -> Any:
        return watched

    app = create_app(
        replace(ServiceSettings(shard_bits=4, holder="replica", tokens=token), **settings),
        opened,
        clock_ns=clock_ns,
        monotonic=monotonic,
    )
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client,
    ):
        one = Served(client, watched, app)
        await wait_ready(client)
        watched.calls.clear()
        yield one


async def wait_ready(client: httpx.AsyncClient, status: int = 200) -> None:
    """Wait until the service is ready, or is not."""
    async with asyncio.timeout(LIMIT_S):
        while (await client.get("/readyz")).status_code != status:  # noqa: ASYNC110 - it is asked, it does not tell
            await asyncio.sleep(0.02)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


@dataclass
class Replica:
    """A process of `desfs assignment`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    pid: int

    def client(self, ca: Path | None = None, token: str | None = TOKEN) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        verify = ssl.create_default_context(cafile=ca) if ca is not None else True
        return httpx.Client(base_url=self.url, headers=headers, verify=verify, timeout=LIMIT_S)

    def wait_log(self, text: str) -> None:
        """Wait until its log has the text."""
        deadline = time.monotonic() + LIMIT_S
        while text not in (log := self.log.read_text()):
            assert time.monotonic() < deadline, log
            time.sleep(0.02)

    def wait_ready(self, status: int = 200, ca: Path | None = None) -> None:
        deadline = time.monotonic() + LIMIT_S
        with self.client(ca) as client:
            while (found := client.get("/readyz").status_code) != status:
                assert time.monotonic() < deadline, f"/readyz says {found}, want {status}:\n{self.log.read_text()}"
                time.sleep(0.02)


@contextlib.contextmanager
def replica(
    catalog: str,
    folder: Path,
    *options: str,
    environ: dict[str, str] | None = None,
    ca: Path | None = None,
    ready: int = 200,
) -> Iterator[Replica]:
    """A replica whose /readyz says `ready`, on a port of its own; its catalog's URL, which may have a password, and its
    token come from the environment. It is told to end afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    command: list[str | Path] = [PROGRAM, "assignment", "--listen", "127.0.0.1:0", *options]
    given = {"DESFS_CATALOG": catalog, "DESFS_TOKENS": TOKEN} | (environ or {})
    env = os.environ | given
    with servers.child_process(command, log=log, env=env) as process:
        found = Replica(_wait_url(process, log), process, log, process.pid)
        found.wait_ready(ready, ca)
        yield found


def _wait_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + LIMIT_S
    while True:
        text = log.read_text(errors="replace")
        if match := re.search(r"https?://127\.0\.0\.1:\d+", text):
            return match[0]
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


DOWN = CatalogUnavailable("the database of db-1.internal is down")
