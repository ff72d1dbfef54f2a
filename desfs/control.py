"""`/.desfs/`: a directory that is reachable by name and listed nowhere. Reading it never touches the store."""

from __future__ import annotations

import json
from collections.abc import Callable

from desfs.errors import NoSuchPath, StaleInode
from desfs.inode import CONTROL_DIRECTORY, CONTROL_FILES, InodeNumber

CONTROL_NAME = b".desfs"
_FILES = (b"stats", b"containers", b"problems", b"config")


class ControlDirectory:
    """The files' contents are made when their attributes are asked for, and read as they were then: the kernel asks
    before each open, since their attributes have no timeout. One thread."""

    def __init__(self, render: Callable[[str], object]) -> None:
        """`render` gives a file's value by its name: lines of text, or anything that is JSON."""
        self._render = render
        self._contents: dict[int, bytes] = {}

    def owns(self, inode: int) -> bool:
        """True for the directory and its files."""
        return CONTROL_DIRECTORY <= inode < CONTROL_FILES + len(_FILES)

    def lookup(self, name: bytes) -> InodeNumber:
        """The inode of a file. Raises: NoSuchPath."""
        if name not in _FILES:
            raise NoSuchPath(f"no control file {name.decode('utf-8', 'backslashreplace')!r}")
        return InodeNumber(CONTROL_FILES + _FILES.index(name))

    def files(self) -> list[tuple[bytes, InodeNumber]]:
        """The files of the directory."""
        return [(name, InodeNumber(CONTROL_FILES + place)) for place, name in enumerate(_FILES)]

    def render(self, inode: int) -> bytes:
        """Make a file's content anew."""
        name = _FILES[inode - CONTROL_FILES].decode()
        value = self._render(name)
        if name == "problems" and isinstance(value, list):
            text = "".join(f"{line}\n" for line in value)
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
        content = self._contents[inode] = text.encode("utf-8", "backslashreplace")
        return content

    def read(self, inode: int) -> bytes:
        """The content as it was last made. Raises: StaleInode for the directory."""
        if inode == CONTROL_DIRECTORY:
            raise StaleInode("the control directory has no bytes")
        return self._contents.get(inode) or self.render(inode)
