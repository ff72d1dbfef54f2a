"""The assignment service: what it answers, what it refuses, and that nothing it refuses reaches the database."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest

from assignment.errors import CatalogCorrupt, CatalogTooOld, CatalogUnavailable, InvalidRequest
from assignment.metrics import REGISTRY
from assignment.opening import open_catalog
from assignment.service import create_app
from assignment.service_auth import Tokens
from assignment.service_settings import Listener, ServiceSettings
from des_format.assigned_names import parse_name
from des_format.shards import placement_shard
from tests.service.serving import DOWN, LIMIT_S, NOON_NS, TOKEN, run, served, wait_ready

DAY = "2026-11-20"


def test_a_file_gets_a_day_a_shard_and_an_id(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            answer = await one.client.post("/v1/assign", json={"path": "photos/ä.jpg"})
            assert answer.status_code == 200
            (row,) = answer.json()["assignments"]
            name = parse_name(row["id"])
            assert (row["path"], row["day"], name.day) == ("photos/ä.jpg", DAY, date(2026, 11, 20))
            assert row["shard"] == f"{placement_shard('photos/ä.jpg', 4):x}"
            assert one.reached() == ["reserve_ids"]

    run(test())


def test_a_batch_is_one_transaction(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            paths = [f"folder {n % 7}/{n}" for n in range(10_000)]
            rows = (await one.client.post("/v1/assign", json={"paths": paths})).json()["assignments"]
            assert [row["path"] for row in rows] == paths
            assert [int(row["shard"], 16) for row in rows] == [placement_shard(path, 4) for path in paths]
            assert len({row["id"] for row in rows}) == 10_000
            assert one.reached() == ["reserve_ids"]

    run(test())


def test_ids_alone_with_a_prefix(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            rows = (await one.client.post("/v1/assign", json={"count": 300, "prefix": "X7"})).json()["assignments"]
            rows += (await one.client.post("/v1/assign", json={"count": 1})).json()["assignments"]
            assert all(row.keys() == {"day", "id"} for row in rows)
            names = [parse_name(row["id"]) for row in rows]
            assert [name.prefix for name in names] == ["X7"] * 300 + ["DES"]
            # Also without the prefix no two are alike.
            assert len({(name.time_field, name.node_id, name.sequence) for name in names}) == 301

    run(test())


def test_the_day_is_that_of_the_services_clock_and_time_zone(tmp_path: Path) -> None:
    async def test() -> None:
        now = NOON_NS
        async with served(tmp_path, timezone="Asia/Tokyo", clock_ns=lambda: now) as one:
            for hours, day in ((2, "2026-11-20"), (1, "2026-11-21")):
                now += hours * 3600 * 10**9
                (row,) = (await one.client.post("/v1/assign", json={"path": "a"})).json()["assignments"]
                assert row["day"] == day
                assert (await one.client.get("/v1/shards")).json()["day"] == day

    run(test())


def test_requests_that_come_together_share_a_transaction(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            gate = one.watched.gates["reserve_ids"] = asyncio.Event()
            tasks = [asyncio.create_task(one.client.post("/v1/assign", json={"path": "first"}))]
            async with asyncio.timeout(LIMIT_S):
                await one.watched.waiting.get()
                tasks += [asyncio.create_task(one.client.post("/v1/assign", json={"path": f"{n}"})) for n in range(31)]
                while open_requests() < 32:  # noqa: ASYNC110 - the metric has no event
                    await asyncio.sleep(0)
            gate.set()
            rows = [(await task).json()["assignments"][0] for task in tasks]
            assert [row["path"] for row in rows] == ["first", *map(str, range(31))]
            assert len({row["id"] for row in rows}) == 32
            assert len(one.reached()) <= 3  # those whose body came late are in a third

    run(test())


def open_requests() -> float:
    return REGISTRY.get_sample_value("desfs_assignment_open_requests") or 0.0


REFUSED: list[tuple[bytes | dict[str, Any], str]] = [
    ({}, "want one of path, paths and count"),
    ({"path": "a", "count": 1}, "want one of path, paths and count"),
    ({"path": ""}, "at least 1 character"),
    ({"path": "x" * 4096}, "at most 4095 characters"),
    ({"path": 7}, "valid string"),
    ({"paths": []}, "at least 1 item"),
    ({"paths": ["a"] * 10_001}, "at most 10000 items"),
    ({"paths": "abc"}, "valid array"),
    ({"count": 0}, "greater than or equal to 1"),
    ({"count": 10_001}, "less than or equal to 10000"),
    ({"count": True}, "valid integer"),
    ({"count": 1, "prefix": "a-b"}, "match pattern"),
    ({"count": 1, "prefix": "ab\n"}, "match pattern"),
    ({"count": 1, "prefix": "ü"}, "match pattern"),
    ({"path": "a", "prefix": "X"}, "goes with count alone"),
    ({"path": "a", "more": 1}, "not permitted"),
    (b"", "Invalid JSON"),
    (b"{", "Invalid JSON"),
    (b"\xff", "Invalid JSON"),
    (b'{"path": "\\ud800"}', "Invalid JSON"),
    (b"[" * 100_000, "Invalid JSON"),
    (b"[1]", "an object"),
]


def test_malformed_requests_are_said_so_and_reach_nothing(tmp_path: Path) -> None:
    """422 for each, with what is wrong, and without what was sent."""

    async def test() -> None:
        async with served(tmp_path) as one:
            for body, problem in REFUSED:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                answer = await one.client.post("/v1/assign", content=content)
                assert (answer.status_code, problem in answer.text) == (422, True), (content[:80], answer.text)
                assert len(answer.content) < 2000
            assert (await one.client.get("/v1/shards", params={"day": "yesterday"})).status_code == 422
            assert (await one.client.get("/v1/nothing")).status_code == 404
            assert (await one.client.get("/v1/assign")).status_code == 405
            assert one.reached() == []

    run(test())


PATHS = ["/v1/assign", "/v1/shards", "/v1/workers", "/metrics", "/openapi.json", "/docs", "/healthz/", "/v1/none"]


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer ü"]
)
def test_without_the_token_nothing_is_told(tmp_path: Path, header: str | None) -> None:
    """401 with a challenge, on every path but the two probes, and the database hears nothing of it."""

    async def test() -> None:
        async with served(tmp_path) as one:
            del one.client.headers["Authorization"]
            headers = {} if header is None else {b"Authorization": header.encode()}
            for path in PATHS:
                for method in ("GET", "POST"):
                    answer = await one.client.request(method, path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            twice = [("Authorization", f"Bearer {TOKEN}")] * 2
            assert (await one.client.get("/v1/workers", headers=twice)).status_code == 401
            assert one.reached() == []
            assert (await one.client.get("/healthz")).status_code == 200

    run(test())


def test_who_has_no_token_is_told_so_before_the_body_is_read(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            sent: list[Any] = []

            async def receive() -> Any:
                raise AssertionError("the body was read")

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/v1/assign", "query_string": b"", "headers": []}
            for length in (b"10", b"100000000"):
                await one.app(scope | {"headers": [(b"content-length", length)]}, receive, send)
            starts = [dict(message["headers"]) for message in sent if message["type"] == "http.response.start"]
            assert [message["status"] for message in sent[::2]] == [401, 401]
            # A long one is not taken in for nothing: the connection ends.
            assert [start.get(b"connection") for start in starts] == [None, b"close"]

    run(test())


async def pieces(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """413, whether its length is known before or not, and the database hears nothing of it."""

    async def test() -> None:
        async with served(tmp_path, max_body=1000) as one:
            for content in (b"x" * 1001, pieces(11, 100), pieces(1, 1001), pieces(3000, 1000)):
                answer = await one.client.post("/v1/assign", content=content)
                assert answer.status_code == 413
                assert "more than 1000 bytes" in answer.text
            assert one.reached() == []
            fits = json.dumps({"path": "x" * 900}).encode().ljust(1000)
            assert (await one.client.post("/v1/assign", content=fits)).status_code == 200

    run(test())


def test_too_many_at_once_are_told_to_come_back(tmp_path: Path) -> None:
    """The probes and the metrics still answer."""

    async def test() -> None:
        async with served(tmp_path, max_requests=2) as one:
            gate = one.watched.gates["list_workers"] = asyncio.Event()
            tasks = [asyncio.create_task(one.client.get("/v1/workers")) for _ in range(2)]
            async with asyncio.timeout(LIMIT_S):
                for _ in tasks:
                    await one.watched.waiting.get()
            refused = await one.client.get("/v1/workers")
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await one.client.get(path)).status_code == 200
            gate.set()
            assert [(await task).status_code for task in tasks] == [200, 200]
            assert (await one.client.get("/v1/workers")).status_code == 200

    run(test())


def test_a_request_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, request_timeout_s=0.2) as one:
            for method in ("list_workers", "reserve_ids"):
                one.watched.gates[method] = asyncio.Event()
            for answer in (
                await one.client.get("/v1/workers"),
                await one.client.post("/v1/assign", json={"path": "a"}),
            ):
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")

            async def never() -> AsyncIterator[bytes]:
                yield b"{"
                await asyncio.Event().wait()

            assert (await one.client.post("/v1/assign", content=never())).status_code == 408

    run(test())


def test_a_catalog_that_is_down_is_a_503(tmp_path: Path) -> None:
    """Of the failure the client hears its kind alone; the process still lives."""

    async def test() -> None:
        async with served(tmp_path) as one:
            one.watched.failure = DOWN
            for answer in (
                await one.client.post("/v1/assign", json={"path": "a"}),
                await one.client.get("/v1/shards"),
                await one.client.get("/v1/workers"),
            ):
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
                assert "db-1" not in answer.text
            calls = len(one.watched.calls)
            assert (await one.client.get("/healthz")).json() == {"status": "alive"}
            assert len(one.watched.calls) == calls
            await wait_ready(one.client, 503)
            one.watched.failure = None
            await wait_ready(one.client)
            assert (await one.client.post("/v1/assign", json={"path": "a"})).status_code == 200

    run(test())


def test_a_catalog_that_is_damaged_is_a_500(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("a request failed")

    async def test() -> None:
        async with served(tmp_path) as one:
            one.watched.failure = CatalogCorrupt("page 7 of /var/lib/catalog")
            answer = await one.client.get("/v1/workers")
            assert (answer.status_code, answer.json()) == (500, {"detail": "CatalogCorrupt"})

    run(test())


def test_without_its_node_id_nothing_is_assigned(tmp_path: Path) -> None:
    """By its own clock: the catalog is not even asked."""

    async def test() -> None:
        late = 0.0
        async with served(tmp_path, monotonic=lambda: time.monotonic() + late, node_ttl_s=3600.0) as one:
            late = 3600.0
            answer = await one.client.post("/v1/assign", json={"path": "a"})
            assert (answer.status_code, "NodeIdLost" in answer.text) == (503, True)
            assert (await one.client.get("/readyz")).status_code == 503
            assert one.reached() == []

    run(test())


def test_a_catalog_that_is_away_at_the_start_is_waited_for(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("the catalog is out of reach")

    async def test() -> None:
        tries = 0

        async def opened() -> Any:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise CatalogUnavailable("not yet")
            return await open_catalog(str(tmp_path / "late.sqlite"))

        app = create_app(ServiceSettings(shard_bits=4, holder="replica"), opened)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://service") as client,
        ):
            assert (await client.post("/v1/assign", json={"path": "a"})).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            await wait_ready(client)
            assert tries == 3

        async def too_old() -> Any:
            raise CatalogTooOld("migrate first")

        app = create_app(ServiceSettings(shard_bits=4, holder="replica"), too_old)
        with pytest.raises(CatalogTooOld):
            async with app.router.lifespan_context(app):
                pass

    run(test())


def test_shards_and_workers_are_shown(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            catalog = one.watched.watched()
            day = date(2026, 11, 20)
            await catalog.heartbeat("a", "spool", {"host": "x", "shards": ["3"]}, 60)
            await catalog.heartbeat("b", "spool", {}, 60)
            lease = await catalog.acquire(day, "3", "a", 60)
            gone = await catalog.acquire(day, "4", "b", 60)
            assert lease is not None
            assert gone is not None
            await catalog.release(gone)
            shown = (await one.client.get("/v1/shards", params={"day": DAY})).json()
            rows = {row["shard"]: row for row in shown["shards"]}
            assert list(rows) == [f"{n:x}" for n in range(16)]
            assert (rows["3"]["holder"], rows["3"]["holds"], rows["3"]["owner"]) == ("a", True, "a")
            assert 0 < rows["3"]["expires_in_s"] <= 60
            assert (rows["4"]["holder"], rows["4"]["holds"]) == ("b", False)
            assert (rows["5"]["holder"], rows["5"]["holds"]) == (None, False)
            assert sorted(row["owner"] for row in rows.values()) == ["a"] * 8 + ["b"] * 8
            workers = (await one.client.get("/v1/workers")).json()["workers"]
            assert [(each["name"], each["alive"], each["details"].get("host")) for each in workers] == [
                ("a", True, "x"),
                ("b", True, None),
            ]

    run(test())


def test_what_the_service_can_do_is_described(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            described = (await one.client.get("/openapi.json")).json()
            assert described["paths"].keys() == {
                "/v1/assign", "/v1/shards", "/v1/workers", "/healthz", "/readyz", "/metrics",
            }  # fmt: skip
            body = described["paths"]["/v1/assign"]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert body["properties"].keys() == {"path", "paths", "count", "prefix"}

    run(test())


@pytest.mark.parametrize("need_token", [True, False])
def test_metrics_have_what_happened_and_no_token(tmp_path: Path, need_token: bool) -> None:
    async def test() -> None:
        async with served(tmp_path, metrics_need_token=need_token) as one:
            await one.client.post("/v1/assign", json={"path": "a"})
            await one.client.get(f"/secret-{TOKEN}")
            text = (await one.client.get("/metrics")).text
            assert 'desfs_assignment_requests_total{path="/v1/assign",status="200"}' in text
            assert 'desfs_assignment_requests_total{path="other",status="404"}' in text
            assert TOKEN not in text
            del one.client.headers["Authorization"]
            assert (await one.client.get("/metrics")).status_code == (401 if need_token else 200)

    run(test())


def test_tokens_are_read_again_when_their_file_changes(tmp_path: Path, announced_logs: list[str]) -> None:
    """Several are valid at once, so that one can be replaced; while the file is away the last ones stay."""
    announced_logs.append("the token file cannot be read")
    file = tmp_path / "tokens"
    file.write_text("one\n\n two \n")
    tokens = Tokens("three four", file)

    def valid() -> list[str]:
        words = ("one", "two", "three", "four", "five")
        return [word for word in words if tokens.accepts(f"Bearer {word}".encode())]

    assert valid() == ["one", "two", "three", "four"]
    (tmp_path / "new").write_text("two\nfive\n")
    os.replace(tmp_path / "new", file)
    assert valid() == ["two", "three", "four", "five"]
    file.unlink()
    assert valid() == ["two", "three", "four", "five"]
    file.write_text("")
    assert valid() == ["three", "four"]
    assert not any(word in repr(tokens) for word in ("three", "five"))


def test_tokens_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    for text, file in ((" ", None), (None, tmp_path / "empty"), (None, tmp_path / "missing"), (None, tmp_path)):
        with pytest.raises(InvalidRequest, match="token"):
            Tokens(text, file)
    assert Tokens(None, None).accepts(None)
    assert TOKEN not in repr(ServiceSettings(shard_bits=4, holder="replica", tokens=TOKEN))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_others_are_not_listened_to_without_a_token(host: str) -> None:
    with pytest.raises(InvalidRequest, match="takes a token"):
        Listener(host=host, port=0).check_open_to_all()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_is_listened_to_without_a_token(host: str) -> None:
    Listener(host=host, port=0).check_open_to_all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard_bits": 0},
        {"shard_bits": 33},
        {"timezone": "Mars/Base"},
        {"prefix": "a-b"},
        {"max_body": 0},
        {"node_ttl_s": -1},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        replace(ServiceSettings(shard_bits=4, holder="replica"), **wrong)
