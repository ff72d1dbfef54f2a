"""The operations page of a running set-up, and how it looks in a browser."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from assignment.opening import open_catalog
from tests import servers
from tests.crash import PROGRAM
from tests.service.serving import TOKEN, Replica, replica, run
from tests.service.test_operations_page import DAY, MARKUP, Parsed, basic, container, hostile, put, wait

CHROMIUM = "/usr/bin/chromium"
FILES = 24
SIZE = 1000
LEASE_TTL_S = 3.0


# --- a running set-up --------------------------------------------------------------------------------------------


@dataclass
class Running:
    """Three packers on two spools, of which the second's was killed; who tended which shard before that."""

    service: Replica
    victim: str
    owners: dict[str, str]
    spools: list[Path]

    def page(self, query: str = "") -> Parsed:
        with self.service.client(token=None) as client:
            answer = client.get(f"/{query}", headers=basic(TOKEN))
        assert answer.status_code == 200
        return Parsed(answer.text)


def shares(owners: dict[str, str]) -> dict[str, set[str]]:
    return {name: {shard for shard, owner in owners.items() if owner == name} for name in owners.values()}


@pytest.fixture(scope="module")
def running(postgres_session: servers.PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("running")
    database = postgres_session.new_database("catalog")
    catalog = postgres_session.url(database)
    spools = [folder / "spool-a", folder / "spool-b"]
    try:
        with contextlib.ExitStack() as stack:
            service = stack.enter_context(replica(catalog, folder / "service"))
            client = stack.enter_context(service.client())
            for number in range(FILES):
                path = spools[number % 2] / f"folder-{number}" / "file.bin"
                path.parent.mkdir(parents=True)
                path.write_bytes(bytes(SIZE))
            (spools[1] / "late.tmp").write_bytes(bytes(SIZE))  # a program is still at it
            packers = [
                stack.enter_context(packer(spools[number // 2], folder / "store", catalog, folder / f"packer-{number}"))
                for number in range(3)
            ]

            def workers() -> list[dict[str, Any]]:
                found: list[dict[str, Any]] = client.get("/v1/workers").json()["workers"]
                return found

            def owners() -> dict[str, str]:
                return {row["shard"]: row["owner"] for row in client.get("/v1/shards").json()["shards"]}

            def has_settled() -> bool:
                found = workers()
                packed = sum(each["details"]["packed_files"] for each in found)
                claims = {each["name"]: set(each["details"]["shards"]) for each in found}
                return len(found) == 3 and packed == FILES and claims == shares(owners())

            wait(has_settled)
            before = owners()
            assert set(before.values()) == {each["name"] for each in workers()}
            (victim,) = (each["name"] for each in workers() if each["details"]["spool"] == str(spools[1]))
            packers[2].kill()
            wait(lambda: [each["alive"] for each in workers()].count(False) == 1)
            yield Running(service, victim, before, spools)
    finally:
        postgres_session.drop_database(database)


def packer(spool: Path, store: Path, catalog: str, log: Path) -> contextlib.AbstractContextManager[Any]:
    times = {"settle": 0.2, "max-age": 0.5, "scan-interval": 0.2, "rescan-interval": 1, "lease-ttl": LEASE_TTL_S}
    options = [word for name, seconds in times.items() for word in (f"--{name}", str(seconds))]
    command: list[str | Path] = [PROGRAM, "packer", "--spool", spool, "--store", store, *options]
    return servers.child_process(command, log=log, env=os.environ | {"DESFS_CATALOG": catalog})


def test_a_packer_that_was_killed(running: Running) -> None:
    """Its row says so, and who has its shards; those of the others stay where they were."""
    page = running.page()
    workers = {row[0].removeprefix(os.uname().nodename): row for row in page.rows("workers")}
    gone = workers.pop(running.victim)
    heard, _, heirs = gone[1].partition(" its shards are with ")
    assert re.fullmatch(r"gone last heard over \d+ (s|min) ago", heard)
    assert [row[1] for row in workers.values()] == ["alive", "alive"]
    now = {row[0]: row[1] for row in page.rows("shards")}
    moved = {shard for shard, owner in now.items() if owner != running.owners[shard]}
    assert moved == {shard for shard, owner in running.owners.items() if owner == running.victim}
    assert moved
    assert (gone[3], heirs) == ("0", ", ".join(sorted({now[shard] for shard in moved})))
    assert sum(int(row[3]) for row in workers.values()) == 16
    assert f"1 of 3 packers gone. Others tend their shards. Nobody packs {running.spools[1]}." in page.shown()
    spools = {row[0]: row[1:] for row in page.rows("spools")}
    (left,) = (row for path, row in spools.items() if path.startswith(str(running.spools[1])))
    assert left[:3] == ["nobody packs it 1 gone", "1", "1000 B"]


def test_what_was_packed(running: Running) -> None:
    page = running.page()
    days = page.rows("days")
    assert sum(int(row[1]) for row in days) == FILES
    assert sum(int(row[6]) for row in page.rows("workers")) == FILES
    leased = sum(row[2] != "never leased" for day in days for row in running.page(f"?day={day[0]}").rows("shards"))
    assert leased > 0
    titles = re.findall(r"\d{4}-\d\d-\d\d: ([\d,.]+(?: KiB)?)", page.shown())
    assert sum(int(each) for each in titles[: len(days)]) == FILES


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Browser]:
    # As root Chromium has no sandbox.
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, width: int, scheme: Any = "light") -> Iterator[tuple[Page, list[str]]]:
    """The page, once it is there, and what the browser complains about, as it comes."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        http_credentials={"username": "operator", "password": TOKEN},
    )
    with contextlib.closing(context):
        page = context.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"{request.url}: {request.failure}"))
        answer = page.goto(url)
        assert answer is not None
        assert answer.status in (200, 503)
        yield page, problems


# Rectangles of what is seen: texts line by line, and boxes, without what a scrolling box or a picture cuts off.
LAYOUT = """() => {
  const wide = document.documentElement.clientWidth, problems = [], texts = [];
  const cut = (node, rect) => {
    const seen = {left: rect.left, top: rect.top, right: rect.right, bottom: rect.bottom};
    for (let up = node.parentElement; up; up = up.parentElement) {
      if (up === document.body || getComputedStyle(up).overflowX === "visible") continue;
      const box = up.getBoundingClientRect();
      seen.left = Math.max(seen.left, box.left); seen.right = Math.min(seen.right, box.right);
      seen.top = Math.max(seen.top, box.top); seen.bottom = Math.min(seen.bottom, box.bottom);
    }
    return seen;
  };
  const rects = (node, of) => [...of.getClientRects()].map(rect => cut(node, rect))
    .filter(rect => rect.right - rect.left > 1 && rect.bottom - rect.top > 1);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const name = node => `${node.nodeName} ${(node.textContent || "").trim().replace(/\\s+/g, " ").slice(0, 60)}`;
  const inside = (node, rect) => {
    if (rect.left < -0.5 || rect.right > wide + 0.5 || rect.top < -0.5) problems.push(`sticks out: ${name(node)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, range = document.createRange();
    if (!node.data.trim() || node.parentElement.closest("title")) continue;
    range.selectNodeContents(node);
    for (const rect of rects(node, range)) { inside(node, rect); texts.push([node, rect]); }
  }
  texts.forEach(([node, rect], at) => texts.slice(at + 1).forEach(([other, its]) => {
    if (node !== other && meet(rect, its)) problems.push(`overlap: ${name(node)} / ${name(other)}`);
  }));
  for (const parent of document.querySelectorAll("body, body *:not(svg, svg *)")) {
    const boxes = [...parent.children].map(child => [child, rects(child, child)]);
    for (const [child, all] of boxes) for (const rect of all) inside(child, rect);
    boxes.forEach(([child, all], at) => boxes.slice(at + 1).forEach(([other, its]) => {
      if (all.some(a => its.some(b => meet(a, b)))) problems.push(`overlap: ${name(child)} / ${name(other)}`);
    }));
  }
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    for (const part of svg.querySelectorAll("text, rect")) {
      const rect = part.getBoundingClientRect();
      if (rect.left < box.left - 1 || rect.right > box.right + 1
        || rect.bottom > box.bottom + 1 || rect.top < box.top - 1)
        problems.push(`cut off: ${name(part)}`);
    }
  }
  if (document.documentElement.scrollWidth > wide) problems.push(`${document.documentElement.scrollWidth} px wide`);
  return [problems, texts.length];
}"""

# Texts whose contrast to what is behind them is below 4.5 (WCAG 2.2, 1.4.3).
CONTRAST = """() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = node => {
    for (let up = node; up; up = up.parentElement) {
      const color = parse(getComputedStyle(up).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    throw new Error("nothing behind it");
  };
  const problems = [];
  for (const node of document.querySelectorAll("body *:not(svg, svg *)")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) problems.push(`${ratio.toFixed(2)}: ${node.textContent}`);
  }
  return problems;
}"""


def assert_well_set(browser: Browser, url: str) -> None:
    for width in (400, 1600):
        for scheme in ("light", "dark"):
            with opened(browser, url, width, scheme) as (page, problems):
                found, texts = page.evaluate(LAYOUT)
                assert (found, page.evaluate(CONTRAST), problems) == ([], [], []), f"{width} px, {scheme}"
                assert texts > 5


def test_a_running_set_up_in_a_browser(running: Running, browser: Browser) -> None:
    """No complaint in the console; nothing overlaps, or sticks out of the page, at 400 and at 1,600 px."""
    assert_well_set(browser, running.service.url)
    with opened(browser, running.service.url, 1600) as (page, _):
        row = page.locator("tr.gone")
        assert running.victim in row.inner_text()
        assert "last heard over" in row.inner_text()
        page.get_by_role("link", name="Pause").click()
        assert page.get_by_role("link", name="Go on").count() == 1
        assert page.url.endswith("?refresh=0")


def test_what_overlaps_and_what_sticks_out_is_found(running: Running, browser: Browser) -> None:
    """The measure itself."""
    with opened(browser, running.service.url, 400) as (page, _):
        page.evaluate("document.querySelector('dl.tiles').style.marginTop = '-60px'")
        assert any(each.startswith("overlap: ") for each in page.evaluate(LAYOUT)[0])
        page.evaluate("document.querySelector('dl.tiles').style.marginTop = '500px'")
        assert page.evaluate(LAYOUT)[0] == []
        page.evaluate("document.querySelector('dl.tiles').style.width = '420px'")
        assert any(each.startswith("sticks out: ") for each in page.evaluate(LAYOUT)[0])


def test_the_page_loads_itself_again_where_it_was(running: Running, browser: Browser) -> None:
    """With its query, and scrolled to where its reader is."""
    url = f"{running.service.url}/?day=2026-11-19&refresh=2"
    with opened(browser, url, 400) as (page, problems):
        page.mouse.wheel(0, 700)
        wait(lambda: bool(page.evaluate("window.scrollY === 700")))
        for _ in range(2):
            with page.expect_event("load"):
                pass
            wait(lambda: bool(page.evaluate("window.scrollY === 700")))
            assert page.url == url
        assert problems == []


@pytest.fixture
def hostile_service(tmp_path: Path) -> Iterator[Replica]:
    async def fill() -> None:
        catalog = await open_catalog(str(tmp_path / "catalog.sqlite"))
        await hostile(catalog)
        for back in range(1, 40):
            many = replace(container(1, day=DAY - timedelta(days=back)), files=back * 10**9, size=back << 40)
            await put(catalog, "3", "a", many)
        await catalog.close()

    run(fill())
    options = ("--holder", MARKUP, "--shard-bits", "8")
    with replica(str(tmp_path / "catalog.sqlite"), tmp_path / "service", *options) as one:
        yield one


def test_hostile_names_in_a_browser(hostile_service: Replica, browser: Browser) -> None:
    """Nothing in them runs, and however long they are nothing overlaps; nor with many days and shards."""
    assert_well_set(browser, f"{hostile_service.url}/?day={DAY}")


def test_a_page_without_its_catalog_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    with replica(f"postgresql://nobody@{servers.HOST}:{port}/none", tmp_path / "service", ready=503) as one:
        for width in (400, 1600):
            with opened(browser, one.url, width) as (page, problems):
                assert "The catalog does not answer" in page.inner_text("main")
                assert page.evaluate(LAYOUT)[0] == page.evaluate(CONTRAST) == []
                assert len(problems) <= 1, problems
                assert all("503" in problem for problem in problems)
