"""The catalog: which container is committed, who holds a shard, which numbers are used up, who is at work.

A lease bounds how long others wait for a shard whose holder has died. It gives no safety: a holder that was paused
does not know that its time has passed. Safety is the fencing token, which grows with every acquisition and is compared
in the statement that commits. Expiry is by the database's clock alone; `expires_at` is for logs and for deciding when
to renew, never for deciding whether a lease still holds.

A container's row is written before its object (`uploading`), and made `committed` after it. What has an `uploading` row
under a token that is not the shard's any more can never be committed: its object, if there is one, is an orphan, and
whoever holds the shard may delete it. An object without any row is none of ours (an import, another writer, a catalog
that was lost): it is adopted, not deleted.

What is *not* guaranteed: that two holders never work on one shard at the same time (only one of them can commit), and
that every generation number or id that was handed out is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Any, Protocol

from assignment.sequence import IdBlock


class ContainerState(StrEnum):
    """Where a container is in its life.

        uploading ─► committed ─► superseded ─► deleted
                └──► sealed ───────┘
        uploading ─► deleted                     an orphan

    `committed` and `sealed` ones are the day's content. A `superseded` one is merged into another, and its object goes
    after a grace period. The row of a `deleted` one stays for a while: an object that comes late is an orphan by it.
    """

    UPLOADING = "uploading"
    COMMITTED = "committed"
    SEALED = "sealed"
    SUPERSEDED = "superseded"
    DELETED = "deleted"


LIVE = frozenset({ContainerState.COMMITTED, ContainerState.SEALED})
"""The states of containers that are the content of a day."""


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


@dataclass(frozen=True, slots=True)
class ShardHolder:
    """Who holds a shard's lease, or held it last; `holds` by the database's clock. For people, not for decisions."""

    day: date
    shard: str
    holder: str
    token: int
    expires_at: datetime
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRecord:
    """One container. `size` in bytes, `files` entries; both 0 and `etag` empty while it is `uploading`. `generation` is
    the last one of its name, 0 for `{shard}.des`. `mark` is the id (META) of its first entry, where its uploader knew
    it: it tells its object from one that somebody else has put under the key. The catalog sets `token` (the lease's)
    and `changed_at` (the database's clock, when its state changed last); what a caller has in them is ignored."""

    object_key: str
    day: date
    shard: str
    generation: int
    size: int = 0
    files: int = 0
    etag: str = ""
    state: ContainerState = ContainerState.COMMITTED
    mark: str = ""
    token: int = 0
    changed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class DaySummary:
    """What the catalog has of a day: `containers` by their state, those in no state left out, and `deleted` ones; of
    the `LIVE` ones the `files` (entries, older versions and tombstones too) and the `size` in bytes."""

    day: date
    containers: Mapping[ContainerState, int]
    files: int
    size: int


@dataclass(frozen=True, slots=True)
class Worker:
    """A packer at work. `name` is unique; `spool` names the spool that it packs, which several may share; `details` is
    what it says of itself (JSON values: host, waiting files and bytes, age of the oldest). `alive` by the database's
    clock: its last heartbeat was less than its time to live ago."""

    name: str
    spool: str
    details: Mapping[str, Any]
    started_at: datetime
    expires_at: datetime
    alive: bool


@dataclass(frozen=True, slots=True)
class NodeLease:
    """The right to hand out ids of a node, for as long as `token` is the node's latest and it has not expired."""

    node_id: int
    holder: str
    token: int
    expires_at: datetime


class Catalog(Protocol):
    """Leases, generations, containers, workers, nodes and ids. Asyncio; one catalog serves many tasks at once, of one
    event loop.

    Every method is one transaction, durable when it returns. Raises, from every method: CatalogUnavailable,
    CatalogCorrupt. A call that is cancelled, or raises CatalogUnavailable, may have taken effect all the same: a lease
    is then acquired again (which costs a token), a number is lost, a container is looked up with `find_container`.
    """

    # Leases

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

    async def list_holders(self, day: date | None = None, *, latest: int | None = None) -> list[ShardHolder]:
        """All shards of a day, or of all days, that were ever leased, ascending by day and shard; the `latest` so many
        alone, whose leases end or ended last."""
        ...

    # Containers

    async def begin_part(self, lease: Lease, *, at_least: int = 1, mark: str = "") -> ContainerRecord:
        """An `uploading` row, with this mark, for a part under a generation, `at_least` or greater, that nobody got
        before or will get again: its key is `{day}/{part_name(shard, generation)}`.

        Raises LeaseLost when the lease does not hold any more.
        """
        ...

    async def begin_container(
        self, lease: Lease, object_key: str, generation: int, *, mark: str = ""
    ) -> ContainerRecord:
        """An `uploading` row, with this mark, for a container of a given name. One that is `uploading` or `deleted`
        already is taken over: what an earlier holder has put there is the caller's to check, or to replace.

        Raises LeaseLost; ContainerExists when the key is committed, sealed or superseded; InvalidRequest for a key of
        another shard or day.
        """
        ...

    async def commit_container(
        self, lease: Lease, record: ContainerRecord, *, supersedes: Collection[str] = ()
    ) -> None:
        """Make a container that was begun `committed` or `sealed` (the record's state), with the record's size, files
        and ETag, and those that it `supersedes` `superseded`, all at once: this is the commit, and restarts go by it.

        Raises, and has written nothing: LeaseLost when the lease does not hold any more; ContainerExists when the key
        is committed already (a superseded one counts); InvalidRequest when it was not begun, record and lease differ
        in day or shard, or its state is another one; ContainersChanged when one of the superseded is not live in this
        shard.
        """
        ...

    async def delete_containers(self, lease: Lease, object_keys: Collection[str]) -> None:
        """Make rows of the lease's shard `deleted`, whatever they were; keys without a row are left alone.

        Raises LeaseLost.
        """
        ...

    async def adopt_containers(self, lease: Lease, records: Sequence[ContainerRecord]) -> None:
        """Write rows for containers that the store has and the catalog has not, in the state that each record says, or
        replace those that are `uploading` or `deleted`; others are left alone. Generations go on behind them.

        Raises LeaseLost; InvalidRequest for a record of another shard or day.
        """
        ...

    async def find_container(self, object_key: str) -> ContainerRecord | None:
        """The container of that key, in whatever state it is."""
        ...

    async def list_containers(
        self, day: date | None = None, *, shard: str | None = None, states: Collection[ContainerState] | None = None
    ) -> list[ContainerRecord]:
        """The containers of a day or of all days, of a shard or of all, in these states or in any, ascending by day,
        shard, generation and key."""
        ...

    async def list_days(self, *, latest: int | None = None) -> list[date]:
        """The days that have rows of containers that are not `deleted`, ascending; the `latest` so many alone."""
        ...

    async def summarize_days(self, latest: int) -> list[DaySummary]:
        """The `latest` so many (> 0) of the days that `list_days` has, ascending."""
        ...

    async def forget_deleted(self, older_than_s: float) -> int:
        """Remove the rows that have been `deleted` for so long; how many."""
        ...

    async def now(self) -> datetime:
        """The database's clock, which ages are counted by."""
        ...

    async def bind_store(self, store_id: str) -> str:
        """The id of the store that the catalog is for: this one, if nobody has said another before."""
        ...

    # Workers

    async def heartbeat(self, name: str, spool: str, details: Mapping[str, Any], ttl_s: float) -> None:
        """Say that a worker lives, for `ttl_s` from now. One that had expired starts anew."""
        ...

    async def list_workers(self, *, forget_after_s: float = 86400.0) -> list[Worker]:
        """All workers, the dead ones too, ascending by name; those dead for longer than that are forgotten."""
        ...

    async def remove_worker(self, name: str) -> None:
        """Forget a worker that ends; one that is not known is no error."""
        ...

    # Ids

    async def lease_node_id(self, holder: str, ttl_s: float) -> NodeLease | None:
        """The lease of a node id from 0 to 255 that nobody holds, the one that was free longest; None when all are
        held. Each call leases another one."""
        ...

    async def renew_node_id(self, lease: NodeLease, ttl_s: float) -> NodeLease | None:
        """The same lease, expiring `ttl_s` from now; None when it has passed, or another one holds."""
        ...

    async def release_node_id(self, lease: NodeLease) -> None:
        """Let others have the node id. A lease that does not hold any more is left alone."""
        ...

    async def reserve_ids(self, node: NodeLease | int, day: date, count: int, now_ms: int) -> IdBlock:
        """`count` ids of the node and day that were never handed out before, `now_ms` or later in time. A bare number
        is a node that nobody leases: that of an embedded catalog.

        `now_ms` is the caller's clock, and may go back. Raises InvalidRequest for a count below one; NodeIdLost when
        the node's lease does not hold any more.
        """
        ...

    async def close(self) -> None:
        """Give up connections. May be called again; other calls then raise CatalogUnavailable."""
        ...
