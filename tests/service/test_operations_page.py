"""docs/operations.md, "The operations page": what it shows and to whom, and how it looks in a browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from assignment.catalog import Catalog, ContainerRecord, ContainerState, DaySummary, ShardHolder, Worker
from assignment.charts import COUNTS, PLOT_HEIGHT, SIZES, build_chart, round_up_count, round_up_size
from assignment.errors import CatalogCorrupt
from assignment.overview import MAX_SHARDS, MAX_WORKERS, Overview, Owners, build_overview, printable
from tests import servers
from tests.service.serving import DOWN, LIMIT_S, TOKEN, replica, run, served

DAY = date(2026, 11, 20)  # that of `served`
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
NOTHING = "\N{EN DASH}"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;"
CONTROLS = "\x1b[31m\u202e\ud800\u0000"


# --- reading it --------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """A page: its elements, its text, and the rows of its tables by the id of their heading."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._tables: dict[str, list[list[str]]] = {}
        self._table = ""
        self._in_cell = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._table = dict(attrs).get("aria-labelledby") or ""
        elif tag == "tr":
            self._tables.setdefault(self._table, []).append([])
        elif tag in ("td", "th"):
            self._tables[self._table][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self._tables[self._table][-1][-1] += data

    def rows(self, table: str) -> list[list[str]]:
        """The rows below the head, white space in their cells as it is shown."""
        return [[" ".join(cell.split()) for cell in row] for row in self._tables[table][1:]]

    def shown(self) -> str:
        """All the text, white space as it is shown."""
        return " ".join(self.text.split())


def basic(password: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


# --- to whom it is shown -----------------------------------------------------------------------------------------


def test_a_browser_is_asked_for_the_token(tmp_path: Path) -> None:
    """It is the password of HTTP Basic, for any user, or a bearer token; the password is good for this page alone."""
    with replica(str(tmp_path / "catalog.sqlite"), tmp_path / "one") as one, one.client(token=None) as client:
        wrong: list[dict[str, str]] = [
            {},
            basic("wrong"),
            basic(TOKEN + "x"),
            basic("", TOKEN),
            {"Authorization": "Basic"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": f"Basic {base64.b64encode(TOKEN.encode()).decode()}"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Digest {TOKEN}"},
        ]
        for headers in wrong:
            answer = client.get("/", headers=headers)
            assert answer.status_code == 401, headers
            challenges = answer.headers.get_list("WWW-Authenticate")
            assert [each.split()[0] for each in challenges] == ["Basic", "Bearer"]
            assert answer.json() == {"detail": "a valid bearer token is needed"}
        for headers in (basic(TOKEN), basic(TOKEN, ""), {"Authorization": f"Bearer {TOKEN}"}):
            assert client.get("/", headers=headers).status_code == 200
        for method, path in (("GET", "/v1/workers"), ("GET", "/metrics"), ("POST", "/v1/assign"), ("GET", "/index")):
            answer = client.request(method, path, headers=basic(TOKEN))
            assert answer.status_code == 401
            assert [each.split()[0] for each in answer.headers.get_list("WWW-Authenticate")] == ["Bearer"]
        head = client.head("/", headers=basic(TOKEN))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Type"] == "text/html; charset=utf-8"
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert client.request(method, "/", headers=basic(TOKEN)).status_code == 405
        metrics = client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
        assert f'desfs_assignment_requests_total{{path="/",status="401"}} {len(wrong)}.0' in metrics
    assert TOKEN not in one.log.read_text()


def test_a_password_may_have_colons_and_other_letters(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, token=None, tokens="a:b:ä") as one:
            assert (await one.client.get("/", headers=basic("a:b:ä"))).status_code == 200
            assert (await one.client.get("/", headers=basic("b:ä", "a:"))).status_code == 401
            twice = [*basic("a:b:ä").items()] * 2
            assert (await one.client.get("/", headers=twice)).status_code == 401

    run(test())


def test_without_tokens_everybody_sees_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, token=None) as one:
            assert (await one.client.get("/")).status_code == 200

    run(test())


# --- what goes with it -------------------------------------------------------------------------------------------


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    """The policy allows the one style sheet alone; there is no script, no handler, and no address of another place."""

    async def test() -> None:
        async with served(tmp_path) as one:
            answer = await one.client.get("/")
            style = re.search(r"<style>(.*)</style>", answer.text, re.DOTALL)
            assert style is not None
            digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
            policy = answer.headers["Content-Security-Policy"].split("; ")
            assert {"default-src 'none'", f"style-src 'sha256-{digest}'", "frame-ancestors 'none'"} < set(policy)
            assert not any(word in answer.headers["Content-Security-Policy"] for word in ("unsafe", "*", "http"))
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            page = Parsed(answer.text)
            assert not {"script", "iframe", "form", "img"} & {tag for tag, _ in page.tags}
            for tag, attributes in page.tags:
                assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
                for name in ("href", "src"):
                    assert re.match(r"\?|data:,$", attributes.get(name) or "?"), (tag, attributes)
            for tag, attributes in page.tags:
                assert tag != "th" or attributes.get("scope") in ("col", "row")
            tags = [tag for tag, _ in page.tags]
            assert tags.count("caption") == tags.count("table") == 5

    run(test())


@pytest.mark.parametrize(
    ("query", "refresh"),
    [
        ("", "10; url=?refresh=10"),
        ("?refresh=3", "3; url=?refresh=3"),
        ("?day=2026-11-19", "10; url=?day=2026-11-19&refresh=10"),
        ("?refresh=0&day=2026-11-19", None),
    ],
)
def test_it_loads_itself_again_with_its_query(tmp_path: Path, query: str, refresh: str | None) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            page = Parsed((await one.client.get(f"/{query}")).text)
            found = [
                each["content"] for tag, each in page.tags if tag == "meta" and each.get("http-equiv") == "refresh"
            ]
            assert found == ([] if refresh is None else [refresh])
            links = [each["href"] for tag, each in page.tags if tag == "a"]
            wanted = "?refresh=0" if refresh else "?day=2026-11-19&refresh=10"
            assert links == [wanted.replace("?", "?day=2026-11-19&") if "day" in query and refresh else wanted]
            assert f"Shards of {'2026-11-19' if 'day' in query else DAY}" in page.text

    run(test())


def test_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as one:
            for query in ("day=yesterday", "refresh=-1", "refresh=3601", "refresh=x", f"day={MARKUP}"):
                answer = await one.client.get(f"/?{query}")
                assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/json")
            assert one.reached() == []

    run(test())


# --- what it costs, and what it does without its catalog ---------------------------------------------------------


def test_many_viewers_cost_one_look(tmp_path: Path) -> None:
    """The catalog is asked once a second, and not again before it has answered."""

    async def test() -> None:
        late = 0.0
        async with served(tmp_path, monotonic=lambda: time.monotonic() + late, node_ttl_s=3600.0) as one:
            look = ["summarize_days", "list_workers", "now", "list_holders"]
            gate = one.watched.gates["list_workers"] = asyncio.Event()
            tasks = [asyncio.create_task(one.client.get("/")) for _ in range(30)]
            async with asyncio.timeout(LIMIT_S):
                await one.watched.waiting.get()
                late = 2.0
                tasks.append(asyncio.create_task(one.client.get("/")))
                gate.set()
                assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
            assert one.reached() in (look, [*look[:3], *look])  # the last of them may have come after the answer
            late = 4.0
            one.watched.calls.clear()
            for _ in range(5):
                assert (await one.client.get("/")).status_code == 200
            assert one.reached() == look

    run(test())


def test_it_answers_when_the_service_is_busy(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, max_requests=1) as one:
            gate = one.watched.gates["reserve_ids"] = asyncio.Event()
            task = asyncio.create_task(one.client.post("/v1/assign", json={"path": "a"}))
            async with asyncio.timeout(LIMIT_S):
                await one.watched.waiting.get()
            assert (await one.client.get("/v1/workers")).status_code == 503
            assert (await one.client.get("/")).status_code == 200
            gate.set()
            assert (await task).status_code == 200

    run(test())


def assert_says_down(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "Content-Security-Policy" in answer.headers
    page = Parsed(answer.text)
    assert "The catalog does not answer" in page.text
    assert ("meta", {"http-equiv": "refresh", "content": "10; url=?refresh=10"}) in page.tags
    assert "db-1" not in answer.text


def test_a_catalog_that_is_down_is_said_on_the_page(tmp_path: Path) -> None:
    """With status 503, and the page goes on loading itself again. Of the failure it says its kind alone."""

    async def test() -> None:
        late = 0.0
        async with served(tmp_path, monotonic=lambda: time.monotonic() + late, node_ttl_s=3600.0) as one:
            one.watched.failure = DOWN
            assert_says_down(await one.client.get("/"))
            one.watched.failure = None
            late = 2.0
            assert (await one.client.get("/")).status_code == 200

    run(test())


def test_a_catalog_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, request_timeout_s=0.2) as one:
            one.watched.gates["list_holders"] = asyncio.Event()
            assert_says_down(await one.client.get("/"))

    run(test())


def test_a_catalog_that_is_damaged_is_a_500(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("the operations page failed")

    async def test() -> None:
        async with served(tmp_path) as one:
            one.watched.failure = CatalogCorrupt("page 7 of /var/lib/catalog")
            answer = await one.client.get("/")
            assert answer.status_code == 500
            assert "CatalogCorrupt" in answer.text
            assert "/var/lib" not in answer.text

    run(test())


def test_postgres_stops_and_comes_back(postgres_session: servers.PostgresServer, tmp_path: Path) -> None:
    database = postgres_session.new_database("catalog")
    try:
        with replica(postgres_session.url(database), tmp_path / "one") as one, one.client() as client:
            assert client.get("/").status_code == 200
            postgres_session.stop()
            try:
                wait(lambda: client.get("/").status_code == 503)
                assert_says_down(client.get("/"))
            finally:
                postgres_session.start()
            wait(lambda: client.get("/").status_code == 200)
            assert postgres_session.host not in Parsed(client.get("/").text).text
    finally:
        postgres_session.drop_database(database)


def wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what it shows -----------------------------------------------------------------------------------------------


async def put(catalog: Catalog, shard: str, holder: str, *records: ContainerRecord) -> None:
    for day in {each.day for each in records}:
        lease = await catalog.acquire(day, shard, holder, 60)
        assert lease is not None
        await catalog.adopt_containers(lease, [each for each in records if each.day == day])


def container(
    generation: int, state: ContainerState = ContainerState.COMMITTED, day: date = DAY, shard: str = "3"
) -> ContainerRecord:
    key = f"{day}/{shard}-{generation:06d}.des"
    return ContainerRecord(
        object_key=key, day=day, shard=shard, generation=generation, size=2048, files=1500, state=state
    )


def test_days_shards_workers_spools_and_failures(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, holder="replica 7") as one:
            catalog = one.watched.watched()
            states = [container(number, state) for number, state in enumerate(ContainerState, 1)]
            await put(catalog, "3", "spool1-a", *states, container(1, day=DAY - timedelta(days=1)))
            gone = await catalog.acquire(DAY, "4", "spool2-c", 60)
            assert gone is not None
            await catalog.release(gone)
            failures = [
                {"at": "2026-11-20T10:00:00+00:00", "what": "the older one"},
                {"at": "2026-11-20T12:00:00+01:00", "what": "the newer one"},
            ]
            said = {"host": "host-a", "spool": "/spool/1", "packed_files": 12_345, "packed_bytes": 3 << 30}
            waits = {"waiting_files": 7, "waiting_bytes": 1536, "oldest_waiting_s": 250.0}
            shards = {"shards": ["0", "1", "2", "3", "4", "5", "6", "7"]}
            await catalog.heartbeat("spool1-a", "spool1", {**said, **waits, **shards, "failures": failures}, 60)
            await catalog.heartbeat("spool1-b", "spool1", {"waiting_files": 3, "oldest_waiting_s": 8}, 60)
            await catalog.heartbeat("spool2-c", "spool2", {"spool": "/spool/2", "shards": ["8"], **waits}, -30)
            page = Parsed((await one.client.get("/")).text)

        assert page.rows("days") == [
            ["2026-11-20", "3,000", "4.0 KiB", "1", "1", "1", "1"],
            ["2026-11-19", "1,500", "2.0 KiB", "0", "1", "0", "0"],
        ]
        shards_shown = page.rows("shards")
        assert [row[0] for row in shards_shown] == [f"{n:x}" for n in range(16)]
        assert shards_shown[3][1:] == ["spool1-a", "held for 60 s more", "spool1-a", "1"]
        assert re.fullmatch(r"free for \d s", shards_shown[4][2])
        assert shards_shown[4][3:] == ["spool2-c", "1"]
        assert shards_shown[8][1:] == ["spool1-b", "never leased", NOTHING, NOTHING]
        assert [row[:5] for row in page.rows("spools")] == [
            ["/spool/1spool1", "2 alive", "10", "1.5 KiB", "4 min"],
            ["/spool/2spool2", "nobody packs it 1 gone", "7", "1.5 KiB", "5 min"],
        ]
        workers = page.rows("workers")
        assert workers[0][:8] == ["host-aspool1-a", "alive", "/spool/1", "8", "7", "4 min", "12,345", "3.0 GiB"]
        assert workers[1][:8] == ["?spool1-b", "alive", "spool1", "8", "3", "8 s", "?", "?"]
        assert re.fullmatch(r"gone last heard over 3\d s ago its shards are with spool1-b", workers[2][1])
        assert workers[2][3] == "0"
        assert [row[1:] for row in page.rows("failures")] == [
            ["host-aspool1-a", "the newer one"],
            ["host-aspool1-a", "the older one"],
        ]
        shown = page.shown()
        assert "Service replica 7" in shown
        assert "1 of 3 packers gone. Others tend their shards. Nobody packs /spool/2." in shown
        assert "Files of today3,000 4.0 KiB, 2026-11-20" in shown
        assert "Shards of 2026-11-20 16 shards, 1 leased now" in shown
        assert "4,500 in 2 days, the last 2026-11-20" in shown
        bars = re.findall(r"2026-11-\d\d: [\d,.]+(?: KiB)?", shown)
        assert bars == [f"2026-11-{day}" for day in ("19: 1,500", "20: 3,000", "19: 2.0 KiB", "20: 4.0 KiB")]

    run(test())


ALLOWED = {
    *("html", "head", "meta", "title", "link", "style", "body", "header", "main", "nav", "section", "div", "span"),
    *("h1", "h2", "p", "a", "time", "strong", "small", "dl", "dt", "dd", "svg", "line", "rect", "text"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td"),
}


async def hostile(catalog: Catalog) -> None:
    """Workers that say anything, with names of any length."""
    long = "w" * 200
    failures = [
        {"at": at, "what": MARKUP + CONTROLS + "x" * 1000} for at in ("x", 7, None, "0001-01-01T00:00:00+01:00")
    ]
    said: dict[str, Any] = {
        "host": MARKUP + CONTROLS,
        "spool": f"/{MARKUP}",
        "failures": failures,
        "shards": [MARKUP, 7],
    }
    await catalog.heartbeat(MARKUP, MARKUP, said, 60)
    await catalog.heartbeat(f"{MARKUP} gone", MARKUP, {**said, "shards": ["0", "1"]}, -100)
    numbers = {"waiting_files": 10**30, "waiting_bytes": -1, "oldest_waiting_s": float("nan"), "packed_files": True}
    await catalog.heartbeat(
        long, "spool", {**numbers, "host": long, "spool": f"/{long}/{long}", "failures": MARKUP}, 60
    )
    odd = {"waiting_files": 2**62, "waiting_bytes": 2**62, "oldest_waiting_s": 1e15, "packed_bytes": float("inf")}
    await catalog.heartbeat("odd", "odd", {**odd, "host": ["x"], "spool": None, "failures": [7, {}, [], None]}, 60)
    await put(catalog, "3", MARKUP, container(1))
    await put(catalog, "4", long, container(1, shard="4"))


def test_whatever_names_hold_they_are_text(tmp_path: Path) -> None:
    """Markup is shown as it was written, controls and halves of characters as signs in their place."""

    async def test() -> None:
        async with served(tmp_path, holder=MARKUP) as one:
            await hostile(one.watched.watched())
            answer = await one.client.get("/")
            page = Parsed(answer.text)
            assert answer.status_code == 200
            assert {tag for tag, _ in page.tags} <= ALLOWED
            assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
            assert page.text.count(MARKUP) >= 8
            assert f"{MARKUP}\ufffd[31m\ufffd\ufffd\ufffd" in page.text
            assert not (set(CONTROLS) - set("[31m")) & set(page.text)
            assert len(answer.content) < 60_000
            numbers = {row[0]: row[4:8] for row in page.rows("workers")}
            assert numbers["w" * 119 + "…" + "w" * 119 + "…"] == ["?", NOTHING, "?", "?"]
            assert numbers["?odd"] == [f"{2**62:,}", f"{1e15 / 86400:,.1f} days", "?", "?"]
            assert {row[0] for row in page.rows("failures")} == {NOTHING}

    run(test())


def worker(name: str, *, alive: bool = True, at: datetime = NOW, **details: Any) -> Worker:
    return Worker(name, "spool", details, at - timedelta(hours=1), at, alive)


def overview(workers: list[Worker], shard_bits: int = 4, holders: list[ShardHolder] | None = None) -> Overview:
    return build_overview(
        now=NOW,
        today=DAY,
        day=DAY,
        days=[],
        workers=workers,
        owners=Owners.among(workers, shard_bits),
        holders=holders or [],
        shard_bits=shard_bits,
    )


def holder(shard: str) -> ShardHolder:
    return ShardHolder(DAY, shard, "a", 1, NOW, False)


@pytest.mark.parametrize(
    ("shard_bits", "leased", "shown"),
    [
        (8, ["3f"], 256),
        (9, ["1ff", "003"], 2),
        (13, ["1fff", "0000", "3fff", "zzzz", "3f"], 5),
        (32, ["ffffffff"], 1),
    ],
)
def test_shards_of_large_stores(shard_bits: int, leased: list[str], shown: int) -> None:
    """All of up to 256, else those that were leased; each has its owner, unless the layout does not have it."""
    found = overview([worker("a")], shard_bits, [holder(shard) for shard in leased])
    rows = {row.shard: row for row in found.shards}
    assert (len(rows), found.shards_in_all) == (shown, 2**shard_bits)
    assert {shard: row.owner for shard, row in rows.items() if row.owner != "a"} == dict.fromkeys(
        set(leased) & {"3fff", "zzzz", "3f"} if shard_bits == 13 else [], None
    )
    assert [row.owned for row in found.workers] == [2**shard_bits]


def test_the_catalog_is_asked_for_so_many_shards(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, shard_bits=12) as one:
            catalog = one.watched.watched()
            for number in range(MAX_SHARDS + 2):
                await catalog.acquire(DAY, f"{number:03x}", "a", 60 + number)
            page = Parsed((await one.client.get("/")).text)
            assert [row[0] for row in page.rows("shards")] == [f"{number:03x}" for number in range(2, MAX_SHARDS + 2)]
            assert f"{MAX_SHARDS} of 4,096, {MAX_SHARDS} leased now" in page.shown()

    run(test())


def test_of_many_workers_those_that_live_are_shown_first() -> None:
    live = [worker(f"live{number:03}") for number in range(MAX_WORKERS - 1)]
    gone = [worker(f"gone{number}", alive=False, at=NOW - timedelta(hours=3 - number)) for number in range(3)]
    found = overview([*gone, *live])
    assert [row.name for row in found.workers[-2:]] == ["live198", "gone2"]
    assert (found.alive, found.gone, found.workers_left_out) == (199, 3, 2)


def test_texts_are_cut_and_printable() -> None:
    texts = {
        "": "?",
        "a b": "a b",
        "ä\n\u200b\udfff": "ä\ufffd\ufffd\ufffd",
        "x" * 121: "x" * 119 + "…",
        "y" * 120: "y" * 120,
    }
    assert {text: printable(text) for text in texts} == texts
    assert [printable(each) for each in (None, 7, ["x"])] == ["?"] * 3


def test_axes_end_at_round_numbers() -> None:
    counts = {0: 2, 1: 2, 2: 2, 3: 4, 4: 4, 5: 10, 10: 10, 11: 20, 999: 1000, 1000: 1000, 1001: 2000, 4001: 10_000}
    assert {most: round_up_count(most) for most in counts} == counts
    sizes = {0: 2, 1: 2, 2: 2, 3: 4, 1024: 1024, 1025: 2048, 2**60 - 1: 2**60}
    assert {most: round_up_size(most) for most in sizes} == sizes
    for most in range(3000):
        assert most <= round_up_count(most) <= max(2.5 * most, 2)
        assert most <= round_up_size(most) <= max(2 * most, 2)
    ends = {2: "2", 10_000: "10 k", 4_000_000: "4 M", 10**15: "1,000 T"}
    assert {count: COUNTS.on_axis(count) for count in ends} == ends
    assert [SIZES.on_axis(size) for size in (1, 512, 1024, 2**43)] == ["1 B", "512 B", "1 KiB", "8 TiB"]


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 30])
def test_bars_are_in_proportion(count: int) -> None:
    days = [DaySummary(DAY + timedelta(days=n), {}, files=n * 10, size=0) for n in range(count)]
    chart = build_chart("Files", days, lambda each: each.files, COUNTS)
    assert len(chart.bars) == count
    top = round_up_count(max(count - 1, 0) * 10)
    for n, bar in enumerate(chart.bars):
        assert bar.height == pytest.approx(max(n * 10 / top * PLOT_HEIGHT, 1.5) if n else 0)
        assert 0 <= bar.x < bar.x + bar.width <= 100
    assert all(left.x + left.width < right.x for left, right in zip(chart.bars, chart.bars[1:], strict=False))
    labelled = [bar.day for bar in chart.bars if bar.label]
    assert len(labelled) == (count if count <= 7 else 3)
    assert labelled[:1] == [each.day for each in days[:1]]
    assert labelled[-1:] == [each.day for each in days[-1:]]
