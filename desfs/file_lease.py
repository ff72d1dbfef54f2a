"""Whether somebody has a file open for writing: read leases of the kernel, fcntl(2). Blocking."""

from __future__ import annotations

import errno
import fcntl

from desfs.errors import DesfsError


class LeaseRefused(DesfsError):
    """The kernel gives leases on a file to its owner and to holders of CAP_LEASE alone (fcntl(2))."""


def take_lease(descriptor: int) -> bool:
    """A read lease on an open file: False when somebody has it open for writing. It goes with the descriptor.

    File systems without leases (NFS, some FUSE) are trusted by the settle time alone. Raises: LeaseRefused where
    nothing can tell whether somebody writes.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        if error.errno in (errno.EACCES, errno.EPERM):
            raise LeaseRefused(
                "whether a writer holds it open cannot be told: run the packer as its owner, as root, or with CAP_LEASE"
            ) from error
        if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def lease_is_broken(descriptor: int) -> bool:
    """True if a writer has asked for the file since the lease was taken."""
    # F_GETLEASE gives what the lease will be when the break is done: F_UNLCK while a writer waits (fcntl(2)). Without
    # a lease it is F_UNLCK as well: FileState tells then.
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_UNLCK and _leases_work(descriptor)


def _leases_work(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False
