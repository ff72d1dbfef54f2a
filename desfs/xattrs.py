"""Extended attributes of files: where they lie, and their metadata. Trio."""

from __future__ import annotations

import json
from typing import Any

from des_format.codec import decode_meta
from des_format.errors import CorruptMeta
from desfs.container import OpenContainer
from desfs.errors import NoSuchAttribute, NoSuchNamespace
from desfs.fetch import Fetcher
from desfs.store_threads import StoreThreads

_WINDOW = 256 * 1024  # bytes of META in one GET: the metadata of about a thousand neighbours
_MAX_VALUE = 65536  # XATTR_SIZE_MAX of Linux
_NAMESPACE = b"user."
_PREFIXES = (b"user.des.", b"user.mime_type", b"user.sha256")


class Xattrs:
    """META is not kept in memory: it is read again, with that of the neighbours, when somebody asks."""

    def __init__(self, threads: StoreThreads, fetcher: Fetcher) -> None:
        self._threads = threads
        self._fetcher = fetcher

    @staticmethod
    def check_name(name: bytes) -> None:
        """Raises: NoSuchNamespace, NoSuchAttribute for names that no file of ours has.

        `ls -l` asks for `security.selinux` and `system.posix_acl_access`, and after "not supported" it does not ask for
        those of any other file of the mount (coreutils, lib/file-has-acl.c and src/ls.c: errno_unsupported).
        """
        shown = name.decode("utf-8", "backslashreplace")
        if not name.startswith(_NAMESPACE):
            raise NoSuchNamespace(shown)
        if not name.startswith(_PREFIXES):
            raise NoSuchAttribute(shown)

    async def of(self, container: OpenContainer, row: int) -> dict[bytes, bytes]:
        """All attributes of a file, by name. Damaged metadata leaves those out that come from it. What is longer than
        the kernel takes is left out, or `cp -a` would stumble over it.

        Raises: NoSuchObject, ObjectReplaced; StoreError.
        """
        values = {b"user.des.container": container.info.key.encode()}
        raw = await self._meta(container, row)
        index = container.loaded.index
        try:
            meta: dict[str, Any] = decode_meta(raw, int(index.data_length[row]), container.info.key)
        except CorruptMeta:
            return values
        if raw:
            values[b"user.des.meta"] = raw
        for name, key in ((b"user.des.id", "id"), (b"user.mime_type", "mime"), (b"user.sha256", "sha256")):
            value = meta.get(key)
            if value is not None:
                values[name] = (value if isinstance(value, str) else json.dumps(value)).encode(
                    "utf-8", "backslashreplace"
                )
        return {name: value for name, value in values.items() if len(value) <= _MAX_VALUE}

    async def _meta(self, container: OpenContainer, row: int) -> bytes:
        index = container.loaded.index
        start, length = int(index.meta_offset[row]), int(index.meta_length[row])
        if length == 0:
            return b""
        return await self._fetcher.meta(container, start, start + length, _WINDOW)
