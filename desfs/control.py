"""`/.desfs/`: a directory that is reachable by name and listed nowhere. Reading it never touches the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import NamedTuple

from desfs.errors import IsADirectory, NoSuchPath
from desfs.inode import CONTROL_DIRECTORY, CONTROL_FILES, InodeNumber

_FILES = (b"stats", b"containers", b"problems", b"config")


class _Content(NamedTuple):
    text: bytes
    made_ns: int


class ControlDirectory:
    """The files' contents are made when a file is looked up, which the kernel does before each open, since names and
    attributes have no timeout; between two lookups they stay as they are. Made with every request for attributes, they
    would change under a reader that reads in pieces: the kernel asks for attributes before each of its reads.
    One thread."""

    def __init__(self, render: Callable[[str], object]) -> None:
        """`render` gives a file's value by its name: lines of text, or anything that is JSON."""
        self._render = render
        self._contents: dict[int, _Content] = {}

    def owns(self, inode: int) -> bool:
        """True for the directory and its files."""
        return CONTROL_DIRECTORY <= inode < CONTROL_FILES + len(_FILES)

    def lookup(self, name: bytes) -> InodeNumber:
        """The inode of a file, whose content is made anew. Raises: NoSuchPath."""
        if name not in _FILES:
            raise NoSuchPath(f"no control file {name.decode('utf-8', 'backslashreplace')!r}")
        inode = InodeNumber(CONTROL_FILES + _FILES.index(name))
        self._make(inode)
        return inode

    def files(self) -> list[tuple[bytes, InodeNumber]]:
        """The files of the directory."""
        return [(name, InodeNumber(CONTROL_FILES + place)) for place, name in enumerate(_FILES)]

    def size(self, inode: int) -> int:
        """Bytes of a file."""
        return len(self._current(inode).text)

    def changed_ns(self, inode: int) -> int:
        """When a file's content was made; no two contents have the same time."""
        return self._current(inode).made_ns

    def read(self, inode: int) -> bytes:
        """A file's content. Raises: IsADirectory for the directory."""
        if inode == CONTROL_DIRECTORY:
            raise IsADirectory("the control directory has no bytes")
        return self._current(inode).text

    def _current(self, inode: int) -> _Content:
        return self._contents.get(inode) or self._make(inode)

    def _make(self, inode: int) -> _Content:
        name = _FILES[inode - CONTROL_FILES].decode()
        value = self._render(name)
        if name == "problems" and isinstance(value, list):
            text = "".join(f"{line}\n" for line in value)
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
        before_ns = self._contents[inode].made_ns if inode in self._contents else 0
        made = _Content(text.encode("utf-8", "backslashreplace"), max(time.time_ns(), before_ns + 1))
        self._contents[inode] = made
        return made
