"""From a URL to a store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from des_format.shards import CONTAINER_SUFFIX, guess_root
from desfs.errors import StoreError, UsageError
from desfs.store.base import S3Options, check_key
from desfs.store.retrying import Retrying

# The widest rule that S3 ever had (us-east-1 before 2018). SeaweedFS and MinIO are narrower and say so themselves.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}\Z")
_FORMS = "s3://bucket/prefix, file:///directory or a path"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=//)")


def open_store(
    url: str, s3_options: S3Options | None = None, *, deadline_s: float = 60.0, create: bool = False
) -> Retrying:
    """The store behind `s3://bucket/prefix`, `file:///dir` or a plain path, with retries within `deadline_s` a call.

    `create` makes a missing directory; a bucket is never made. Nothing is sent to S3 yet.

    Raises UsageError for any other URL, NoSuchStore for a path that is no directory.
    """
    scheme = _SCHEME.match(url)
    if not url or "\0" in url or (scheme is None and url.lower().startswith(("s3:", "file:"))):
        raise UsageError(f"{_shown(url)!r} is no store: use {_FORMS}")
    if scheme is None or scheme[1].lower() == "file":
        from desfs.store.file import FileStore

        return Retrying(FileStore(url if scheme is None else _path_of(url), create=create), deadline_s)
    if scheme[1].lower() != "s3":
        raise UsageError(f"{_shown(url)!r} is no store: use {_FORMS}")
    bucket, prefix = _bucket_and_prefix(url)
    from desfs.store.obstore_s3 import ObstoreS3Store

    return Retrying(ObstoreS3Store(bucket, prefix, s3_options or S3Options()), deadline_s)


def local_root(url: str) -> Path | None:
    """The directory behind a URL that `open_store` takes, or None for a store that is no directory."""
    scheme = _SCHEME.match(url)
    if scheme is None:
        return Path(url).absolute()
    return Path(_path_of(url)) if scheme[1].lower() == "file" else None


def split_place(place: str) -> tuple[str, str | None]:
    """A store's URL, and the key of one container in it, for a place like `s3://bucket/2026-11-20/3f.des`; no key for a
    place that is a store. The root is above the container's day, where its external objects and its layout are looked
    for."""
    root = local_root(place)
    if not place.endswith(CONTAINER_SUFFIX) or (root is not None and root.is_dir()):
        return place, None
    if root is not None:
        path = os.path.realpath(root)  # a store follows no links below its root
        above = guess_root(path)
        return above if above == "/" else above.rstrip("/"), path[len(above) :]
    scheme, slashes, rest = place.partition("://")
    bucket, slash, path = rest.partition("/")
    if not slash:
        return place, None
    above = guess_root(path)
    return f"{scheme}{slashes}{bucket}/{above}".rstrip("/"), path[len(above) :]


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise UsageError(f"{_shown(url)!r} is no file URL: write file:///directory, three slashes, no host")
    path = unquote(parts.path)
    if "\0" in path:
        raise UsageError(f"{_shown(url)!r} is no file URL: it has a NUL")
    return path


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    """What follows s3:// is taken as it stands: keys may have %, ? and # in them."""
    bucket, _, prefix = url[len("s3://") :].partition("/")
    if "@" in bucket:
        raise UsageError(
            "an s3 URL has no credentials in it: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a profile"
        )
    if not _BUCKET.match(bucket):
        raise UsageError(f"{url!r}: {bucket!r} is no name of a bucket")
    prefix = prefix.strip("/")
    if prefix:
        try:
            check_key(prefix)
        except StoreError as error:
            raise UsageError(f"{url!r}: {error}") from error
    return bucket, prefix


def _shown(url: str) -> str:
    """The URL without what may be a password."""
    return re.sub(r"//[^/@]*@", "//…@", url)
