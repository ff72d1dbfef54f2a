"""docs/api.md is what `python -m tests.api_page` writes, and says what the service answers."""

from __future__ import annotations

import asyncio
from datetime import date
from pathlib import Path
from typing import Any

from tests import api_page
from tests.service.serving import served

DAY = date(2026, 11, 20)


def fields(answer: dict[str, Any]) -> set[str]:
    """The names of an answer's fields, and of those of the rows of its lists."""
    found = set()
    for name, value in answer.items():
        found |= {f"{name}[].{field}" for row in value for field in row} if isinstance(value, list) else {name}
    return found


def test_the_page_is_that_of_the_service_as_it_is() -> None:
    written = api_page.PAGE.read_text(encoding="utf-8")
    assert written == api_page.current(), f"docs/api.md is out of date: run `{api_page.COMMAND}`"


def test_answers_have_the_fields_that_the_page_says(tmp_path: Path) -> None:
    """Those that the description of the service leaves open."""

    async def scenario() -> dict[str, set[str]]:
        async with served(tmp_path) as service:
            assert await service.watched.acquire(DAY, "3", "a-packer", 3600.0) is not None
            await service.watched.heartbeat("spool-1", "spool", {"host": "here"}, 3600.0)
            answers = {path: await service.client.get(path) for path in api_page.FIELDS}
            return {path: fields(answer.raise_for_status().json()) for path, answer in answers.items()}

    assert asyncio.run(scenario()) == {path: set(names) for path, names in api_page.FIELDS.items()}


def test_every_answer_of_json_is_described() -> None:
    """A path that is added gets its fields, from the description or from here."""
    page = api_page.PAGE.read_text(encoding="utf-8")
    sections = {each.partition("\n")[0]: each for each in page.split("\n## ")[2:]}
    assert [head for head, text in sections.items() if "| answer |" not in text] == ["GET /metrics"]


def test_refusals_are_as_the_page_says(tmp_path: Path) -> None:
    async def scenario() -> list[tuple[int, set[str]]]:
        async with served(tmp_path) as service:
            answers = [
                await service.client.get("/v1/shards", headers={"Authorization": "Bearer wrong"}),
                await service.client.get("/v1/nothing"),
                await service.client.get("/v1/assign"),
                await service.client.post("/v1/assign", json={"paths": []}),
            ]
            return [(answer.status_code, set(answer.json())) for answer in answers]

    statuses = asyncio.run(scenario())
    assert statuses == [(status, {"detail"}) for status in (401, 404, 405, 422)]
    page = api_page.PAGE.read_text(encoding="utf-8")
    assert all(f"| {row} |" in page for row in ("401", "404, 405", "422"))
