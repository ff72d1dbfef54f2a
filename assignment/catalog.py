"""The catalog: which container is committed, who holds a shard, which numbers are used up.

A lease bounds how long others wait for a shard whose holder has died. It gives no safety: a holder that was paused
does not know that its time has passed. Safety is the fencing token, which grows with every acquisition and is compared
in the statement that commits. Expiry is by the database's clock alone; `expires_at` is for logs and for deciding when
to renew, never for deciding whether a lease still holds.

What is *not* guaranteed: that two holders never work on one shard at the same time (only one of them can commit), and
that every generation number or id that was handed out is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Protocol

from assignment.sequence import IdBlock


class ContainerState(StrEnum):
    """Where a container is in its life. Only `committed` and `sealed` ones are shown to readers."""

    UPLOADING = "uploading"
    COMMITTED = "committed"
    SEALED = "sealed"
    SUPERSEDED = "superseded"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to commit containers of one shard of one day, for as long as `token` is the shard's latest.

    `previous_token` and `previous_holder` are those of the acquisition before this one (None for the shard's first), so
    that a holder which was restarted, and finds the token that it has written down, knows that nobody else held the
    shard in between.
    """

    day: date
    shard: str
    holder: str
    token: int
    expires_at: datetime
    previous_token: int | None
    previous_holder: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRecord:
    """One container. `size` in bytes, `files` entries. The catalog sets `token` (the lease's) and `created_at` (the
    database's clock) when it commits the record; what a caller has in them is ignored."""

    object_key: str
    day: date
    shard: str
    generation: int
    size: int
    files: int
    etag: str
    state: ContainerState = ContainerState.COMMITTED
    token: int = 0
    created_at: datetime | None = None


class Catalog(Protocol):
    """Leases, generations, containers and ids. Asyncio; one catalog serves many tasks at once, of one event loop.

    Every method is one transaction, durable when it returns. Raises, from every method: CatalogUnavailable,
    CatalogCorrupt. A call that is cancelled, or raises CatalogUnavailable, may have taken effect all the same: a lease
    is then acquired again (which costs a token), a number is lost, a container is looked up with `find_container`.
    """

    async def acquire(
        self, day: date, shard: str, holder: str, ttl_s: float, *, first_generation: int = 1
    ) -> Lease | None:
        """The shard's lease under a new token, or None while another holder's has not expired.

        A holder that has the lease already gets it under a new token too: what it did before its restart is fenced
        off. Generations of a shard start at `first_generation` or after the last one allocated, whichever is greater.
        """
        ...

    async def renew(self, lease: Lease, ttl_s: float) -> Lease | None:
        """The same lease, expiring `ttl_s` from now; None when it has passed, was released, or another one holds."""
        ...

    async def release(self, lease: Lease) -> None:
        """Let others acquire the shard at once. A lease that does not hold any more is left alone."""
        ...

    async def next_generation(self, lease: Lease, *, at_least: int = 1) -> int:
        """A generation number of the shard, `at_least` or greater, that nobody got before or will get again.

        Raises LeaseLost when the lease does not hold any more.
        """
        ...

    async def commit_container(self, lease: Lease, record: ContainerRecord) -> None:
        """Write the container's row: this is the commit, and readers and restarts go by it.

        Raises LeaseLost when the lease does not hold any more (nothing was written), ContainerExists when the key is
        committed already, InvalidRequest when record and lease differ in day or shard.
        """
        ...

    async def find_container(self, object_key: str) -> ContainerRecord | None:
        """The container of that key, in whatever state it is."""
        ...

    async def list_containers(self, day: date | None = None) -> list[ContainerRecord]:
        """All containers of a day, or of all days, in whatever state, ascending by day, shard, generation and key."""
        ...

    async def reserve_ids(self, node_id: int, day: date, count: int, now_ms: int) -> IdBlock:
        """`count` ids of the node and day that were never handed out before, `now_ms` or later in time.

        `now_ms` is the caller's clock, and may go back. Raises InvalidRequest for a count below one.
        """
        ...

    async def close(self) -> None:
        """Give up connections. May be called again; other calls then raise CatalogUnavailable."""
        ...
