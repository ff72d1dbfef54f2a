"""Errors of the file system and its daemons, and what a caller of the kernel sees of them."""

from __future__ import annotations

import errno

import des_format.errors as fmt


class DesfsError(Exception):
    """Base of every error that `desfs` raises on purpose."""


class UsageError(DesfsError):
    """An option, an argument or a URL makes no sense; the message says which and why."""


class StoreError(DesfsError):
    """An object store could not do what was asked. `temporary` is all that the retry loop looks at."""

    temporary = False


class NoSuchObject(StoreError):
    """There is no object under that key."""


class NoSuchStore(StoreError):
    """The bucket or the directory that should hold the store does not exist."""


class AccessDenied(StoreError):
    """The store knows us and refuses, or does not know us."""


class ObjectExists(StoreError):
    """A put with `if_absent` found an object under its key."""


class ObjectReplaced(StoreError):
    """The object is another version than the one asked for with `if_match`."""


class Throttled(StoreError):
    """The store asks us to slow down."""

    temporary = True


class StoreUnavailable(StoreError):
    """No connection, a reset, a time-out, or a 5xx answer."""

    temporary = True


class BadAnswer(StoreError):
    """The store reported success for something else than what was asked: another range, a short body, another
    object."""

    temporary = True


class StoreFull(StoreError):
    """The store has no room left for the object."""


class DeadlineExceeded(StoreError):
    """Every try within the request's deadline failed; the last failure is the cause."""


class ReadOnlyMount(DesfsError):
    """Containers are immutable: every mutating call is refused."""


class NoSuchPath(DesfsError):
    """The name space has nothing under that name; `for_long`: until the kernel is told otherwise."""

    def __init__(self, message: str, *, for_long: bool = False) -> None:
        super().__init__(message)
        self.for_long = for_long


class NotADirectory(DesfsError):
    """A file was used as a directory."""


class IsADirectory(DesfsError):
    """A directory was used as a file."""


class StaleInode(DesfsError):
    """The inode belongs to a container version that is not there any more."""


class NoSuchAttribute(DesfsError):
    """The file has no extended attribute of that name."""


class NoSuchNamespace(DesfsError):
    """No file has extended attributes in the name's namespace."""


class DamagedDay(DesfsError):
    """A container of the day was refused, and the mount is strict."""


# One table for the whole program. A subclass without a line of its own has its parent's.
ERRNO: dict[type[Exception], int] = {
    DesfsError: errno.EIO,
    NoSuchObject: errno.ENOENT,
    NoSuchStore: errno.EIO,
    AccessDenied: errno.EIO,
    ObjectReplaced: errno.ESTALE,
    DeadlineExceeded: errno.EIO,
    ReadOnlyMount: errno.EROFS,
    NoSuchPath: errno.ENOENT,
    NotADirectory: errno.ENOTDIR,
    IsADirectory: errno.EISDIR,
    StaleInode: errno.ESTALE,
    NoSuchAttribute: errno.ENODATA,
    NoSuchNamespace: errno.EOPNOTSUPP,
    DamagedDay: errno.EIO,
    fmt.DesFormatError: errno.EIO,
    fmt.NoSuchEntry: errno.ENOENT,
    fmt.ObjectReplaced: errno.ESTALE,
}


def errno_of(error: Exception) -> int:
    """The errno for an error of this program, found along its class's bases; KeyError for a foreign one."""
    for base in type(error).__mro__:
        if base in ERRNO:
            return ERRNO[base]
    raise KeyError(type(error).__name__)
