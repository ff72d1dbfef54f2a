"""Reading on when a container was replaced or removed under its readers. Trio thread only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import structlog
import trio

from des_format.errors import CorruptEntry, DesFormatError
from desfs.changes import same_content
from desfs.container import OpenContainer
from desfs.day import DayView, File
from desfs.errors import DesfsError, NoSuchObject, NoSuchPath, ObjectReplaced, StaleInode
from desfs.views import Views

log = structlog.get_logger(__name__)

T = TypeVar("T")

_MOVES = 4  # of a file from one container to another, while it is read


class Moves:
    """Follows files to where their content stands now. `forget` makes the kernel forget the inode of a file that is
    nowhere any more, before its reader is told."""

    def __init__(self, views: Views, forget: Callable[[File], Awaitable[None]]) -> None:
        self._views = views
        self._forget = forget
        self._gone: set[int] = set()  # slots of containers that are not in the store any more

    async def current(self, file: File, call: Callable[[OpenContainer, int], Awaitable[T]]) -> T:
        """The result of a call that reads a file. Where its container was replaced or removed, its day is listed again,
        and the same content is read from the container that has it now, if one has: after a merge an open file goes on.

        Raises: StaleInode when no container has it; what the call raises.
        """
        shown = file
        for _ in range(_MOVES):
            container = shown.container
            day = self._views.day_of(container)
            is_current = day is not None and day.has(container)
            if is_current or container.slot not in self._gone:
                damage: CorruptEntry | None = None
                try:
                    answer = await call(*shown)
                    # No await between the call's last look at the container's external objects and this one.
                    if not container.outdated:
                        return answer
                except CorruptEntry as error:
                    damage = error  # unless what it should be has changed as well
                except (ObjectReplaced, NoSuchObject) as error:
                    log.info("a container is not what it was", key=container.info.key, error=str(error))
                if day is not None and is_current:
                    await refreshed(partial(day.refresh, unless_since=trio.current_time()))
                    if container.outdated and damage is None:
                        await refreshed(partial(day.reopen, container))
                if damage is not None and not container.outdated and (day is None or day.has(container)):
                    raise damage
                if day is None or not day.has(container):
                    self._gone = {slot for slot in self._gone if self._views.slots.get(slot) is not None}
                    self._gone.add(container.slot)
            successor = None if day is None else await self._successor(day, file)
            if successor is None or successor == shown:
                break
            shown = successor
        await self._forget(file)
        raise StaleInode(f"{file.container.info.key} was replaced or removed")

    async def _successor(self, day: DayView, file: File) -> File | None:
        """What the path of a file shows now, if that has the file's content."""
        loaded = file.container.loaded
        try:
            found = await day.find(loaded.index.name(file.row))
        except NoSuchPath:
            return None
        if found is None:
            return None
        new = found.container.loaded
        is_same = same_content(loaded.index, loaded.meta, file.row, new.index, new.meta, found.row)
        return found if is_same else None


async def refreshed(refresh: Callable[[], Awaitable[T]]) -> T | None:
    """What a refresh gives; None if it fails, and nothing of the mount ends with it."""
    try:
        return await refresh()
    except (DesfsError, DesFormatError) as error:
        log.warning("refresh failed, the last view stays", error=str(error))
    except Exception:
        log.exception("unexpected error in a refresh, the last view stays")
    return None
