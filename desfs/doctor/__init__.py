"""What keeps a mount or a packer from working, and what to do about it.

The machine, the store, the caches and the mount point are looked at at the same time. No check waits for long, and none
needs what another one found wrong: what cannot be looked at is said to be skipped, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from desfs.doctor.finding import Budget, Finding, State, in_parallel

if TYPE_CHECKING:
    from desfs.settings import MountSettings

__all__ = ["EACH_S", "Finding", "State", "examine"]

EACH_S = 5.0  # for one check
_SERIES_S = 13.0  # for one of the series that run at the same time; clean-up comes on top
_TOTAL_S = 19.0


def examine(
    source: str | None,
    directory: str | None,
    settings: MountSettings | None,
    *,
    write: bool = False,
    each_s: float = EACH_S,
) -> Iterator[Finding]:
    """The findings, in an order that does not change. `settings` are None where they could not be read: then nothing
    but the machine is looked at. With `write` an object is put into the store, and deleted."""

    def machine() -> Iterator[Finding]:
        from desfs.doctor.machine import check_machine

        return check_machine(settings)

    series: dict[str, Callable[[], Iterator[Finding]]] = {"machine": machine}
    if settings is not None:
        series |= _of_settings(source, directory, settings, write, each_s)
    yield from in_parallel(series, _TOTAL_S, finishing=("store",) if write else ())


def _of_settings(
    source: str | None, directory: str | None, settings: MountSettings, write: bool, each_s: float
) -> dict[str, Callable[[], Iterator[Finding]]]:
    def store() -> Iterator[Finding]:
        from desfs.doctor.place import check_directory_store
        from desfs.doctor.s3 import check_s3

        assert source is not None
        check = check_s3 if is_s3(source) else check_directory_store
        return check(source, settings, Budget(each_s, _SERIES_S), write=write)

    def caches() -> Iterator[Finding]:
        from desfs.doctor.place import check_caches

        return check_caches(settings, Budget(each_s, _SERIES_S))

    def mount_point() -> Iterator[Finding]:
        from desfs.doctor.place import check_directory

        assert directory is not None
        return check_directory(directory, source, settings, Budget(each_s, _SERIES_S))

    return (
        ({"store": store} if source is not None else {})
        | {"caches": caches}
        | ({"mount point": mount_point} if directory is not None else {})
    )


def is_s3(source: str) -> bool:
    """Whether a source that may be anything is to be looked at as one in S3."""
    return source.lower().startswith("s3:")
