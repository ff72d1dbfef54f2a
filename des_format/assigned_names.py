"""Snowflake-style names, `DES_20251125_(BF785FEA0100_81)`: DES_V1.md, "Snowflake-style names".

    F, 48 bits   time field (32: the low wrap_bits of the Unix time in ms) | node id (8) | sequence (8)
    CC           sum of F's six bytes modulo 256

The functions are pure. The generator reads two clocks, both injected: the wall clock, which may step, and the monotonic
one, which may not.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache

from des_format.errors import InvalidAssignedName, NamesExhausted

SEQUENCES_PER_MS = 256
"""Names that one node has in one millisecond: the sequence has 8 bits."""

_NS_PER_MS = 1_000_000
_MS_PER_DAY = 86_400_000
_EPOCH = date(1970, 1, 1)
_PREFIX = re.compile(r"[A-Za-z0-9]+")
_NAME = re.compile(
    r"(?P<prefix>[A-Za-z0-9]+)_(?P<day>[0-9]{8})_\((?P<value>[0-9A-F]{12})_(?P<checksum>[0-9A-F]{2})\)"
    r"(?P<extension>(?:\.[^/\0]+)?)"
)


@dataclass(frozen=True, slots=True)
class AssignedName:
    """A parsed name. `time_field` is the low bits of the Unix time in ms; `extension` has its dot, or is empty."""

    prefix: str
    day: date
    time_field: int
    node_id: int
    sequence: int
    extension: str = ""


class InvalidNameConfig(InvalidAssignedName, ValueError):
    """No valid name can be built under these settings."""


@dataclass(frozen=True, slots=True)
class SnowflakeNameConfig:
    """What the names of one generator have in common. Generators that may run at the same time, on any machine, differ
    in prefix or node id. `wrap_bits` is how much of the Unix time in ms a name keeps: 32 bits are 49.7 days.

    Raises InvalidNameConfig for a value out of its range.
    """

    prefix: str = "DES"
    node_id: int = 0
    wrap_bits: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, str) or not _PREFIX.fullmatch(self.prefix):
            raise InvalidNameConfig(f"prefix: found {self.prefix!r}, want ASCII letters and digits, at least one")
        _check_range("node_id", self.node_id, 0, 0xFF)
        _check_range("wrap_bits", self.wrap_bits, 1, 32)


def _check_range(field: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise InvalidNameConfig(f"{field}: found {value!r}, want {least} to {most}")


def time_field_of(unix_ms: int, wrap_bits: int) -> int:
    """The part of the Unix time in ms that a name keeps."""
    return unix_ms & ((1 << wrap_bits) - 1)


def day_label(day: date | str) -> str:
    """A day as it stands in a name, `YYYYMMDD`; text may be that or `YYYY-MM-DD`. Raises InvalidAssignedName."""
    if isinstance(day, date):
        return f"{day.year:04d}{day.month:02d}{day.day:02d}"
    label = day.replace("-", "") if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", day) else day
    if not re.fullmatch(r"[0-9]{8}", label):
        raise InvalidAssignedName(f"day: found {day!r}, want YYYYMMDD or YYYY-MM-DD")
    try:
        _calendar_day(label)
    except ValueError as error:
        raise InvalidAssignedName(f"day: found {day!r}, want a date of the calendar ({error})") from error
    return label


@lru_cache(maxsize=256)
def _calendar_day(label: str) -> date:
    return date(int(label[:4]), int(label[4:6]), int(label[6:]))


def build_name(prefix: str, day: date, time_field: int, node_id: int, sequence: int, extension: str = "") -> str:
    """The name of these parts, as `parse_name` gives them. Raises InvalidAssignedName for a part out of its range."""
    _check_range("time_field", time_field, 0, 0xFFFFFFFF)
    _check_range("node_id", node_id, 0, 0xFF)
    _check_range("sequence", sequence, 0, 0xFF)
    name = _format(prefix, day_label(day), time_field << 16 | node_id << 8 | sequence) + extension
    if not _NAME.fullmatch(name):
        raise InvalidAssignedName(
            f"{name!r}: found prefix {prefix!r} and extension {extension!r}, want ASCII letters and digits, "
            "and a dot with at least one character or nothing"
        )
    return name


def _format(prefix: str, label: str, value: int) -> str:
    data = value.to_bytes(6, "big")
    return f"{prefix}_{label}_({data.hex().upper()}_{sum(data) & 0xFF:02X})"


def parse_name(text: str) -> AssignedName:
    """The parts of a Snowflake-style name, with or without extension.

    Raises InvalidAssignedName when the text has another shape, its day is not in the calendar, or its checksum does not
    hold.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise InvalidAssignedName(f"found {text!r}, want PREFIX_YYYYMMDD_(12 upper-case hex digits_2 more)[.extension]")
    prefix, label, digits, checksum, extension = match.groups()
    data = bytes.fromhex(digits)
    wanted = sum(data) & 0xFF
    if int(checksum, 16) != wanted:
        raise InvalidAssignedName(f"{text!r}: found checksum {checksum}, want {wanted:02X}")
    try:
        day = _calendar_day(label)
    except ValueError as error:
        raise InvalidAssignedName(f"{text!r}: found day {label}, want a date of the calendar ({error})") from error
    return AssignedName(prefix, day, int.from_bytes(data[:4], "big"), data[4], data[5], extension)


_BLOCK = 1024  # milliseconds that one page of exact counts, and one coarse mark, stand for
_BLOCK_NAMES = _BLOCK * SEQUENCES_PER_MS
_COARSE_PAGE = 64  # blocks: a day that is used in every second of 24 hours costs 330 KiB
_EXACT_BITS = 26  # 2^27 ms are longer than a day: with more bits the names of a day cannot be used up
_SCAN_MS = 4096  # how far ahead a free name is looked for before all of the day's are counted
_LEDGER_BUDGET = 64 << 20  # bytes; half of one day's exact counts at 26 bits, and months of coarse marks


class _DayLedger:
    """Which (time field, sequence) have been used under one day label. Sequences are used from 0 upwards.

    Fields below `2^_EXACT_BITS` are counted one by one when a generator's wrap_bits make them come round within a day.
    For the others a mark per block tells up to where, in the order (field, sequence), it may have been used: what lies
    before the mark is given up when the field comes round after 37 hours or more, which takes a label that is no day.
    """

    def __init__(self, first_ms: int) -> None:
        self.first_ms = first_ms
        self.last_ms = first_ms
        self.exact: dict[int, array[int]] = {}
        self.coarse: dict[int, array[int]] = {}
        self.spent: tuple[int, int] | None = None  # first and last ms of uses whose details were dropped
        self.exhausted: set[int] = set()  # wrap_bits
        self.grown = 0  # bytes that the shared state does not know of yet

    def next_sequence(self, ms: int, mask: int) -> int:
        """The first free sequence number of the time field of `ms`, or 256."""
        if self.spent is not None and (ms - self.spent[0]) & mask <= self.spent[1] - self.spent[0]:
            return SEQUENCES_PER_MS
        field = ms & mask
        counts = self.exact.get(field >> 10)
        used = 0 if counts is None else counts[field & 1023]
        marks = self.coarse.get(field >> 16)
        if marks is not None:
            marked = marks[field >> 10 & 63] - ((field & 1023) << 8)
            if marked > used:
                used = min(marked, SEQUENCES_PER_MS)
        return used

    def take(self, ms: int, mask: int, exact_fields: int) -> int:
        """The first free sequence number of the time field of `ms`, used from now on, or 256."""
        sequence = self.next_sequence(ms, mask)
        if sequence == SEQUENCES_PER_MS:
            return sequence
        field = ms & mask
        if field >= exact_fields:
            marks = self.coarse.get(field >> 16)
            if marks is None:
                marks = self.coarse[field >> 16] = array("I", bytes(4 * _COARSE_PAGE))
                self.grown += 4 * _COARSE_PAGE
            marks[field >> 10 & 63] = ((field & 1023) << 8) + sequence + 1
        else:
            counts = self.exact.get(field >> 10)
            if counts is None:
                counts = self.exact[field >> 10] = array("H", bytes(2 * _BLOCK))
                self.grown += 2 * _BLOCK
            counts[field & 1023] = sequence + 1
        if ms > self.last_ms:
            self.last_ms = ms
        return sequence

    def next_free_ms(self, ms: int, wrap_bits: int) -> int | None:
        """A millisecond after `ms` until which there is no free name, or None when there is none at all."""
        mask = (1 << wrap_bits) - 1
        for later_ms in range(ms + 1, ms + 1 + min(_SCAN_MS, mask + 1)):
            if self.next_sequence(later_ms, mask) < SEQUENCES_PER_MS:
                return later_ms
        if wrap_bits in self.exhausted or mask < _SCAN_MS or all(self._is_full(b, mask) for b in range(mask + 1 >> 10)):
            self.exhausted.add(wrap_bits)
            return None
        return ms + _SCAN_MS

    def _is_full(self, block: int, mask: int) -> bool:
        marks = self.coarse.get(block >> 6)
        if marks is not None and marks[block & 63] == _BLOCK_NAMES:
            return True
        counts = self.exact.get(block)
        if counts is not None and sum(counts) == _BLOCK_NAMES:
            return True
        if counts is None and marks is None and self.spent is None:
            return False
        start = block * _BLOCK
        return all(self.next_sequence(ms, mask) == SEQUENCES_PER_MS for ms in range(start, start + _BLOCK))

    def forget_details(self) -> int:
        """Give up all names between the first and the last use; the bytes that this frees."""
        freed = 2 * _BLOCK * len(self.exact) + 4 * _COARSE_PAGE * len(self.coarse)
        self.spent = (self.first_ms, self.last_ms)
        self.exact.clear()
        self.coarse.clear()
        return freed


class _SharedState:
    """What the live generators of one prefix and node id have in common. `lock` guards all of it.

    It goes with the last of them; the next generator starts in a later millisecond, as after a restart.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last_ms = 0
        self.exact_fields = 0
        self.ledgers: dict[str, _DayLedger] = {}
        self.ledger_bytes = 0

    def new_ledger(self, label: str, ms: int) -> _DayLedger:
        ledger = self.ledgers[label] = _DayLedger(ms)
        return ledger

    def count_growth(self, grown: _DayLedger) -> None:
        """Make the oldest days forget their details when all have grown too large."""
        self.ledger_bytes += grown.grown
        grown.grown = 0
        if self.ledger_bytes > _LEDGER_BUDGET:
            for label in sorted(self.ledgers)[:-2]:  # never the two latest days: around midnight both are in use
                if self.ledgers[label] is not grown:
                    self.ledger_bytes -= self.ledgers[label].forget_details()
                if self.ledger_bytes <= _LEDGER_BUDGET // 2:
                    break


_states: weakref.WeakValueDictionary[tuple[str, int], _SharedState] = weakref.WeakValueDictionary()
_states_lock = threading.Lock()


def _shared_state(config: SnowflakeNameConfig) -> _SharedState:
    with _states_lock:
        state = _states.setdefault((config.prefix, config.node_id), _SharedState())
    if config.wrap_bits <= _EXACT_BITS:
        with state.lock:
            state.exact_fields = max(state.exact_fields, 1 << config.wrap_bits)
    return state


class SnowflakeNameGenerator:
    """Names that never repeat. Any thread may call; a process needs one generator per prefix and node id.

    Its *logical time* is the wall clock's as long as that goes forward. When the wall clock steps back, the logical
    time goes on from where it was at the pace of the monotonic clock: an hour's step costs no hour's wait. Several live
    generators of one prefix and node id share what they have used, and their latest logical time. The first name is
    from a millisecond after the generator's creation, since a process that ended just before may have used that one.
    A forked process is another process: it needs a node id of its own.
    """

    def __init__(
        self,
        config: SnowflakeNameConfig | None = None,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.config = SnowflakeNameConfig() if config is None else config
        self._clock_ns = clock_ns
        self._monotonic_ns = monotonic_ns
        self._sleep = sleep
        self._mask = (1 << self.config.wrap_bits) - 1
        self._node_bits = self.config.node_id << 8
        self._shared = _shared_state(self.config)
        self._anchor_ns = clock_ns()
        self._anchor_monotonic_ns = monotonic_ns()
        self._created_ms = self._anchor_ns // _NS_PER_MS
        self._today = (-1, "")  # days since the epoch, and their label
        self._given_day: tuple[date | str | None, str] = (None, "")  # the last `day` argument and its label

    def next_name(self, day: date | str | None = None) -> str:
        """A name that was not given before, under the given day, or else the UTC day of the logical time.

        Waits when the names of the millisecond are used up, and, with few `wrap_bits`, when the time field has come
        round to one that is used up. Raises NamesExhausted when all of the day's are, InvalidAssignedName for a `day`
        that is none.
        """
        label = "" if day is None else self._label_of(day)
        shared, mask = self._shared, self._mask
        while True:
            with shared.lock:
                now_ns = self._logical_ns()
                ms = now_ns // _NS_PER_MS
                if ms > self._created_ms:
                    text = label or self._today_label(ms)
                    ledger = shared.ledgers.get(text) or shared.new_ledger(text, ms)
                    sequence = ledger.take(ms, mask, shared.exact_fields)
                    if ledger.grown:
                        shared.count_growth(ledger)
                    if sequence < SEQUENCES_PER_MS:
                        shared.last_ms = ms
                        break
                    until_ms = self._next_free_ms(ledger, ms, text)
                else:
                    until_ms = self._created_ms + 1
            self._sleep((until_ms * _NS_PER_MS - now_ns) / 1e9)
        return _format(self.config.prefix, text, (ms & mask) << 16 | self._node_bits | sequence)

    def _logical_ns(self) -> int:
        """Under the lock. Never less than in an earlier call of any generator that shares the state."""
        wall_ns = self._clock_ns()
        monotonic_ns = self._monotonic_ns()
        now_ns = self._anchor_ns + monotonic_ns - self._anchor_monotonic_ns
        last_ns = self._shared.last_ms * _NS_PER_MS
        if wall_ns <= now_ns >= last_ns:
            return now_ns
        self._anchor_ns = max(wall_ns, last_ns)
        self._anchor_monotonic_ns = monotonic_ns
        return self._anchor_ns

    def _next_free_ms(self, ledger: _DayLedger, ms: int, label: str) -> int:
        until_ms = ledger.next_free_ms(ms, self.config.wrap_bits)
        if until_ms is None:
            bits = self.config.wrap_bits
            raise NamesExhausted(
                f"day {label}: all {1 << bits + 8} names of prefix {self.config.prefix!r} and node id "
                f"{self.config.node_id} are used up, with wrap_bits={bits}; want more wrap_bits or another node id"
            )
        return until_ms

    def _today_label(self, ms: int) -> str:
        days = ms // _MS_PER_DAY
        known, label = self._today
        if known != days:
            label = day_label(_EPOCH + timedelta(days=days))
            self._today = (days, label)
        return label

    def _label_of(self, day: date | str) -> str:
        known, label = self._given_day
        if known != day:
            label = day_label(day)
            self._given_day = (day, label)
        return label
