"""A mount from its start to its end: session, signals, readiness. Trio; runs in the daemon, after the fork."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import pyfuse3
import structlog
import trio

from desfs import instruments, memory, metrics
from desfs.dump import dump_state
from desfs.errors import DesfsError, StoreUnavailable
from desfs.fs import FileSystem
from desfs.fuse_options import fuse_options
from desfs.levers import LEVERS
from desfs.listening import Announcements
from desfs.mountpoint import mounted_at, place_of, unmount
from desfs.notify import Notifier
from desfs.operations import KernelNotifier, Operations
from desfs.settings import MountSettings, unknown_variables
from desfs.store import open_store
from desfs.store.retrying import Retrying
from desfs.tasks import first_of

log = structlog.get_logger(__name__)

_START_S = 8.0  # for the tries to reach the store before a mount is given up
_START_LIMIT_S = 12.0  # for all of the start: a try under way when the time is up goes on to its own time-out
# pyfuse3's default of 99 is too few: 120 reads that wait for S3 held up a stat for 6.5 s (measured). A waiting task
# costs about 10 KB.
_MAX_TASKS = 1000
_SMALL_MEMORY = 128 * 1024 * 1024
# A thread that checks what has come must not keep the kernel waiting: Python's 5 ms are a hundred requests.
_SWITCH_S = 0.001
_UNMOUNT_S = 3.0  # for fusermount3, once and once more: with the next line all ends within ten seconds
_END_S = 2.0  # for requests under way when a signal comes; pyfuse3 by itself waits for them as long as they take

_WATCH_S = 5.0  # between looks at the oldest request, where no service manager wants to hear more often
# A call of the store takes two deadlines at most, and a request has two one behind the other at worst.
_LATE = 4


class MountFailed(DesfsError):
    """The kernel or libfuse refused the mount."""


def serve(
    source: str,
    mountpoint: str,
    settings: MountSettings,
    ready: Callable[[], None],
    *,
    reload: Callable[[], MountSettings],
    notifier: Notifier,
) -> None:
    """Mount and serve until somebody unmounts, or SIGTERM or SIGINT comes; `ready` is called when the root answers.

    SIGHUP takes over what `reload` gives, and refreshes; SIGUSR1 writes the state to the log. After a crash the mount
    stays in place, dead (ENOTCONN): an empty directory in its stead would look like a store without files. Raises:
    StoreError, MountFailed, DesfsError: nothing was mounted, or the mount is dead.
    """
    memory.limit_arenas()
    sys.setswitchinterval(_SWITCH_S)
    trio.run(_serve, source, mountpoint, settings, ready, reload, notifier)


async def _serve(
    source: str,
    mountpoint: str,
    settings: MountSettings,
    ready: Callable[[], None],
    reload: Callable[[], MountSettings],
    notifier: Notifier,
) -> None:
    if settings.memory <= _SMALL_MEMORY:
        memory.keep_small()
    for problem in unknown_variables():
        log.warning("a variable is ignored", problem=problem)
    store = open_store(source, settings.s3_options(), deadline_s=min(_START_S, settings.deadline))
    fs = FileSystem(store, settings)
    with trio.move_on_after(_START_LIMIT_S) as limit:
        await fs.start()
    if limit.cancelled_caught:
        raise StoreUnavailable(f"{store.url} did not answer within {_START_LIMIT_S:g} s")
    store.deadline_s = settings.deadline
    operations = Operations(fs, settings)
    if settings.metrics is not None:
        metrics.serve(settings.metrics, metrics.PROCESS, metrics.STORE, metrics.MOUNT)
    # Before there is a mount that would be left behind dead. What comes again while it ends says nothing new: at its
    # end the receiver hands back what it has not given.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    with trio.open_signal_receiver(*numbers) as signals:
        with _reported_by_libfuse() as message:
            try:
                pyfuse3.init(operations, mountpoint, fuse_options(source, settings))
            except RuntimeError as error:
                raise MountFailed(f"cannot mount at {mountpoint}: {message() or error}") from error
            if message():
                log.warning("libfuse has something to say", message=message())
        daemon = _Daemon(store, fs, operations, mountpoint, reload, notifier)
        unmount = False
        try:
            try:
                await daemon.run(ready, signals)
            except ExceptionGroup as group:
                raise first_of(group) from None
            unmount = daemon.is_still_mounted()
        finally:
            pyfuse3.close(unmount=unmount)
            store.close()


class _Daemon:
    """A mount that serves: its tasks, and what signals do to it."""

    def __init__(
        self,
        store: Retrying,
        fs: FileSystem,
        operations: Operations,
        mountpoint: str,
        reload: Callable[[], MountSettings],
        notifier: Notifier,
    ) -> None:
        self._store = store
        self._fs = fs
        self._operations = operations
        self._mountpoint = mountpoint
        self._mounted = mounted_at(mountpoint)
        self._reload = reload
        self._notifier = notifier
        self._requests = trio.CancelScope()

    async def run(self, ready: Callable[[], None], signals: AsyncIterator[int]) -> None:
        """Serve until the kernel or a signal ends the session. Requests are answered until everything else has ended,
        with an error at last: `Operations.refuse` says why."""
        async with trio.open_nursery() as answering:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._answer_signals, nursery, signals)
                    await nursery.start(self._fs.run, KernelNotifier())
                    nursery.start_soon(self._announce, ready)
                    nursery.start_soon(self._watch)
                    nursery.start_soon(instruments.watch, self._fs)
                    if self._fs.settings.redis is not None:
                        url = self._fs.settings.redis.get_secret_value()
                        nursery.start_soon(Announcements(url, self._store.url, self._fs.refresh_day).run)
                    try:
                        with self._requests:
                            await pyfuse3.main(max_tasks=_MAX_TASKS)
                    finally:
                        self._operations.refuse()
                        answering.start_soon(self._answer_the_last)
                        self._notifier.stopping("unmounted")
                        nursery.cancel_scope.cancel()
            finally:
                pyfuse3.terminate()

    async def _answer_the_last(self) -> None:
        with trio.CancelScope(shield=True):
            await pyfuse3.main(max_tasks=_MAX_TASKS)

    def is_still_mounted(self) -> bool:
        """False when somebody has unmounted us, or mounted something else there meanwhile: a late exit must not take
        down a successor."""
        return self._place() is not None

    def _place(self) -> str | None:
        return None if self._mounted is None else place_of(self._mounted.mount_id)

    async def _answer_signals(self, nursery: trio.Nursery, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                await self._take_settings(nursery)
            elif number == signal.SIGUSR1:
                dump_state(self._fs)
            else:
                await self._end(signal.Signals(number).name)

    async def _end(self, why: str) -> None:
        """Unmount, and end the main loop. New requests are refused, those under way have some time."""
        log.info("unmounting", mountpoint=self._mountpoint, signal=why)
        # An unmount, too, may wait for the answer to a request: that of a store which is silent takes minutes.
        self._give_up_in(2 * _UNMOUNT_S + _END_S)
        self._notifier.stopping("unmounting")
        if self.is_still_mounted():
            try:
                await trio.to_thread.run_sync(self._unmount, False)
            except DesfsError as busy:
                log.warning("unmounting lazily: whoever still uses the mount gets errors from now on", reason=str(busy))
                try:
                    await trio.to_thread.run_sync(self._unmount, True)
                except DesfsError as error:
                    log.error("not unmounted: libfuse tries once more at the end", reason=str(error))
        self._operations.refuse()
        self._give_up_in(_END_S)
        self._fs.requests.when_idle(self._requests.cancel)

    def _give_up_in(self, seconds: float) -> None:
        self._requests.deadline = min(self._requests.deadline, trio.current_time() + seconds)

    def _unmount(self, lazy: bool) -> None:
        place = self._place()
        if place is not None:
            unmount(place, lazy=lazy, limit_s=_UNMOUNT_S)

    async def _take_settings(self, nursery: trio.Nursery) -> None:
        """Read the settings again; those that make no sense leave all as it is."""
        log.info("reloading the settings")
        self._notifier.reloading()
        try:
            settings = self._reload()
        except DesfsError as error:
            log.error("the settings make no sense, the old ones hold", error=str(error))
        except Exception:  # nothing of a mount that works ends with it
            log.exception("unexpected error in the settings, the old ones hold")
        else:
            later = self._fs.reconfigure(settings)
            self._store.deadline_s = settings.deadline
            if later:
                log.warning("these settings take effect with the next mount", settings=sorted(later))
            log.info("reloaded the settings")
        self._notifier.ready(self._status())
        nursery.start_soon(partial(self._fs.refresh, everything=True))

    async def _announce(self, ready: Callable[[], None]) -> None:
        """Say ready when the root answers through the kernel, not before."""
        await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)
        if self._mounted is not None:
            LEVERS.raise_read_ahead(self._mounted.device)
        instruments.say_what_runs()
        log.info("mounted", mountpoint=self._mountpoint, levers=LEVERS.report())
        self._notifier.ready(self._status())
        ready()

    def _status(self) -> str:
        return f"{self._store.url} is mounted at {self._mountpoint}"

    async def _watch(self) -> None:
        """Tell the service manager that the event loop turns, and the log when a request takes longer than any may. A
        manager that hears nothing ends us: not because of a store that does not answer, that is no fault of ours."""
        interval_s = _WATCH_S if self._notifier.watchdog_s is None else min(self._notifier.watchdog_s / 3, _WATCH_S)
        is_late = False
        while True:
            oldest = self._fs.requests.oldest()
            limit_s = _LATE * self._fs.settings.deadline
            if oldest is not None and oldest.age_s > limit_s and not is_late:
                log.error("a request takes too long", operation=oldest.operation, age_s=round(oldest.age_s, 1))
            is_late = oldest is not None and oldest.age_s > limit_s
            self._notifier.alive()
            await trio.sleep(interval_s)


@contextlib.contextmanager
def _reported_by_libfuse() -> Iterator[Callable[[], str]]:
    """libfuse and fusermount3 write the reason of a failure to stderr, and nowhere else: catch it as text."""
    with tempfile.TemporaryFile() as caught:
        saved = os.dup(2)
        os.dup2(caught.fileno(), 2)

        def message() -> str:
            caught.seek(0)
            lines = caught.read().decode("utf-8", "replace").split("\n")
            return "; ".join(line.strip() for line in lines if line.strip())

        try:
            yield message
        finally:
            os.dup2(saved, 2)
            os.close(saved)
