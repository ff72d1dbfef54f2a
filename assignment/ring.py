"""Which worker tends which shard: consistent hashing with virtual nodes, and bounded loads. Pure.

`Ring.owner` is plain consistent hashing: when a worker leaves, its keys move to others and no other key moves. It says
nothing of how many keys a worker has. Of 16 keys and 8 workers one may well have 5, and no virtual nodes help: no
function of the workers' names alone can promise a bound. (By Ramsey's theorem there are, among enough names, 8 on which
such a function goes by the order of the names only: a key of the r-th of 8 goes to the s-th of 7. When the first name
leaves, a key stays only if s = r - 1; when the last leaves, only if s = r. So one of the two moves half of the keys.)

`Ring.owners` therefore knows who has what. A worker keeps its keys up to its even share, and the others go along the
ring to the first worker with room: each has `floor(keys / workers)` of them or one more, always. When a worker leaves,
its keys move, to live workers, and no others do: at most 1/8 of 16, 256 or 4,096 keys with 8 workers. When one joins,
its share moves to it, and nothing else. The memory is the workers' own: each heartbeat says which shards its worker
has, and a worker that is gone claims nothing.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterable, Iterator, Mapping
from hashlib import blake2b

from assignment.catalog import Worker

VIRTUAL_NODES = 128
"""Points that a worker has on the ring: the loads of 8 workers then differ by a tenth or so, where keys are many."""

CLAIMED_SHARDS = "shards"
"""Where a worker's `details` list the shards that it has (hex text, as in container keys)."""


class Ring:
    """Keys on live workers. The same in every process: positions come from BLAKE2, not from Python's seeded hash."""

    def __init__(self, workers: Iterable[str], virtual_nodes: int = VIRTUAL_NODES) -> None:
        self.workers = frozenset(workers)
        points = sorted((_point(f"{name}\0{n}"), name) for name in self.workers for n in range(virtual_nodes))
        self._positions = [position for position, _ in points]
        self._names = [name for _, name in points]

    def owner(self, key: str) -> str | None:
        """The worker of a key by the ring alone, whatever the loads; None without workers."""
        return next(self._walk(key), None)

    def owners(self, keys: Iterable[str], claims: Mapping[str, Collection[str]]) -> dict[str, str]:
        """The worker of every key, each with its even share. `claims` has the keys that each worker has now, as far as
        it is known; of two that claim one key the first on the ring has it. Empty without workers."""
        everything = sorted(set(keys))
        if not self.workers:
            return {}
        share, extras = divmod(len(everything), len(self.workers))
        claimed = {name: frozenset(claims.get(name, ())) for name in self.workers}
        loads = dict.fromkeys(self.workers, 0)
        owners: dict[str, str] = {}

        def take(key: str, name: str) -> bool:
            nonlocal extras
            if loads[name] > share or (loads[name] == share and not extras):
                return False
            extras -= loads[name] == share
            loads[name] += 1
            owners[key] = name
            return True

        # Those that have an owner go first: what is left over must not take a place that somebody's own key needs.
        for key in everything:
            if any(key in own for own in claimed.values()):
                take(key, next(name for name in self._walk(key) if key in claimed[name]))
        for key in everything:
            if key not in owners:
                any(take(key, name) for name in self._walk(key))  # one has room: the shares add up to all the keys
        return owners

    def _walk(self, key: str) -> Iterator[str]:
        """All workers, each once, as they come on the ring from the key on."""
        start = bisect(self._positions, _point(key))
        seen: set[str] = set()
        for at in range(start, start + len(self._names)):
            name = self._names[at % len(self._names)]
            if name not in seen:
                seen.add(name)
                yield name
            if len(seen) == len(self.workers):
                return


def shard_owners(shards: Iterable[str], workers: Iterable[Worker]) -> dict[str, str]:
    """The worker that tends each shard, among those that are alive, by what their heartbeats claim; empty without."""
    alive = [worker for worker in workers if worker.alive]
    return Ring(worker.name for worker in alive).owners(shards, {each.name: _claims(each) for each in alive})


def _claims(worker: Worker) -> frozenset[str]:
    found = worker.details.get(CLAIMED_SHARDS)  # what it says of itself: any JSON value
    return frozenset(each for each in found if isinstance(each, str)) if isinstance(found, list) else frozenset()


def _point(text: str) -> int:
    # surrogatepass: a host's name may hold what is no Unicode.
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
