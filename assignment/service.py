"""The assignment service over HTTP: names, days and shards for files, and who tends which shard.

    GET  /              the operations page, for people
    POST /v1/assign     a file's or a batch's day, shard and id; or ids alone
    GET  /v1/shards     the shards of a day: who holds the lease, who tends it
    GET  /v1/workers    the packers, the dead ones too
    GET  /healthz       the process lives; asks nobody
    GET  /readyz        it can assign: the catalog answers, and a node id is held
    GET  /metrics       Prometheus
    GET  /openapi.json  all of this

Any number of replicas share a catalog: each leases a node id, and ids of different nodes differ. All but the two probes
need a bearer token, where one is configured; the page takes it as a password too (`assignment.service_gate`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import date
from typing import Annotated, Any

import msgspec
import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from assignment.assigner import Assigner
from assignment.catalog import Catalog
from assignment.client import MAX_BATCH, Assignment
from assignment.errors import AssignmentError, InvalidRequest
from assignment.metrics import REGISTRY
from assignment.page import DEFAULT_REFRESH_S, HEADERS, MAX_REFRESH_S, OperationsPage
from assignment.ring import shard_owners
from assignment.service_auth import Tokens
from assignment.service_gate import Gate
from assignment.service_settings import ServiceSettings
from des_format.names import MAX_PATH
from des_format.shards import shard_hex

log = structlog.get_logger(__name__)

# Building that many assignments takes a millisecond or so; more are built in a thread, while the loop answers others.
_MANY = 100
# A list of all shards makes sense up to here; beyond, /v1/shards has those that were ever leased.
_MAX_LISTED_BITS = 12

EntryPath = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATH)]


class AssignRequest(BaseModel):
    """One of `path`, `paths` and `count`; a `prefix` goes with `count`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: EntryPath | None = Field(default=None, description="The file whose placement is wanted")
    paths: Annotated[list[EntryPath], Field(min_length=1, max_length=MAX_BATCH)] | None = Field(
        default=None, description="Several of them, which need not differ"
    )
    count: Annotated[int, Field(ge=1, le=MAX_BATCH)] | None = Field(
        default=None, description="So many ids, no placement"
    )
    prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]+\z", max_length=32)] | None = Field(
        default=None, description="What these ids begin with instead of the service's own prefix"
    )

    @model_validator(mode="after")
    def _check_one(self) -> AssignRequest:
        if sum(each is not None for each in (self.path, self.paths, self.count)) != 1:
            raise ValueError("want one of path, paths and count")
        if self.prefix is not None and self.count is None:
            raise ValueError("a prefix goes with count alone")
        return self


class AssignmentAnswer(BaseModel):
    """Where a file goes; `path` and `shard` are missing for ids alone."""

    path: str | None = None
    day: date
    shard: str | None = None
    id: str


class AssignAnswer(BaseModel):
    """One assignment per path, in order, or `count` of them."""

    assignments: list[AssignmentAnswer]


def create_app(
    settings: ServiceSettings,
    open_catalog: Callable[[], Awaitable[Catalog]],
    *,
    clock_ns: Callable[[], int] = time.time_ns,
    monotonic: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The service as an application, which opens the catalog when it starts and closes it when it ends.

    `clock_ns` gives Unix time, and decides the day; by `monotonic` the node id's time passes, and that of what the page
    keeps. Raises InvalidRequest for tokens that cannot be read. A catalog that is out of reach is tried again; starting
    raises what else opening raises.
    """
    assigner = Assigner(settings, open_catalog, clock_ns=clock_ns, monotonic=monotonic)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with assigner:
            yield

    return build_app(settings, assigner, lifespan, monotonic=monotonic)


def build_app(
    settings: ServiceSettings,
    assigner: Assigner,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The same over an assigner that the caller enters and leaves. Raises InvalidRequest as `create_app` does."""
    app = FastAPI(title="desfs assignment", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, settings=settings, tokens=Tokens(settings.tokens, settings.token_file))
    _add_errors(app, settings)
    _add_endpoints(app, assigner)
    _add_probes(app, assigner)
    page = OperationsPage(assigner, settings.holder, limit_s=settings.request_timeout_s, monotonic=monotonic)
    _add_page(app, page, settings)
    return app


def _add_endpoints(app: FastAPI, assigner: Assigner) -> None:
    # The body is parsed here, not by FastAPI: one pass over the bytes, and one kind of error for all that is malformed.
    schema = {"required": True, "content": {"application/json": {"schema": AssignRequest.model_json_schema()}}}

    @app.post(
        "/v1/assign", responses={200: {"model": AssignAnswer}}, openapi_extra={"requestBody": schema}, summary="Assign"
    )
    async def assign(request: Request) -> Response:
        wanted = AssignRequest.model_validate_json(await request.body())
        if wanted.count is not None:
            day, ids = await assigner.ids(wanted.count, wanted.prefix)
            return await _json(wanted.count, lambda: {"assignments": [{"day": day, "id": each} for each in ids]})
        paths = wanted.paths or [wanted.path or ""]
        assignments = await assigner.assign(paths)
        return await _json(len(paths), lambda: {"assignments": list(map(_shown, assignments()))})

    @app.get("/v1/shards", summary="The shards of a day, today's if none is said")
    async def shards(day: Annotated[date | None, Query()] = None) -> Response:
        wanted = day or assigner.today()
        catalog = assigner.catalog
        holders = {each.shard: each for each in await catalog.list_holders(wanted)}
        workers, now = await catalog.list_workers(), await catalog.now()
        bits = assigner.shard_bits
        names = [shard_hex(shard, bits) for shard in range(1 << bits)] if bits <= _MAX_LISTED_BITS else sorted(holders)
        owners = shard_owners(names, workers)
        rows = []
        for name in sorted({*names, *holders}):
            holder = holders.get(name)
            row: dict[str, Any] = {"shard": name, "owner": owners.get(name), "holder": None, "holds": False}
            if holder is not None:
                row |= {"holder": holder.holder, "holds": holder.holds, "token": holder.token}
                # Negative: so long ago it passed.
                row |= {"expires_at": holder.expires_at, "expires_in_s": (holder.expires_at - now).total_seconds()}
            rows.append(row)
        return await _json(len(rows), lambda: {"day": wanted, "shards": rows})

    @app.get("/v1/workers", summary="The packers, and what they say of themselves")
    async def workers() -> Response:
        found = await assigner.catalog.list_workers()
        return await _json(len(found), lambda: {"workers": found})


def _add_probes(app: FastAPI, assigner: Assigner) -> None:
    @app.get("/healthz", summary="The process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="The service can assign")
    async def readyz() -> dict[str, str]:
        await assigner.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, page: OperationsPage, settings: ServiceSettings) -> None:
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def operations(
        day: Annotated[date | None, Query()] = None,
        refresh: Annotated[int, Query(ge=0, le=MAX_REFRESH_S)] = DEFAULT_REFRESH_S,
    ) -> Response:
        status, content = await page.render(day, refresh)
        waiting = {"Retry-After": str(settings.retry_after_s)} if status == 503 else {}
        return Response(content, status, HEADERS | waiting, "text/html; charset=utf-8")


def _add_errors(app: FastAPI, settings: ServiceSettings) -> None:
    @app.exception_handler(AssignmentError)
    async def failed(_: Request, error: Exception) -> Response:
        assert isinstance(error, AssignmentError)
        # What the error says is for the log: it may name hosts and files.
        if error.temporary:
            return _refusal(503, f"{type(error).__name__}: try again", {"Retry-After": str(settings.retry_after_s)})
        if isinstance(error, InvalidRequest):
            return _refusal(422, str(error))
        log.error("a request failed", error=f"{type(error).__name__}: {error}")
        return _refusal(500, type(error).__name__)

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, (ValidationError, RequestValidationError))
        # Not what was sent, which may be megabytes.
        problems = [{"loc": each["loc"], "msg": each["msg"], "type": each["type"]} for each in error.errors()[:10]]
        return _refusal(422, problems)


def _refusal(status: int, detail: object, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode({"detail": detail}), status, headers, "application/json")


def _shown(assignment: Assignment) -> dict[str, Any]:
    return {"path": assignment.path, "day": assignment.day, "shard": assignment.shard, "id": assignment.id}


async def _json(count: int, build: Callable[[], object]) -> Response:
    """A JSON answer of so many parts."""

    def encode() -> bytes:
        return msgspec.json.encode(build())

    content = await asyncio.to_thread(encode) if count > _MANY else encode()
    return Response(content, media_type="application/json")
