"""DES_V1.md, "Snowflake-style names": the shape, and that a generator never repeats one."""

from __future__ import annotations

import threading
import time
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format import assigned_names
from des_format.assigned_names import (
    AssignedName,
    SnowflakeNameConfig,
    SnowflakeNameGenerator,
    build_name,
    day_label,
    parse_name,
    time_field_of,
)
from des_format.errors import DesFormatError, InvalidAssignedName, NamesExhausted

EXAMPLE = "DES_20251125_(BF785FEA0100_81)"
NOON_MS = 1_764_072_000_000  # 2025-11-25 12:00 UTC


class Clocks:
    """A wall clock that may be set, a monotonic one, and a sleep that only moves them on."""

    def __init__(self, now_ms: int = NOON_MS) -> None:
        self.wall_ns = now_ms * 1_000_000
        self.monotonic = 0
        self.slept_s = 0.0

    def clock_ns(self) -> int:
        return self.wall_ns

    def monotonic_ns(self) -> int:
        return self.monotonic

    def pass_ms(self, ms: float) -> None:
        self.wall_ns += round(ms * 1_000_000)
        self.monotonic += round(ms * 1_000_000)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept_s += seconds
        self.pass_ms(seconds * 1000)

    def generator(self, **config: int) -> SnowflakeNameGenerator:
        return SnowflakeNameGenerator(
            SnowflakeNameConfig(prefix="T", **config),
            clock_ns=self.clock_ns,
            monotonic_ns=self.monotonic_ns,
            sleep=self.sleep,
        )


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_the_documented_example_parses() -> None:
    assert parse_name(EXAMPLE) == AssignedName("DES", date(2025, 11, 25), 0xBF785FEA, 1, 0, "")
    assert build_name("DES", date(2025, 11, 25), 0xBF785FEA, 1, 0) == EXAMPLE


@given(
    st.builds(
        AssignedName,
        prefix=st.text("abzAZ09", min_size=1, max_size=8),
        day=st.dates(),
        time_field=st.integers(0, 2**32 - 1),
        node_id=st.integers(0, 255),
        sequence=st.integers(0, 255),
        extension=st.one_of(
            st.just(""),
            st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1).map(
                ".".__add__
            ),
        ),
    )
)
def test_what_is_built_parses_back(name: AssignedName) -> None:
    text = build_name(name.prefix, name.day, name.time_field, name.node_id, name.sequence, name.extension)
    assert parse_name(text) == name


@given(st.integers(0, len(EXAMPLE) - 1), st.characters(codec="utf-8"))
def test_no_single_changed_digit_of_the_value_or_checksum_goes_unnoticed(position: int, character: str) -> None:
    changed = EXAMPLE[:position] + character + EXAMPLE[position + 1 :]
    if changed == EXAMPLE or position < len("DES_20251125_("):
        return
    with pytest.raises(InvalidAssignedName):
        parse_name(changed)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "want PREFIX"),
        ("photo.jpg", "found 'photo.jpg'"),
        ("_20251125_(BF785FEA0100_81)", "want PREFIX"),
        ("DÉS_20251125_(BF785FEA0100_81)", "want PREFIX"),
        ("DES_20251125_(bf785fea0100_81)", "want PREFIX"),
        ("DES_٢0251125_(BF785FEA0100_81)", "want PREFIX"),
        ("DES_20251125_(BF785FEA0100_81", "want PREFIX"),
        ("DES_20251125_(BF785FEA0100_81)\n", "want PREFIX"),
        ("DES_20251125_(BF785FEA0100_81).", "want PREFIX"),
        ("DES_20251125_(BF785FEA0100_81)jpg", "want PREFIX"),
        ("DES_20251125_(BF785FEA0100_81).a/b", "want PREFIX"),
        ("a/DES_20251125_(BF785FEA0100_81)", "want PREFIX"),
        ("DES_20251125_(BF785FEA0100_82)", "found checksum 82, want 81"),
        ("DES_20251325_(BF785FEA0100_81)", "found day 20251325"),
        ("DES_00000101_(BF785FEA0100_81)", "found day 00000101"),
    ],
)
def test_what_is_no_name_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidAssignedName) as caught:
        parse_name(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize("bad", [{"prefix": ""}, {"prefix": "D_S"}, {"node_id": 256}, {"node_id": -1},
                                 {"wrap_bits": 0}, {"wrap_bits": 33}])  # fmt: skip
def test_a_config_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(DesFormatError, match=next(iter(bad))):
        SnowflakeNameConfig(**bad)


@pytest.mark.parametrize("bad", ["2025112", "2025-1-1", "20251301", "today", "2025-11-25T00", "٢٠٢٥١١٢٥"])
def test_a_day_that_is_none_is_refused(bad: str, clocks: Clocks) -> None:
    with pytest.raises(InvalidAssignedName):
        clocks.generator().next_name(bad)


def test_a_day_may_be_given_in_three_ways() -> None:
    assert {day_label("20240229"), day_label("2024-02-29"), day_label(date(2024, 2, 29))} == {"20240229"}


def test_a_build_of_parts_out_of_range_is_refused() -> None:
    day = date(2025, 1, 1)
    for parts in [("A", day, 2**32, 0, 0), ("A", day, 0, 256, 0), ("A", day, 0, 0, 256), ("A_", day, 0, 0, 0)]:
        with pytest.raises(InvalidAssignedName):
            build_name(*parts)
    with pytest.raises(InvalidAssignedName):
        build_name("A", day, 0, 0, 0, "jpg")


def test_the_parts_of_a_new_name(clocks: Clocks) -> None:
    generator = clocks.generator(node_id=7)
    clocks.pass_ms(5)
    name = parse_name(generator.next_name())
    assert name == AssignedName("T", date(2025, 11, 25), time_field_of(NOON_MS + 5, 32), 7, 0)
    assert parse_name(generator.next_name("20200101")).day == date(2020, 1, 1)


def test_the_257th_name_waits_for_the_next_millisecond(clocks: Clocks) -> None:
    generator = clocks.generator()
    clocks.pass_ms(1.25)
    names = [parse_name(generator.next_name()) for _ in range(256)]
    assert clocks.slept_s == 0
    assert [name.sequence for name in names] == list(range(256))
    assert parse_name(generator.next_name()).time_field == names[0].time_field + 1
    assert clocks.slept_s == pytest.approx(0.00075)


def test_after_a_step_back_of_an_hour_names_go_on_at_once_and_do_not_repeat(clocks: Clocks) -> None:
    generator = clocks.generator()
    before = [generator.next_name() for _ in range(300)]
    slept_s = clocks.slept_s
    clocks.wall_ns -= 3_600_000_000_000
    after = [generator.next_name() for _ in range(3000)]
    assert len({*before, *after}) == 3300
    assert clocks.slept_s - slept_s < 0.020
    fields = [parse_name(name).time_field for name in before + after]
    assert fields == sorted(fields)


def test_a_step_forward_is_followed(clocks: Clocks) -> None:
    generator = clocks.generator()
    generator.next_name()
    clocks.wall_ns += 86_400_000_000_000
    assert parse_name(generator.next_name()).day == date(2025, 11, 26)


def test_a_restart_within_the_millisecond_does_not_repeat(clocks: Clocks) -> None:
    names: list[str] = []
    for _ in range(20):
        generator = clocks.generator()
        names += [generator.next_name() for _ in range(3)]
        del generator
    assert len(set(names)) == 60


@given(st.lists(st.tuples(st.sampled_from([3, 4, 5, 32]), st.integers(-3, 3)), max_size=60))
def test_live_generators_of_one_node_never_repeat_each_other_whatever_their_wrap_bits(
    steps: list[tuple[int, int]],
) -> None:
    clocks = Clocks(now_ms=2**32 * 410 + 5)  # where 32 bits have few ones, and can be mistaken for fewer bits
    generators = {bits: clocks.generator(wrap_bits=bits) for bits in (3, 4, 5, 32)}
    names: list[str] = []
    for bits, step_ms in steps:
        clocks.wall_ns += step_ms * 1_000_000
        names += [generators[bits].next_name("20251125") for _ in range(20)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("wrap_bits", [1, 2, 5, 10])
def test_a_day_has_exactly_its_names_and_then_says_so(wrap_bits: int, clocks: Clocks) -> None:
    generator = clocks.generator(wrap_bits=wrap_bits)
    names = {generator.next_name("20251125") for _ in range(2 ** (wrap_bits + 8))}
    assert len(names) == 2 ** (wrap_bits + 8)
    with pytest.raises(NamesExhausted, match="20251125"):
        generator.next_name("20251125")
    assert parse_name(generator.next_name("20251126")).day == date(2025, 11, 26)


def test_names_of_a_sparsely_used_day_run_out_exactly_as_well(clocks: Clocks) -> None:
    """Few names per round of the time field: what is left of each millisecond is found in later rounds."""
    generator = clocks.generator(wrap_bits=2)
    names = set()
    for turn in range(1024):
        clocks.pass_ms(turn % 7 * 0.6)
        names.add(generator.next_name("20251125"))
    assert len(names) == 1024
    with pytest.raises(NamesExhausted):
        generator.next_name("20251125")


def test_the_time_field_that_comes_round_is_waited_for(clocks: Clocks) -> None:
    generator = clocks.generator(wrap_bits=10)
    clocks.pass_ms(1)
    first = [generator.next_name("20251125") for _ in range(256)]
    clocks.pass_ms(1024)
    later = generator.next_name("20251125")
    assert later not in first
    assert parse_name(later).time_field == parse_name(first[0]).time_field + 1
    other_day = generator.next_name("20251126")
    assert parse_name(other_day).sequence == 0


@pytest.mark.parametrize("wrap_bits", [26, 27, 32])
def test_a_label_that_outlives_the_time_field_does_not_repeat(wrap_bits: int, clocks: Clocks) -> None:
    generator = clocks.generator(wrap_bits=wrap_bits)
    names = []
    for _ in range(3):
        names += [generator.next_name("20251125") for _ in range(400)]
        clocks.pass_ms(2**wrap_bits - 2)
    assert len(set(names)) == len(names)


def test_exhaustion_is_noticed_beyond_the_milliseconds_that_are_looked_ahead(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assigned_names, "_SCAN_MS", 16)
    generator = clocks.generator(wrap_bits=11)
    ledger = assigned_names._DayLedger(NOON_MS)
    for ms in range(2**11):
        for _ in range(256):
            ledger.take(NOON_MS + ms, 2**11 - 1, 2**11)
    ledger.exact[1][0] -= 1
    generator._shared.ledgers["20251125"] = ledger
    assert parse_name(generator.next_name("20251125")).sequence == 255
    with pytest.raises(NamesExhausted):
        generator.next_name("20251125")
    with pytest.raises(NamesExhausted):
        generator.next_name("20251125")


def test_old_days_are_kept_in_little_memory_and_still_not_repeated(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assigned_names, "_LEDGER_BUDGET", 8 * 1024)
    generator = clocks.generator(wrap_bits=12)
    names = []
    for round_ in range(2):
        for number in range(1, 29):
            names += [generator.next_name(f"202501{number:02}") for _ in range(10)]
            clocks.pass_ms(3)
        assert len(set(names)) == 280 * (round_ + 1)
    assert generator._shared.ledger_bytes == 2048 * sum(len(day.exact) for day in generator._shared.ledgers.values())
    assert generator._shared.ledger_bytes <= 8 * 1024
    used = parse_name(names[0]).time_field
    now = parse_name(names[-1]).time_field
    clocks.pass_ms((used - now - 2) % 2**12)  # the time field comes round to what the forgotten day has used
    names += [generator.next_name("20250101") for _ in range(256 * 100)]
    assert len(set(names)) == 560 + 256 * 100


def test_a_generator_of_fewer_wrap_bits_that_comes_later_does_not_repeat_a_live_one() -> None:
    clocks = Clocks(now_ms=2**32 * 410 + 5)
    early = clocks.generator(wrap_bits=32)
    names = [early.next_name("20251125") for _ in range(1000)]
    late = clocks.generator(wrap_bits=4)
    with pytest.raises(NamesExhausted):
        names.extend(late.next_name("20251125") for _ in range(2**12 + 1))
    assert len(names) == len(set(names)) <= 1000 + 2**12


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-2_000_000, 2_000_000), st.integers(0, 3000), st.integers(1, 400)), max_size=12))
def test_no_history_of_clock_steps_repeats_a_name_or_goes_back(history: list[tuple[int, int, int]]) -> None:
    clocks = Clocks()
    generator = clocks.generator()
    last_ms, seen = 0, set()
    for step_ms, pass_us, count in history:
        clocks.wall_ns += step_ms * 1_000_000
        clocks.pass_ms(pass_us / 1000)
        for _ in range(count):
            name = generator.next_name("20251125")
            assert name not in seen
            seen.add(name)
            ms = parse_name(name).time_field
            assert ms >= last_ms
            last_ms = ms


def test_a_million_names_of_16_threads_and_4_generators_while_the_clock_steps_back() -> None:
    """No repeat, also when the clock steps back; every name parses and its checksum holds."""
    start_ns, step_ns, hour_ns = time.monotonic_ns(), 200_000_000, 3_600_000_000_000

    def clock_ns() -> int:  # goes back by an hour every 0.2 s, and a day ahead after 1.6 s
        steps = (time.monotonic_ns() - start_ns) // step_ns
        return time.time_ns() - steps % 8 * hour_ns + steps // 8 * 24 * hour_ns

    generators = [
        SnowflakeNameGenerator(SnowflakeNameConfig(node_id=node_id), clock_ns=clock_ns) for node_id in range(4)
    ]
    results: list[list[str]] = [[] for _ in range(16)]

    def work(worker: int) -> None:
        next_name = generators[worker % 4].next_name
        results[worker] = [next_name() for _ in range(62_500)]

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({name for names in results for name in names}) == 1_000_000
    for worker, names in enumerate(results):
        for name in names:
            assert parse_name(name).node_id == worker % 4
