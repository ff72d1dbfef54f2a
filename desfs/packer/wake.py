"""What wakes a packer that has nothing to do: somebody writes into the spool. Asyncio.

inotify only wakes: a rescan is the truth, because its queues overflow and some file systems send nothing (NFS, for
what other hosts do).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog
from asyncinotify import Inotify, Mask

from desfs.spool import INTERNAL

log = structlog.get_logger(__name__)

_MASK = Mask.CREATE | Mask.MOVED_TO | Mask.CLOSE_WRITE | Mask.ONLYDIR | Mask.DONT_FOLLOW
_MOST = 4096  # folders watched: a user may have 8,192 watches by default on older kernels


class Waker:
    """Waits for something to happen in a spool that holds no file."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._woken = asyncio.Event()
        self._is_deaf = False

    def wake(self) -> None:
        """Let whoever waits go on, now and whenever it waits from now on."""
        self._woken.set()

    async def wait(self, seconds: float) -> None:
        """Return when a program does something in the spool, has done so already, `wake` is called, or time is up."""
        try:
            inotify = Inotify()
        except OSError as error:
            self._say(error)
            await self._wait_for(asyncio.create_task(self._woken.wait()), seconds)
            return
        with inotify:
            try:
                if await asyncio.to_thread(self._watch, inotify):
                    return
            except OSError as error:
                self._say(error)
            await self._wait_for(asyncio.create_task(self._heard(inotify)), seconds)

    async def _heard(self, inotify: Inotify) -> None:
        event, woken = asyncio.ensure_future(inotify.get()), asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait((event, woken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            event.cancel()
            woken.cancel()
            await asyncio.gather(event, woken, return_exceptions=True)

    @staticmethod
    async def _wait_for(task: asyncio.Task[object], seconds: float) -> None:
        await asyncio.wait((task,), timeout=seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def _watch(self, inotify: Inotify) -> bool:
        """Watch all folders; True if there is a file already. Raises: OSError when the user has no watches left."""
        folders = [self._root]
        watched = 0
        while folders and watched < _MOST:
            folder = folders.pop()
            try:
                inotify.add_watch(folder, _MASK)
                watched += 1
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name == INTERNAL and folder == self._root:
                            continue
                        if not entry.is_dir(follow_symlinks=False):
                            return True
                        folders.append(Path(entry.path))
            except (FileNotFoundError, NotADirectoryError):
                continue  # went meanwhile
        return False

    def _say(self, error: OSError) -> None:
        if not self._is_deaf:
            log.warning("the spool is not watched, only looked at now and then", error=str(error))
        self._is_deaf = True
