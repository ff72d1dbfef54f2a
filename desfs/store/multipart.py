"""How an object is cut into the parts of an upload, by S3's rules. Pure.

A part has 5 MiB to 5 GiB, the last one as little as it likes, and there are at most 10,000 of them:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from desfs.store.base import CopyRange

MIB = 1 << 20
MIN_PART = 5 * MIB
MAX_PARTS = 10_000
# Up to here an object goes in one request.
MULTIPART_THRESHOLD = 64 * MIB
# A part that is sent: small enough to be sent again without regret, large enough that its round trip does not matter.
PART = 16 * MIB
# A part that the server copies: it answers when it has copied, which has to be within the read time-out.
COPY_PART = 256 * MIB

Piece = bytes | CopyRange


def length_of(piece: Piece) -> int:
    """Bytes of a piece."""
    return len(piece) if isinstance(piece, bytes) else piece.stop - piece.start


def part_size(size: int) -> int:
    """Bytes of each part, but for the last, of a source of that size: a multiple of 1 MiB."""
    return max(PART, -(-size // (MAX_PARTS * MIB)) * MIB)


def plan_parts(
    pieces: Sequence[Piece],
    *,
    min_part: int = MIN_PART,
    part: int = PART,
    copy_part: int = COPY_PART,
    max_parts: int = MAX_PARTS,
) -> list[list[Piece]]:
    """The parts of an upload that makes an object of `pieces`: in order, every byte once, none empty.

    A part of one CopyRange is copied by the server; the pieces of any other are put together and sent. Every part but
    the last has at least `min_part` bytes. Copies that are too small to be parts are sent together with what stands
    beside them; where that is not enough, the beginning of the following copy is sent too.
    """
    total = sum(map(length_of, pieces))
    # Every part but the last is at least this long, so there are no more than `max_parts` of them.
    smallest = max(min_part, -(-total // (max_parts - 1)))
    part = max(part, smallest)
    copy_part = max(copy_part, 2 * smallest)
    parts: list[list[Piece]] = []
    waiting: list[Piece] = []  # the part that is being put together; shorter than `part`
    waits = 0

    def flush() -> None:
        nonlocal waiting, waits
        if waiting:
            parts.append(waiting)
        waiting, waits = [], 0

    for piece in _joined(pieces):
        rest = piece
        if isinstance(rest, CopyRange) and length_of(rest) >= smallest:
            if waits:
                head, tail = _cut(rest, max(0, smallest - waits))
                waiting += head
                flush()
                if not tail:
                    continue
                rest = tail[0]
            if isinstance(rest, CopyRange) and length_of(rest) >= smallest:
                parts += [[copied] for copied in _evenly(rest, copy_part)]
                continue
        while length_of(rest) > 0:
            head, tail = _cut(rest, part - waits)
            waiting += head
            waits += sum(map(length_of, head))
            if waits >= part:
                flush()
            if not tail:
                break
            rest = tail[0]
    flush()
    return parts


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces without empty ones, and with ranges that continue each other as one."""
    joined: list[Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else b""
        if length_of(piece) == 0:
            continue
        if (
            isinstance(piece, CopyRange)
            and isinstance(before, CopyRange)
            and (before.key, before.etag, before.stop) == (piece.key, piece.etag, piece.start)
        ):
            joined[-1] = replace(before, stop=piece.stop)
        else:
            joined.append(piece)
    return joined


def _cut(piece: Piece, at: int) -> tuple[list[Piece], list[Piece]]:
    """What is before and what is after byte `at` of the piece; nothing instead of an empty piece."""
    if at <= 0:
        return [], [piece]
    if at >= length_of(piece):
        return [piece], []
    if isinstance(piece, bytes):
        return [piece[:at]], [piece[at:]]
    return [replace(piece, stop=piece.start + at)], [replace(piece, start=piece.start + at)]


def _evenly(piece: CopyRange, longest: int) -> list[CopyRange]:
    """The range in as few pieces as possible, none longer than `longest`, all within a byte of the same length."""
    length = length_of(piece)
    count = -(-length // longest)
    cuts = [piece.start + length * n // count for n in range(count + 1)]
    return [replace(piece, start=start, stop=stop) for start, stop in itertools.pairwise(cuts)]
