"""Errors of the format library. Each is named after what its catcher can do."""

from __future__ import annotations


class DesFormatError(Exception):
    """Base of every error that `des_format` raises on purpose."""


class NotAContainer(DesFormatError):
    """The bytes are no DES v1 container: nothing in it can be served."""


class NoSuchEntry(DesFormatError):
    """The container has no entry of that name."""


class CorruptEntry(DesFormatError):
    """One entry cannot be served; the rest of the container can."""


class UnsupportedEntry(CorruptEntry):
    """The entry carries a flag that this reader does not implement, so its bytes would be wrong."""


class CorruptMeta(DesFormatError):
    """The metadata of one entry is damaged; its bytes can still be served."""


class InvalidMeta(DesFormatError):
    """Metadata given to a writer that is no JSON object, or too large."""


class InvalidEntryName(DesFormatError):
    """The name cannot stand in a container, or cannot be written under the rules asked for."""


class InvalidAssignedName(DesFormatError):
    """The text is no Snowflake-style name, or its checksum is wrong."""


class NamesExhausted(DesFormatError):
    """All names that a day has under the configured `wrap_bits` are used up."""


class SizeMismatch(DesFormatError):
    """A stream held more or fewer bytes than its caller had announced."""


class WriterClosed(DesFormatError):
    """The writer was closed, or failed before; nothing can be added any more."""


class SourceError(DesFormatError):
    """The bytes of a container or of an external object could not be had."""

    temporary = False


class NoSuchObject(SourceError):
    """The object is not there (any more)."""


class ObjectReplaced(SourceError):
    """The object is not the version that the index came from."""


class BadAnswer(SourceError):
    """The server answered something else than what was asked for: another range, another length, another object."""

    temporary = True


class SourceUnavailable(SourceError):
    """The server did not answer, or refused for a reason that may pass."""

    temporary = True
