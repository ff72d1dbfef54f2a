"""docs/api.md, from what the assignment service says of itself: `python -m tests.api_page` writes it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from assignment.service_gate import METRICS, PROBES
from tests.service.serving import served

PAGE = Path(__file__).parents[1] / "docs/api.md"
COMMAND = "python -m tests.api_page"

# What the OpenAPI description does not say of an answer: its fields, `[].` before those of a row.
FIELDS = {
    "/v1/shards": {
        "day": "the day that was asked for, or today, in the service's time zone",
        "shards[].shard": "its name, as in `DAY/SHARD.des`, in ascending order",
        "shards[].owner": "the packer that compacts it; null when no packer lives",
        "shards[].holder": "who has leased it last; null when nobody has",
        "shards[].holds": "whether that lease holds, by the database's clock",
        "shards[].token": "its fencing token; missing when nobody has leased the shard",
        "shards[].expires_at": "when it passes, or has passed; missing as above",
        "shards[].expires_in_s": "seconds until then, negative when it has passed; missing as above",
    },
    "/v1/workers": {
        "workers[].name": "the packer, as `owner` has it",
        "workers[].spool": "the id of its spool: packers that share one have the same",
        "workers[].details": "an object, what it says of itself: `host`, `spool`, `waiting_files`, `oldest_waiting_s`, "
        "`packed_files` among others",
        "workers[].started_at": "when it said for the first time that it lives",
        "workers[].expires_at": "until when it is taken to live",
        "workers[].alive": "whether that time has not passed, by the database's clock",
    },
    "/healthz": {"status": "`alive`"},
    "/readyz": {"status": "`ready`"},
}
EXAMPLES: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/assign": ({"paths": ["photos/1.jpg", "report.pdf"]}, {"count": 2, "prefix": "SCAN"}),
}

_HEAD = f"""# The HTTP API of the assignment service

<!-- Made by `{COMMAND}` from what the service says of itself: change that, not this. -->

What `desfs assignment` serves ([operations](operations.md), "The assignment service"). Bodies are JSON in UTF-8.
`GET /openapi.json` describes the same for programs.

## Every request

A request has the header `Authorization: Bearer TOKEN`, with one of the service's tokens, if it has any. The table
says which requests need none.

| | | token |
|---|---|---|
"""

_REFUSALS = """
Refusals are `{"detail": …}`, with a text or a list of what is wrong:

| status | when |
|---|---|
| 401 | the token is missing or not valid |
| 404, 405 | there is no such path, or not with that method |
| 408 | the body did not come within `--request-timeout` |
| 413 | the body has more than `--max-body` bytes |
| 422 | the request is not as described below |
| 500 | the request failed; the service's log says why |
| 503 | the database does not answer, no node id is held, or `--max-requests` are open: try again after `Retry-After` |
"""


def page(description: Mapping[str, Any], examples: Mapping[str, list[tuple[str, str]]]) -> str:
    """The page for an OpenAPI description; `examples` are bodies and their answers, by path."""
    operations = [
        (method.upper(), path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    rows = [f"| `{method} {path}` | {each['summary']} | {_token(path)} |" for method, path, each in operations]
    lines = [_HEAD + "\n".join(rows), _REFUSALS]
    schemas = description["components"]["schemas"]
    for method, path, operation in operations:
        lines += [f"## {method} {path}\n", f"{operation['summary']}. Token: {_token(path)}.\n"]
        lines += _parameters(operation)
        lines += _body(operation)
        lines += _answer(path, operation, schemas)
        for sent, answered in examples.get(path, []):
            lines += [f"```json\n{sent}\n```\n\nis answered with\n", f"```json\n{answered}\n```\n"]
    return "\n".join(lines).rstrip() + "\n"


def _token(path: str) -> str:
    if path in PROBES:
        return "no"
    return "yes, unless `--open-metrics`" if path == METRICS else "yes"


def _parameters(operation: Mapping[str, Any]) -> Iterator[str]:
    found = operation.get("parameters", ())
    if found:
        rows = [f"| `{each['name']}` | {_type(each['schema'])} | {_needed(each)} |" for each in found]
        yield "\n".join(["| parameter | | |", "|---|---|---|", *rows, ""])


def _needed(parameter: Mapping[str, Any]) -> str:
    return "needed" if parameter["required"] else "may be left out"


def _body(operation: Mapping[str, Any]) -> Iterator[str]:
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        rows = [
            f"| `{name}` | {_type(each)} | {each.get('description', '')} |"
            for name, each in schema["properties"].items()
        ]
        yield f"The body: {_one_line(schema['description'])}\n"
        yield "\n".join(["| field | | |", "|---|---|---|", *rows, ""])


def _answer(path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    # Of what is no JSON the description has no schema.
    schema = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema", {})
    if path in FIELDS:
        rows = [f"| `{name}` | {meaning} |" for name, meaning in FIELDS[path].items()]
        yield "\n".join(["| answer | |", "|---|---|", *rows, ""])
    elif "$ref" in schema:
        found = schemas[schema["$ref"].rpartition("/")[2]]
        yield f"The answer: {_one_line(found['description'])}\n"
        ((name, array),) = found["properties"].items()
        row = schemas[array["items"]["$ref"].rpartition("/")[2]]
        rows = [f"| `{name}[].{field}` | {_type(each)} |" for field, each in row["properties"].items()]
        yield f"{_one_line(row['description'])}\n"
        yield "\n".join(["| answer | |", "|---|---|", *rows, ""])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in words."""
    options = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    (found,) = options
    match found["type"]:
        case "array":
            inner = _type(found["items"])
            return f"array of {found['minItems']:,} to {found['maxItems']:,}, each a {inner}"
        case "integer":
            return f"integer, {found['minimum']:,.0f} to {found['maximum']:,.0f}"
        case "string" if found.get("format") == "date":
            return "date, `YYYY-MM-DD`"
        case "string" if "pattern" in found:
            pattern = found["pattern"].removesuffix(r"\z").removeprefix("^")
            return f"string of `{pattern}`, {found['maxLength']:,} characters at most"
        case "string" if "minLength" in found:
            return f"string of {found['minLength']:,} to {found['maxLength']:,} characters"
        case other:
            return str(other)


async def ask(client: httpx.AsyncClient) -> tuple[dict[str, Any], dict[str, list[tuple[str, str]]]]:
    """A service's own description, and its answers to the examples."""
    examples: dict[str, list[tuple[str, str]]] = {}
    for path, bodies in EXAMPLES.items():
        for body in bodies:
            answer = (await client.post(path, json=body)).raise_for_status().json()
            examples.setdefault(path, []).append((json.dumps(body), json.dumps(answer, indent=2)))
    return (await client.get("/openapi.json")).raise_for_status().json(), examples


def current() -> str:
    """The page of the service as it is, with a clock that stands still."""

    async def scenario() -> str:
        with tempfile.TemporaryDirectory() as folder:
            async with served(Path(folder)) as service:
                return page(*await ask(service.client))

    return asyncio.run(scenario())


def main() -> None:
    """Write the page."""
    PAGE.write_text(current(), encoding="utf-8")


if __name__ == "__main__":
    main()
