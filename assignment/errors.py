"""Errors of the assignment package. Each is named after what its catcher can do."""

from __future__ import annotations


class AssignmentError(Exception):
    """Base of every error that `assignment` raises on purpose. `temporary`: the same call may succeed later."""

    temporary = False


class LeaseLost(AssignmentError):
    """The lease has passed, was released, or another holder has the shard: give the batch back to the queue."""


class ContainerExists(AssignmentError):
    """A container of that object key is committed already: look it up, and do not commit it again."""


class ContainersChanged(AssignmentError):
    """A container that was to be superseded is not live any more: look at the shard again."""


class NodeIdLost(AssignmentError):
    """The node id's lease has passed: lease another one before the next id is handed out."""

    temporary = True


class CatalogUnavailable(AssignmentError):
    """The catalog did not answer, or is locked, full or out of reach: wait, and try again."""

    temporary = True


class CatalogCorrupt(AssignmentError):
    """The database is damaged, or is no catalog of this project: nothing in it can be trusted."""


class CatalogTooNew(AssignmentError):
    """The catalog was written by a newer version of this program: upgrade the program."""


class CatalogTooOld(AssignmentError):
    """The catalog was made by an older version of this program: `desfs catalog migrate` brings it up to date."""


class ServiceUnavailable(AssignmentError):
    """The assignment service did not answer, or cannot reach its catalog: wait, and try again."""

    temporary = True


class NotAuthorized(AssignmentError):
    """The assignment service wants another token."""


class InvalidRequest(AssignmentError):
    """The request cannot be right, whatever the catalog holds: a mistake of the caller."""
