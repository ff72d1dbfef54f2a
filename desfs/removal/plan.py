"""Which tombstones hide which names. Pure.

A name can stand in several shards of a day: another writer has put it elsewhere, or the layout was another one. Each of
them gets a tombstone of its own, in a newer part, so that a merge of one shard, which drops tombstones together with
what they hide, never brings back what another shard has.

`{day}.des` and `shard_NN.des` have no parts. What is in them is hidden by a tombstone in the name's own shard, which is
modified later; a day that has such containers is sealed with its tombstones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from des_format.index import TOMBSTONE
from des_format.shards import placement_shard, shard_hex
from desfs.adoption import managed
from desfs.tree import DayTree, Member

Age = tuple[int, str]  # mtime in ns, key: between shards the greater one is the newer one

_ROWS_AT_A_TIME = 4096  # that a loop over names has in memory


@dataclass(slots=True)
class DayPlan:
    """What to do to a day. `shards`: the names to be hidden in each, ascending; `gone`: paths that tombstones hide
    already; `missing`: those that are not there; `directories`: those that cannot go without what is in them;
    `newer_than`: what the tombstone of a name has to be newer than, beyond its shard."""

    shards: dict[str, list[str]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    newer_than: dict[str, Age] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names to be hidden, ascending."""
        return sorted(set().union(*self.shards.values()))


@dataclass(slots=True)
class _Version:
    """The newest row of a name in one shard, and whether it is a tombstone that stays."""

    member: Member
    hides: bool


def plan_removal(
    members: Sequence[Member],
    shard_bits: int,
    paths: Collection[str],
    *,
    recursive: bool,
    passing: Collection[str] = (),
) -> DayPlan:
    """The tombstones that remove paths below a day; "" is the day itself. Containers in `passing` are about to be
    deleted: a tombstone in one of these hides nothing for long."""
    plan = DayPlan()
    tree = DayTree(members)
    wanted: dict[bytes, set[bytes]] = {}  # a path, and the names that go with it
    for path in paths:
        raw = path.encode("utf-8", "surrogateescape")
        if not recursive and members and tree.is_directory(raw):
            plan.directories.append(path)
        else:
            wanted[raw] = set()
    versions: dict[bytes, dict[str, _Version]] = {}
    for member in members:
        for name, row in _rows_of(member, wanted, recursive=recursive):
            is_tombstone = bool(member.index.state[row] & TOMBSTONE)
            _note(versions.setdefault(name, {}), member, is_tombstone and member.key not in passing)
            for above in _wanted_above(name, wanted, recursive=recursive):
                wanted[above].add(name)
    hidden = {name for name, found in versions.items() if not _hide(plan, name.decode(), found, shard_bits)}
    for raw, names in wanted.items():
        path = raw.decode("utf-8", "surrogateescape")
        if not names:
            plan.missing.append(path)
        elif names <= hidden:
            plan.gone.append(path)
    plan.shards = {shard: sorted(plan.shards[shard]) for shard in sorted(plan.shards)}
    return plan


def _rows_of(member: Member, wanted: Collection[bytes], *, recursive: bool) -> Iterator[tuple[bytes, int]]:
    if not recursive:
        for path in wanted:
            row = member.index.find(path)
            if row is not None:
                yield path, row
        return
    rows = member.index.hashes[1]
    for first in range(0, len(rows), _ROWS_AT_A_TIME):
        piece = rows[first : first + _ROWS_AT_A_TIME]
        for name, row in zip(member.index.names_of(piece), piece.tolist(), strict=True):
            if next(_wanted_above(name, wanted, recursive=True), None) is not None:
                yield name, row


def _wanted_above(name: bytes, wanted: Collection[bytes], *, recursive: bool) -> Iterator[bytes]:
    """Those of the wanted paths that are a name or a directory above it."""
    path = name
    while path:
        if path in wanted:
            yield path
        if not recursive:
            return
        path = path.rpartition(b"/")[0]
    if b"" in wanted:
        yield b""


def _note(found: dict[str, _Version], member: Member, hides: bool) -> None:
    shard = _shard_of(member) or f"/{member.key}"
    before = found.get(shard)
    if before is None or (member.name.order, _age(member)) > (before.member.name.order, _age(before.member)):
        found[shard] = _Version(member, hides)


def _hide(plan: DayPlan, name: str, found: dict[str, _Version], shard_bits: int) -> bool:
    """Add the tombstones that hide a name; False when it is hidden already."""
    shown = [version.member for version in found.values() if not version.hides]
    shards = {shard for member in shown if (shard := _shard_of(member)) is not None}
    newest = max((_age(member) for member in shown if _shard_of(member) is None), default=None)
    if newest is not None:
        home = shard_hex(placement_shard(name, shard_bits), shard_bits)
        at_home = found.get(home)
        if at_home is None or not at_home.hides or _age(at_home.member) <= newest:
            shards.add(home)
            plan.newer_than[name] = newest
    for shard in shards:
        plan.shards.setdefault(shard, []).append(name)
    return bool(shards)


def _shard_of(member: Member) -> str | None:
    """The shard whose parts are newer than a container, or None when no parts are."""
    found = managed(member.key)
    return None if found is None else found[0][1]


def _age(member: Member) -> Age:
    return member.mtime_ns, member.key
