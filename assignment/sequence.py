"""Ids handed out in blocks: (state, now_ms, count) -> (state, ids). Pure.

A *position* is `unix_ms * 256 + sequence`: the order in which ids of one node are given out. The state is the first
position that is still free. It only grows, so whoever saves the new state before using the ids never repeats one, also
when the clock steps back: the ids then go on from the saved state, up to a day's clock change ahead of the clock.

A state belongs to one node id and one day, the two other parts of a name. A clock that was wrong for a while (50 days
ahead, say) thus leaves no trace once it is right again, and the 32 bits of a time field cannot come round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date

from assignment.errors import InvalidRequest
from des_format.assigned_names import SEQUENCES_PER_MS, build_name, time_field_of


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What is to be saved: the millisecond of the last id, and the next sequence number within it (256: none left)."""

    last_ms: int
    next_sequence: int

    @property
    def position(self) -> int:
        return self.last_ms * SEQUENCES_PER_MS + self.next_sequence


@dataclass(frozen=True, slots=True)
class IdBlock:
    """`count` ids of one node and day that belong to the caller alone, in consecutive positions from the first."""

    node_id: int
    day: date
    first_ms: int
    first_sequence: int
    count: int

    def names(self, prefix: str, *, wrap_bits: int = 32) -> Iterator[str]:
        """The ids as Snowflake-style names, in order. Raises InvalidAssignedName for a bad prefix or node id."""
        first = self.first_ms * SEQUENCES_PER_MS + self.first_sequence
        for position in range(first, first + self.count):
            unix_ms, sequence = divmod(position, SEQUENCES_PER_MS)
            yield build_name(prefix, self.day, time_field_of(unix_ms, wrap_bits), self.node_id, sequence)


def reserve(
    state: SequenceState | None, *, node_id: int, day: date, now_ms: int, count: int
) -> tuple[SequenceState, IdBlock]:
    """The next `count` (> 0) ids after `state` (None: the day's first), none of them earlier than `now_ms`.

    Returns the state to save before any of the ids is used. Raises InvalidRequest for a `count` below one.
    """
    if count < 1:
        raise InvalidRequest(f"ids to reserve: found {count}, want at least 1")
    start = max(now_ms, 0) * SEQUENCES_PER_MS
    if state is not None:
        start = max(start, state.position)
    last_ms, last_sequence = divmod(start + count - 1, SEQUENCES_PER_MS)
    first_ms, first_sequence = divmod(start, SEQUENCES_PER_MS)
    return SequenceState(last_ms, last_sequence + 1), IdBlock(node_id, day, first_ms, first_sequence, count)
