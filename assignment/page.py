"""The operations page: HTML that works without scripts, for people who look whether all is well. Asyncio.

A browser asks for it again every few seconds, and there may be many. What the catalog is asked for, it is asked for
once a second at most, one question after the other: however many look at a day, they take one connection from those who
assign.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import jinja2
import structlog

from assignment.assigner import Assigner
from assignment.catalog import ContainerState, DaySummary, ShardHolder, Worker
from assignment.charts import COUNTS, PLOT_HEIGHT, SIZES, Chart, build_chart, format_count, format_duration, format_size
from assignment.errors import AssignmentError, CatalogUnavailable
from assignment.overview import MAX_SHARDS, Overview, Owners, build_overview, printable

log = structlog.get_logger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

DAYS = 30
"""The latest days that the page shows."""

DEFAULT_REFRESH_S = 10
MAX_REFRESH_S = 3600

_FRESH_S = 1.0
# Shorter than a statement may take: who looks is told that the catalog does not answer, instead of being kept waiting.
_ANSWER_S = 5.0

_TEMPLATES = Path(__file__).with_name("templates")
_STYLE = (_TEMPLATES / "operations.css").read_text(encoding="utf-8")
_STYLE_HASH = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS = {
    # Nothing is loaded and nothing runs, whatever a name on the page may hold; the icon is an empty one, so that
    # browsers do not ask for another. The hash is of the one style sheet.
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""What goes with every answer."""


@dataclass(frozen=True, slots=True)
class _Common:
    """What is the same for every day."""

    now: datetime
    days: Sequence[DaySummary]
    workers: Sequence[Worker]
    owners: Owners


class OperationsPage:
    """The page of one service. One event loop, any number of its tasks."""

    def __init__(
        self, assigner: Assigner, holder: str, *, limit_s: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """`holder` names the service for people; a request may take `limit_s`."""
        self._assigner = assigner
        self._limit_s = min(limit_s, _ANSWER_S)
        self._holder = printable(holder)
        self._common = _Shared(self._read_common, monotonic)
        self._holders = _Shared(self._read_holders, monotonic)
        self._one_at_a_time = asyncio.Semaphore(1)
        self._template = _environment().get_template("operations.html")

    async def render(self, day: date | None, refresh_s: int) -> tuple[int, str]:
        """The status and the page, with the shards of a day, or of today; it has itself loaded again after `refresh_s`
        seconds, 0 for never. A catalog that does not answer is said on the page, and raises nothing."""
        today = self._assigner.today()
        try:
            common = await self._common.get(None)
            holders = await self._holders.get(day or today)
        except AssignmentError as error:
            # What it says is for the log: it may name hosts and files.
            if not error.temporary:
                log.error("the operations page failed", error=f"{type(error).__name__}: {error}")
            page = self._html(day, refresh_s, problem=type(error).__name__, temporary=error.temporary)
            return 503 if error.temporary else 500, page

        def build() -> str:
            overview = build_overview(
                now=common.now,
                today=today,
                day=day or today,
                days=common.days,
                workers=common.workers,
                owners=common.owners,
                holders=holders,
                shard_bits=self._assigner.shard_bits,
            )
            return self._html(day, refresh_s, overview=overview, charts=_charts(overview))

        return 200, await asyncio.to_thread(build)

    def _html(self, day: date | None, refresh_s: int, **values: Any) -> str:
        defaults: dict[str, Any] = {"overview": None, "charts": [], "problem": None, "temporary": False}
        return self._template.render(
            defaults | values,
            style=_STYLE,
            service=self._holder,
            refresh_s=refresh_s,
            refreshed_at=datetime.now(UTC),
            query=_query(day, refresh_s),
            paused_query=_query(day, 0),
            running_query=_query(day, DEFAULT_REFRESH_S),
            states=[each for each in ContainerState if each is not ContainerState.DELETED],
            plot_height=PLOT_HEIGHT,
        )

    async def _read_common(self, _: None) -> _Common:
        async with _in_time(self._limit_s):
            catalog = self._assigner.catalog
            days, workers = await catalog.summarize_days(DAYS), await catalog.list_workers()
            now = await catalog.now()
            owners = await asyncio.to_thread(Owners.among, workers, self._assigner.shard_bits)
        return _Common(now, days, workers, owners)

    async def _read_holders(self, day: date) -> list[ShardHolder]:
        async with _in_time(self._limit_s), self._one_at_a_time:
            return await self._assigner.catalog.list_holders(day, latest=MAX_SHARDS)


class _Shared(Generic[K, V]):
    """Answers to questions that many have at once: each is asked once, and an answer is good for a second, errors too.

    Invariant: a question is in `_asked` while its answer is under way, so that nobody asks it again; there is no await
    between finding it missing and putting it there. A cancelled caller leaves the question to the others.
    """

    def __init__(self, ask: Callable[[K], Awaitable[V]], monotonic: Callable[[], float]) -> None:
        self._ask = ask
        self._monotonic = monotonic
        self._asked: dict[K, tuple[float, asyncio.Task[V]]] = {}

    async def get(self, key: K) -> V:
        """The answer. Raises what asking raises."""
        now = self._monotonic()
        self._asked = {
            each: (at, task) for each, (at, task) in self._asked.items() if not task.done() or now - at < _FRESH_S
        }
        if key not in self._asked:
            task = asyncio.ensure_future(self._answer(key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio reports it as lost
            self._asked[key] = now, task
        return await asyncio.shield(self._asked[key][1])

    async def _answer(self, key: K) -> V:
        return await self._ask(key)


@asynccontextmanager
async def _in_time(limit_s: float) -> AsyncIterator[None]:
    """Raises CatalogUnavailable when the block takes too long; a call of the catalog goes on, as it always does."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as error:
        raise CatalogUnavailable(f"no answer within {limit_s:g} s") from error


def _query(day: date | None, refresh_s: int) -> str:
    """What the page is asked for again with: never empty, and never with a fragment, which would not load it again."""
    return f"?{'' if day is None else f'day={day}&'}refresh={refresh_s}"


def _charts(overview: Overview) -> list[Chart]:
    return [
        build_chart("Packed files", overview.days, lambda each: each.files, COUNTS),
        build_chart("Packed bytes", overview.days, lambda each: each.size, SIZES),
    ]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": format_size,
        "count": format_count,
        "duration": format_duration,
        "said": lambda value, how: "?" if value is None else environment.filters[how](value),
        "iso": lambda at: at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    return environment
