"""All containers of a day, as a mount shows them. Blocking."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from des_format.errors import NotAContainer
from des_format.names import name_problem
from des_format.shards import CONTAINER_SUFFIX, parse_container_name
from desfs.container import LoadedContainer, load_container
from desfs.errors import NoSuchObject, ObjectReplaced, StoreError
from desfs.store.base import ObjectInfo, Store
from desfs.tree import Member

AT_A_TIME = 16  # containers that are opened: each costs some 3 MB while its index is parsed
_ATTEMPTS = 3  # while containers change


@dataclass(slots=True)
class OpenedDay:
    """The containers of a day, by key, and what could not be shown of it, a line each."""

    members: list[Member] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def list_day(store: Store, day: str) -> list[ObjectInfo]:
    """The containers of a day: those in its folder, and `{day}.des`. Raises: StoreError."""
    whole = day + CONTAINER_SUFFIX
    found = [*store.list(f"{day}/", delimiter=True).objects, *store.list(whole, delimiter=True).objects]
    return [
        info
        for info in found
        if (info.key == whole or info.key.startswith(f"{day}/"))
        and parse_container_name(info.key.rpartition("/")[2]) is not None
        and name_problem(info.key.encode("utf-8", "surrogateescape")) is None
    ]


def open_day(store: Store, day: str) -> OpenedDay:
    """Read every index of a day; a container that is none is left out and named. Raises: StoreError."""
    for _ in range(_ATTEMPTS):
        infos = list_day(store, day)
        with ThreadPoolExecutor(AT_A_TIME, "open") as threads:
            found = list(threads.map(lambda info: _load(store, info), infos))
        if all(each is not None for each in found):
            break
    else:
        raise StoreError(f"{day}: its containers changed {_ATTEMPTS} times while they were opened")
    opened = OpenedDay()
    for number, (info, each) in enumerate(zip(infos, found, strict=True), 1):
        name = parse_container_name(info.key.rpartition("/")[2])
        if isinstance(each, LoadedContainer) and name is not None:
            opened.members.append(Member(number, number, each.index, info.key, name, info.mtime_ns, each.folders))
        elif isinstance(each, NotAContainer):
            opened.problems.append(str(each))
    return opened


def _load(store: Store, info: ObjectInfo) -> LoadedContainer | NotAContainer | None:
    """None for a container that was replaced or deleted since it was listed."""
    try:
        return load_container(store, info)
    except NotAContainer as error:
        return error
    except (NoSuchObject, ObjectReplaced):
        return None
