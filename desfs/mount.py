"""A mount from its start to its end: session, signals, readiness. Trio; runs in the daemon, after the fork."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator

import pyfuse3
import structlog
import trio

from desfs import memory
from desfs.errors import DesfsError, StoreUnavailable
from desfs.fs import FileSystem
from desfs.levers import LEVERS
from desfs.mountpoint import Mounted, mounted_at
from desfs.operations import KernelNotifier, Operations
from desfs.settings import MountSettings
from desfs.store import open_store
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
_END_S = 2.0  # for requests under way when a signal comes; pyfuse3 by itself waits for them as long as they take


class MountFailed(DesfsError):
    """The kernel or libfuse refused the mount."""


def fuse_options(source: str, settings: MountSettings) -> set[str]:
    """The options for libfuse. A mount is always read-only, without devices and set-uid programs, and the kernel checks
    permissions."""
    name = (settings.fsname or source).replace("\\", "\\\\").replace(",", "\\,")
    options = {"ro", "nosuid", "nodev", "default_permissions", f"fsname={name}", "subtype=desfs"}
    if settings.allow_other:
        options.add("allow_other")
    if settings.noexec:
        options.add("noexec")
    return options


def serve(source: str, mountpoint: str, settings: MountSettings, ready: Callable[[], None]) -> None:
    """Mount and serve until somebody unmounts, or SIGTERM or SIGINT comes; `ready` is called when the root answers.

    After a crash the mount stays in place, dead (ENOTCONN): an empty directory in its stead would look like a store
    without files. Raises: StoreError, MountFailed, DesfsError: nothing was mounted, or the mount is dead.
    """
    memory.limit_arenas()
    sys.setswitchinterval(_SWITCH_S)
    trio.run(_serve, source, mountpoint, settings, ready)


async def _serve(source: str, mountpoint: str, settings: MountSettings, ready: Callable[[], None]) -> None:
    if settings.memory <= _SMALL_MEMORY:
        memory.keep_small()
    store = open_store(source, settings.s3_options(), deadline_s=min(_START_S, settings.deadline))
    fs = FileSystem(store, settings)
    with trio.move_on_after(_START_LIMIT_S) as limit:
        await fs.start()
    if limit.cancelled_caught:
        raise StoreUnavailable(f"{store.url} did not answer within {_START_LIMIT_S:g} s")
    store.deadline_s = settings.deadline
    operations = Operations(fs, settings)
    with _reported_by_libfuse() as message:
        try:
            pyfuse3.init(operations, mountpoint, fuse_options(source, settings))
        except RuntimeError as error:
            raise MountFailed(f"cannot mount at {mountpoint}: {message() or error}") from error
    ours = mounted_at(mountpoint)
    unmount = False
    try:
        try:
            async with trio.open_nursery() as nursery:
                requests = trio.CancelScope()
                nursery.start_soon(_answer_signals, requests)
                await nursery.start(fs.run, KernelNotifier())
                nursery.start_soon(_announce, mountpoint, ours, ready)
                with requests:
                    await pyfuse3.main(max_tasks=_MAX_TASKS)
                nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            raise first_of(group) from None
        unmount = _is_still(ours, mountpoint)
    finally:
        pyfuse3.close(unmount=unmount)
        store.close()


async def _answer_signals(requests: trio.CancelScope) -> None:
    """End the main loop; requests that take too long are given up, and the kernel tells those who wait for them."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("unmounting", signal=signal.Signals(number).name)
            pyfuse3.terminate()
            requests.deadline = min(requests.deadline, trio.current_time() + _END_S)


async def _announce(mountpoint: str, ours: Mounted | None, ready: Callable[[], None]) -> None:
    """Say ready when the root answers through the kernel, not before."""
    await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
    if ours is not None:
        LEVERS.raise_read_ahead(ours.device)
    log.info("mounted", mountpoint=mountpoint, levers=LEVERS.report())
    ready()


def _is_still(ours: Mounted | None, mountpoint: str) -> bool:
    """False when somebody has unmounted us, or mounted something else there meanwhile: a late exit must not take down a
    successor."""
    now = mounted_at(mountpoint)
    return now is not None and ours is not None and now.mount_id == ours.mount_id


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
