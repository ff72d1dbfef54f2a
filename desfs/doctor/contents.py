"""What is in a store, and what can be done with it, whatever kind of store it is."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from des_format.shards import CONTAINER_SUFFIX, is_day
from desfs.doctor.finding import Budget, Finding, TooLate, error, in_time, ok, skipped, warning
from desfs.errors import AccessDenied, BadAnswer, NoSuchObject, ObjectExists, StoreError
from desfs.layout import LAYOUT_KEY, LAYOUT_LIMIT, Layout
from desfs.store import Store

CONTENTS_CHECKS = ("layout", "days", "get")
WRITE_CHECKS = ("put", "If-None-Match", "delete")

_OBJECT_PREFIX = ".desfs-doctor-"
_OBJECT = b"desfs doctor was here, and should have removed this\n"
_NO_CONDITIONAL_PUT = (
    "let no more than one packer write to this store, or use a server that honours If-None-Match: AWS S3, MinIO, "
    "SeaweedFS, Ceph"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """An object to try GETs on."""

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The beginning of the listing of a store's root: objects, and names of folders without their `/`."""

    objects: tuple[Sample, ...]
    folders: tuple[str, ...]
    is_whole: bool = True

    @property
    def days(self) -> list[str]:
        """The days, ascending."""
        return sorted(name for name in self.folders if is_day(name))

    def sample(self) -> Sample | None:
        """An object of the root that is the store's own; None when all of them are below folders."""
        own = [each for each in self.objects if each.key == LAYOUT_KEY or each.key.endswith(CONTAINER_SUFFIX)]
        return next((each for each in own if each.size), None)


def check_layout(store: Store, contents: Contents, budget: Budget) -> Finding:
    """Whether `.desfs.json` is there and understood."""
    if all(each.key != LAYOUT_KEY for each in contents.objects):
        if not contents.days and not any(each.key.endswith(CONTAINER_SUFFIX) for each in contents.objects):
            return ok("layout", f"no {LAYOUT_KEY}: the first packer writes it")
        return ok("layout", f"no {LAYOUT_KEY}: a lookup reads all indexes of a day")
    remedy = f"put back the {LAYOUT_KEY} that the store's packer wrote: mounts read all indexes without it"
    try:
        raw = in_time(lambda: store.get_tail(LAYOUT_KEY, LAYOUT_LIMIT).data, budget)
        layout = msgspec.json.decode(raw, type=Layout)
    except (StoreError, TooLate) as failure:
        return error("layout", f"{LAYOUT_KEY} cannot be read: {failure}", "permit s3:GetObject on the store's objects")
    except (msgspec.MsgspecError, RecursionError) as failure:
        return warning("layout", f"{LAYOUT_KEY} is not understood: {failure}", remedy)
    if not layout.is_known:
        return warning("layout", f"{LAYOUT_KEY} has a rule of placement that this version does not know", remedy)
    shards = 1 << layout.shard_bits
    return ok("layout", f"{shards:,} shards a day, placed by {layout.placement}, named by {layout.naming}")


def judge_days(contents: Contents) -> Finding:
    """How many days there are."""
    days = contents.days
    others = len(contents.folders) - len(days)
    containers = sum(each.key.endswith(CONTAINER_SUFFIX) for each in contents.objects)
    more = "" if contents.is_whole else " in the first 1,000 names of the root"
    if not contents.folders and not containers:
        return warning(
            "days", "the store is empty: a mount of it shows nothing", "correct the prefix, or start a packer"
        )
    parts = [f"{len(days):,} day{'s' * (len(days) != 1)}{more}"]
    if days:
        parts.append(f"{days[0]} to {days[-1]}")
    if others:
        parts.append(f"{others:,} other folder{'s' * (others != 1)}")
    if containers:
        parts.append(f"{containers:,} container{'s' * (containers != 1)} in the root")
    return ok("days", ", ".join(parts))


def check_get(store: Store, sample: Sample | None, budget: Budget) -> Finding:
    """Whether a range of an object can be read, and is what comes."""
    if sample is None:
        return skipped("get", "the store has no object to try it on; --write makes one")
    start = min(1, sample.size - 1)  # a server that ignores ranges would answer a first byte rightly by accident
    try:
        in_time(lambda: store.get_range(sample.key, start, start + 1), budget)
    except NoSuchObject:
        return skipped("get", f"there is no {sample.key}")
    except AccessDenied as failure:
        return error("get", f"{sample.key} may not be read: {failure}", "permit s3:GetObject on the store's objects")
    except BadAnswer as failure:
        return error(
            "get",
            f"ranges are not honoured: {failure}",
            "find what stands between this machine and the store and drops the header Range; no mount works without",
        )
    except (StoreError, TooLate) as failure:
        return error("get", f"{sample.key} cannot be read: {failure}", "try again; then look at the store's own log")
    return ok("get", f"permitted, and ranges are honoured ({sample.key})")


def check_writing(store: Store, budget: Budget, look: Callable[[Sample], Iterator[Finding]]) -> Iterator[Finding]:
    """Put an object, put it again, delete it: what a packer needs. `look` makes further checks with it meanwhile."""
    key = _OBJECT_PREFIX + secrets.token_hex(8)
    removed = skipped("delete", "nothing was put")
    try:
        in_time(lambda: store.put(key, _OBJECT), budget)
    except (StoreError, TooLate) as failure:
        if isinstance(failure, TooLate) or failure.temporary:
            removed = _delete(store, key, budget)  # it may be there, and its answer was lost
        yield from judge_put_failure(failure)
    else:
        try:
            yield ok("put", f"permitted ({key})")
            yield check_if_none_match(store, key, budget)
            yield from look(Sample(key, len(_OBJECT)))
        finally:
            # Not a part of the time of the checks.
            removed = _delete(store, key, Budget(budget.each_s, budget.each_s))
    yield removed


def judge_put_failure(failure: StoreError | TooLate) -> list[Finding]:
    """What it means that nothing could be stored."""
    if "conditional writes" in str(failure):  # status 501: desfs.store.s3
        return [skipped("put", "not without If-None-Match"), error("If-None-Match", str(failure), _NO_CONDITIONAL_PUT)]
    remedy = "permit s3:PutObject on the store's objects" if isinstance(failure, AccessDenied) else "try again"
    return [error("put", f"no object can be stored: {failure}", remedy), skipped("If-None-Match", "nothing was put")]


def check_if_none_match(store: Store, key: str, budget: Budget) -> Finding:
    """PUT again what is there."""
    try:
        in_time(lambda: store.put(key, _OBJECT), budget)
    except ObjectExists:
        return ok("If-None-Match", "honoured: a packer never overwrites another's container")
    except (StoreError, TooLate) as failure:
        return error("If-None-Match", f"a second PUT failed otherwise than with 412: {failure}", "try again")
    return error(
        "If-None-Match",
        "ignored: the second PUT of a key replaced the first, so two packers can overwrite each other's containers",
        _NO_CONDITIONAL_PUT,
    )


def _delete(store: Store, key: str, budget: Budget) -> Finding:
    by_hand = f"remove the object {key} by hand"
    try:
        in_time(lambda: store.delete(key), budget)
    except AccessDenied as failure:
        return warning("delete", f"not permitted: {failure}", f"permit s3:DeleteObject; {by_hand}")
    except (StoreError, TooLate) as failure:
        return error("delete", f"{key} could not be deleted: {failure}", by_hand)
    try:
        in_time(lambda: store.get_tail(key, 1), budget)
    except NoSuchObject:
        return ok("delete", "permitted; the object is gone")
    except AccessDenied:
        return ok("delete", "permitted; whether the object is gone cannot be seen")
    except (StoreError, TooLate) as failure:
        return error("delete", f"whether {key} is gone could not be seen: {failure}", by_hand)
    return error("delete", f"{key} was deleted and is still there", by_hand)
