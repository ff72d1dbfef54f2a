"""Pieces of containers in memory, by what is in them. Trio thread only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from desfs import metrics

# number of the container; SMALL, META, or the row of a large payload; block, first byte of META, or unit of the payload
Key = tuple[int, int, int]
SMALL = -2
META = -1


@dataclass(eq=False, slots=True)
class Piece:
    """Verified bytes [start, start + len(data)) of a container or of an object beside it: blocks [first, last) of a
    container (its number) and `kind`. `bad` are the rows in it that did not match their checksum; `version` is the ETag
    of an object beside it."""

    container: int
    kind: int
    first: int
    last: int
    start: int
    data: bytes | memoryview
    bad: frozenset[int] = frozenset()
    version: str | None = None

    def places(self) -> Iterable[Key]:
        """The keys of what is in it."""
        return ((self.container, self.kind, place) for place in range(self.first, self.last))


class PieceCache:
    """Pieces by what is in them, least recently used first to go; bounded in bytes. Trio thread only, no locks."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: OrderedDict[int, Piece] = OrderedDict()  # by id()
        self._holders: dict[Key, Piece] = {}
        self._of_container: dict[int, int] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, key: Key) -> bool:
        return key in self._holders

    def get(self, key: Key) -> Piece | None:
        """The piece with that block, which counts as used now."""
        piece = self._holders.get(key)
        if piece is not None:
            self._pieces.move_to_end(id(piece))
        return piece

    def bytes_of(self, container: int) -> int:
        """Bytes held of the small payloads of a container."""
        return self._of_container.get(container, 0)

    def resize(self, max_bytes: int) -> None:
        """Hold so much at most from now on."""
        self._max_bytes = max_bytes
        self._make_room()

    def put(self, piece: Piece) -> None:
        """Keep a piece; older ones make room. One that is larger than the whole cache is not kept."""
        size = len(piece.data)
        if size > self._max_bytes:
            return
        for key in piece.places():
            before = self._holders.get(key)
            self._holders[key] = piece  # of two pieces with a block the newer one
            if (
                before is not None
                and before is not piece
                and not any(self._holders.get(each) is before for each in before.places())
            ):
                self._pieces.pop(id(before))
                self._count(before, -len(before.data))
        self._pieces[id(piece)] = piece
        self._count(piece, size)
        self._make_room()

    def discard(self, key: Key) -> None:
        """Forget the piece with that block, if there is one."""
        piece = self._holders.get(key)
        if piece is not None:
            del self._pieces[id(piece)]
            self._forget(piece)

    def drop(self, container: int, kind: int) -> None:
        """Forget all pieces of a kind of a container."""
        # Not by the keys that there could be: a container may claim 2^40 units for a payload.
        for piece in [each for each in self._pieces.values() if (each.container, each.kind) == (container, kind)]:
            del self._pieces[id(piece)]
            self._forget(piece)

    def _make_room(self) -> None:
        while self.bytes > self._max_bytes:
            _, oldest = self._pieces.popitem(last=False)
            metrics.CACHE_EVICTED.labels("memory").inc(len(oldest.data))
            self._forget(oldest)

    def _count(self, piece: Piece, size: int) -> None:
        self.bytes += size
        if piece.kind == SMALL:
            held = self._of_container.pop(piece.container, 0) + size
            if held:
                self._of_container[piece.container] = held

    def _forget(self, piece: Piece) -> None:
        self._count(piece, -len(piece.data))
        for key in piece.places():
            if self._holders.get(key) is piece:
                del self._holders[key]
