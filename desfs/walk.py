"""In which order the directories of a day are walked by the programs that walk them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Protocol


class Order(Enum):
    """How a program goes through the names of a directory."""

    LISTED = "as listed"  # tar, find, grep -r
    INODE = "by inode"  # cp -r
    NAME = "by name"  # rsync, ls -R, most backup programs


class Folders(Protocol):
    """The directories of a day; b"" is the day itself."""

    def subfolders(self, path: bytes) -> list[bytes]:
        """The names of the directories in one, in the order of a listing."""
        ...

    def has_files(self, path: bytes) -> bool:
        """Whether a file stands directly in it."""
        ...


def following(
    folders: Folders, path: bytes, order: Order, inode: Callable[[bytes], int], *, top: bytes = b""
) -> Iterator[bytes]:
    """The directories with files in them that a walk of `top` reads after those directly in `path`, to its end.

    `inode` gives a directory's number. Who goes by listing meets a directory's subdirectories before its files, the
    others after them: that is how desfs lists and numbers them. Lazy: nobody asks for more than the next few.
    """

    if order is not Order.LISTED:
        for each in _inner(folders, path, order, inode):
            yield from entered(folders, each, order, inode)
    while path != top:
        parent = path.rpartition(b"/")[0]
        siblings = _inner(folders, parent, order, inode)
        if path in siblings:
            for each in siblings[siblings.index(path) + 1 :]:
                yield from entered(folders, each, order, inode)
        if order is Order.LISTED and folders.has_files(parent):
            yield parent
        path = parent


def entered(folders: Folders, top: bytes, order: Order, inode: Callable[[bytes], int]) -> Iterator[bytes]:
    """The directories with files in them that a walk of `top` reads, from its beginning."""
    stack: list[tuple[bytes, bool]] = [(top, False)]  # names may be deeper than Python's own
    while stack:
        at, seen = stack.pop()
        if seen:
            if folders.has_files(at):
                yield at
            continue
        below = [(each, False) for each in reversed(_inner(folders, at, order, inode))]
        if order is Order.LISTED:
            stack.append((at, True))
            stack += below
        else:
            stack += below
            stack.append((at, True))


def _inner(folders: Folders, parent: bytes, order: Order, inode: Callable[[bytes], int]) -> list[bytes]:
    paths = [parent + b"/" + name if parent else name for name in folders.subfolders(parent)]
    if order is Order.INODE:
        paths.sort(key=inode)
    elif order is Order.NAME:
        paths.sort()
    return paths
