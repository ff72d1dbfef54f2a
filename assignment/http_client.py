"""The assignment service from the outside. Asyncio."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Iterator, Sequence
from datetime import date
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx
import msgspec
import stamina
import structlog

from assignment.catalog import Catalog
from assignment.client import MAX_BATCH, Assignment
from assignment.errors import AssignmentError, InvalidRequest, NotAuthorized, ServiceUnavailable

log = structlog.get_logger(__name__)

# Half of what the service takes; where its limit was set lower, requests are halved until they fit.
_MAX_BODY = 4 << 20
_TEMPORARY = frozenset({429, 502, 503, 504})
_WAIT_INITIAL_S = 0.05
_WAIT_MAX_S = 5.0
_WAIT_LAST_S = 1.0  # at least, in the last seconds before the deadline
_CONNECT_S = 5.0
# One try: the service gives up after 30 s by itself.
_TRY_S = 35.0


class _Row(msgspec.Struct):
    path: str
    day: date
    shard: str
    id: str


class _Answer(msgspec.Struct):
    assignments: list[_Row]


class _Again(ServiceUnavailable):
    """Worth another try, at the earliest after `wait_s`."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _TooLarge(AssignmentError):
    """The service takes smaller requests than this one."""


class HttpAssignment:
    """The assignment service at `url`, over connections that are used again; the catalog is closed with it.

    Temporary failures are tried again, with backoff and jitter, until `deadline_s` seconds after the call. An answer
    that was lost costs ids, which nobody else gets. `ca_bundle` is a file of certificates to trust instead of the
    system's. The token is in no message, log line or repr.
    """

    def __init__(
        self,
        url: str,
        catalog: Catalog,
        *,
        token: str | None = None,
        ca_bundle: str | None = None,
        deadline_s: float = 60.0,
    ) -> None:
        """Raises InvalidRequest for a URL, a token or a bundle that cannot be used."""
        self._url = _check_url(url)
        self._catalog = catalog
        self._deadline_s = deadline_s
        headers = {"Content-Type": "application/json"}
        if token is not None:
            if not token.isascii() or not token.isprintable() or not token or " " in token:
                raise InvalidRequest("the token has characters that no header can carry")
            headers["Authorization"] = f"Bearer {token}"
        try:
            verify = ssl.create_default_context(cafile=ca_bundle)
        except OSError as error:
            raise InvalidRequest(f"certificates {ca_bundle}: {error.strerror or error}") from error
        self._http = httpx.AsyncClient(
            headers=headers, verify=verify, timeout=httpx.Timeout(_TRY_S, connect=_CONNECT_S), follow_redirects=False
        )

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    async def assign(self, paths: Sequence[str]) -> list[Assignment]:
        assignments: list[Assignment] = []
        for batch in _batches(paths):
            assignments.extend(await self._assign_batch(batch))
        return assignments

    async def _assign_batch(self, paths: Sequence[str]) -> list[Assignment]:
        body = msgspec.json.encode({"paths": paths})
        deadline = time.monotonic() + self._deadline_s

        def again(error: Exception) -> bool | float:
            """Whether to try again; a number is the seconds to wait before."""
            if not isinstance(error, _Again):
                return False
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            log.info("the assignment service is asked again", error=str(error))
            if error.wait_s or left_s <= _WAIT_MAX_S:
                # Not all at once: those that were refused together wait for different times.
                return min(max(error.wait_s, _WAIT_LAST_S) * random.uniform(1.0, 1.5), left_s)
            return True

        try:
            async for attempt in stamina.retry_context(
                on=again, attempts=None, timeout=None, wait_initial=_WAIT_INITIAL_S, wait_max=_WAIT_MAX_S
            ):
                with attempt:
                    return await self._ask(paths, body, deadline)
        except _TooLarge as error:
            if len(paths) == 1:
                raise InvalidRequest(str(error)) from error
            half = len(paths) // 2
            return [*await self._assign_batch(paths[:half]), *await self._assign_batch(paths[half:])]
        except _Again as error:
            raise ServiceUnavailable(f"gave up after {self._deadline_s:g} s: {error}") from error
        raise AssertionError("a retry loop ends by returning or raising")

    async def _ask(self, paths: Sequence[str], body: bytes, deadline: float) -> list[Assignment]:
        """One try, which does not outlast the deadline by more than a second."""
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 1.0)):
                response = await self._http.post(f"{self._url}/v1/assign", content=body)
        except (httpx.RequestError, TimeoutError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):  # which no second try mends
                raise ServiceUnavailable(
                    f"{self._url}: its certificate is not trusted (--ca-bundle): {error}"
                ) from error
            raise _Again(f"{self._url}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise _refused(self._url, response)
        try:
            rows = msgspec.json.decode(response.content, type=_Answer).assignments
        except msgspec.DecodeError as error:
            raise _Again(f"{self._url}: no answer of an assignment service: {error}") from error
        if [row.path for row in rows] != list(paths):
            raise _Again(f"{self._url}: answered for {len(rows)} other paths than the {len(paths)} asked for")
        return [Assignment(row.path, row.day, row.shard, row.id) for row in rows]

    async def close(self) -> None:
        try:
            await self._http.aclose()
        finally:
            await self._catalog.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_usable = None, False
    if parts is None or not is_usable or parts.username is not None or parts.query or parts.fragment:
        raise InvalidRequest("no URL of an assignment service: want http[s]://host[:port], without user and password")
    return url.rstrip("/")


def _batches(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    """The paths in order, as many at a time as one request takes."""
    start = size = 0
    for at, path in enumerate(paths):
        try:
            cost = len(msgspec.json.encode(path)) + 1
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{path!r}: not UTF-8 at character {error.start}") from None
        if at > start and (at - start == MAX_BATCH or size + cost > _MAX_BODY):
            yield paths[start:at]
            start, size = at, 0
        size += cost
    if start < len(paths):
        yield paths[start:]


def _refused(url: str, response: httpx.Response) -> AssignmentError:
    """What an answer that is no assignment means."""
    status = response.status_code
    said = f"{url}: status {status}"
    if status in _TEMPORARY:
        wait = response.headers.get("Retry-After", "")
        return _Again(said, float(wait) if wait.isascii() and wait.isdigit() else 0.0)
    if status in (401, 403):
        return NotAuthorized(f"{said}: the service wants another token")
    if status == 413:
        return _TooLarge(said)
    if status >= 500:
        return ServiceUnavailable(said)
    return InvalidRequest(f"{said}: {response.text[:300]}")
