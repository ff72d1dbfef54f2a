"""From URLs to a client: the catalog, and the service or none."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from assignment.catalog import Catalog
from assignment.client import AssignmentClient, InProcessAssignment
from assignment.errors import InvalidRequest
from assignment.node_id import NodeIdKeeper
from assignment.opening import open_catalog

_NODE_TTL_S = 60.0
_FIRST_LEASE_S = 5.0  # afterwards assignments raise NodeIdLost until there is one


async def open_client(
    catalog_url: str,
    *,
    shard_bits: int,
    timezone: str = "UTC",
    holder: str,
    service_url: str | None = None,
    token: str | None = None,
    ca_bundle: str | None = None,
    deadline_s: float = 60.0,
) -> AssignmentClient:
    """The client of a shared catalog, and of the service at `service_url`; without one, assignments are made here,
    under a node id that is leased for `holder`. `shard_bits` and `timezone` are for that alone.

    Raises what `open_catalog` does, and InvalidRequest for settings that cannot be used.
    """
    async with AsyncExitStack() as stack:
        catalog = await open_catalog(catalog_url)
        stack.push_async_callback(catalog.close)
        client: AssignmentClient
        if service_url is not None:
            from assignment.http_client import HttpAssignment  # httpx is not needed by those who have no service

            client = HttpAssignment(service_url, catalog, token=token, ca_bundle=ca_bundle, deadline_s=deadline_s)
        else:
            keeper = NodeIdKeeper(catalog, holder, _NODE_TTL_S)
            client = _LeasedNode(catalog, keeper, shard_bits=shard_bits, timezone=timezone)
        stack.pop_all()
    return client


def read_token(file: str | None) -> str | None:
    """The token on the first line of a file; None without a file. Raises InvalidRequest; the message has no token."""
    if file is None:
        return None
    try:
        token = Path(file).read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError as error:
        raise InvalidRequest(f"token file {file}: {error.strerror}") from error
    except ValueError:
        raise InvalidRequest(f"token file {file}: is not UTF-8") from None
    if not token:
        raise InvalidRequest(f"token file {file}: has no token on its first line")
    return token


class _LeasedNode(InProcessAssignment):
    """Assignments made here, under a leased node id: kept from entering to the end."""

    def __init__(self, catalog: Catalog, keeper: NodeIdKeeper, *, shard_bits: int, timezone: str) -> None:
        super().__init__(catalog, shard_bits=shard_bits, timezone=timezone, node=keeper.lease)
        self._keeper = keeper

    async def __aenter__(self) -> Self:
        await self._keeper.__aenter__()
        await self._keeper.wait_leased(_FIRST_LEASE_S)
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._keeper.__aexit__(kind, error, trace)
        finally:
            await super().__aexit__(kind, error, trace)
