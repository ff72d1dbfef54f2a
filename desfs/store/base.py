"""What every object store can do. Blocking: callers with an event loop run it in threads.

Keys are relative to the store's root (`s3://bucket/prefix` or a directory), use `/`, and never start with one. Every
method refuses other keys with StoreError (`check_key`); a listing may show them where the store has them.
Every method may be called from any thread. A call that its caller has given up may still take effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from desfs.errors import StoreError


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing. `mtime_ns` is LastModified since the epoch; S3 gives it in whole seconds."""

    key: str
    size: int
    etag: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects in ascending key order (UTF-8 bytes), and the common prefixes, each with its trailing `/`."""

    objects: tuple[ObjectInfo, ...]
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes of one version of an object: `data`, which version (`etag`), and the whole object's `size`. `body_s` is how
    long the bytes took after the headers, None where nobody knows.

    A memoryview keeps no more memory than its own bytes, and nobody changes it.
    """

    data: bytes | memoryview
    etag: str
    size: int
    body_s: float | None = None


@dataclass(frozen=True, slots=True)
class CopyRange:
    """A half-open byte range of an existing object, of one version of it."""

    key: str
    start: int
    stop: int
    etag: str


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach S3. What is None comes from the AWS environment; a custom endpoint implies path style."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    addressing_style: Literal["auto", "virtual", "path"] | None = None
    no_sign_request: bool = False
    ca_bundle: str | None = None


def check_key(key: str) -> None:
    """Refuse what cannot be a key: no UTF-8 text, NUL, or components that are empty, `.` or `..`. Raises StoreError."""
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{key!r} cannot be a key: it has NUL, or a component that is empty, '.' or '..'")


def can_begin_keys(prefix: str) -> bool:
    """Whether there can be a key that starts with `prefix`; servers differ in what they make of the others."""
    above = prefix.split("/")[:-1]
    return "\0" not in prefix and not any(part in ("", ".", "..") for part in above)


class Store(Protocol):
    """An object store below one root.

    Raises, from every method: NoSuchStore, AccessDenied, Throttled, StoreUnavailable, BadAnswer, DeadlineExceeded, or
    StoreError itself for what none of these says (`desfs.errors`); what a method raises besides is in its docstring.
    """

    @property
    def url(self) -> str:
        """The root, as a user would write it; never with a secret in it."""
        ...

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        """All objects whose key starts with `prefix`, every page of them. With `delimiter`, keys that have a `/` after
        the prefix are folded into `prefixes`. A prefix that nothing stands under gives an empty listing.

        Objects whose key ends in `/`, which some tools make to show folders, are left out. A prefix whose last object
        was just deleted may still be there (SeaweedFS removes its folders later).
        """
        ...

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        """Exactly the bytes [start, stop) of the object, 0 <= start < stop <= its size.

        Raises NoSuchObject; ObjectReplaced when the object's ETag is not `if_match`; BadAnswer when the answer is not
        the range that was asked for, and, with `temporary` False, when the range does not lie in the object.
        """
        ...

    def get_tail(self, key: str, length: int) -> Answer:
        """The last `length` bytes (> 0), or the whole object if it is shorter (empty included). Raises NoSuchObject."""
        ...

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        """Store an object, durable and whole when this returns, and never visible in part; its ETag. A file is
        streamed: its bytes are never in memory as a whole. Raises ObjectExists (with `if_absent`), StoreFull."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; a key that is not there is no error."""
        ...

    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        """Store an object made of `pieces` in order, copied inside the store where that is possible; its ETag.

        Pieces may have any size, zero included. Raises ObjectExists (with `if_absent`), StoreFull; NoSuchObject or
        ObjectReplaced for a source, and BadAnswer, with `temporary` False, for a range outside of it.
        """
        ...

    def close(self) -> None:
        """Release connections. Calls in flight may fail with StoreUnavailable."""
        ...
