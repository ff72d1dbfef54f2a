"""What `desfs status` makes of what it has read: rates between two looks, lines, and how they fit a terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from desfs.cli.exits import EXIT_USAGE
from desfs.cli.status import run
from desfs.cli.status_lines import Report, day_table, mount_lines, spool_lines, store_lines
from desfs.cli.status_show import Cut, as_table
from desfs.cli.status_words import with_seconds
from desfs.settings import PackerSettings
from desfs.status import (
    MountStatus,
    NotServed,
    SpoolStatus,
    StoreStatus,
    build_mount_status,
    build_store_status,
    expected_wait_s,
    mount_since,
    since,
    spool_since,
    store_since,
)
from desfs.status.durations import format_duration
from desfs.status.locks import Locks, lock_holders
from desfs.store import ObjectInfo

STATS: dict[str, Any] = {
    "source": "file:///x",
    "uptime_seconds": 10.0,
    "open_containers": {"bytes": 5, "files": 6},
    "days": {"b": {"files": None}, "a": {"files": 2}},
    "caches": {"disk": None, "redis": True},
    "link": {"latency_s": 0.1, "bandwidth": 5.0},
    "levers": {"in_force": True},
    "requests": {"open": 3, "oldest_seconds": 1.5},
    "metrics": {
        "desfs_fuse_requests_total.read.OK": 5.0,
        "desfs_fuse_requests_total.read.EIO": 2.0,
        "desfs_fuse_requests_total.lookup.ENOENT": 9.0,
        "desfs_store_requests_total.get.206": 7.0,
        "desfs_store_requests_total.get.503": 1.0,
        "desfs_store_requests_total.list.ConnectTimeoutError": 1.0,
        "desfs_store_retries_total.get": 1.0,
        "desfs_store_bytes_total.received": 120.0,
        "desfs_read_bytes_total.read": 50.0,
        "desfs_read_bytes_total.pushed": 30.0,
        "desfs_cache_requests_total.memory.block.hit": 3.0,
        "desfs_cache_requests_total.memory.block.miss": 1.0,
        "desfs_cache_requests_total.disk.index.hit": 8.0,
        "desfs_cache_requests_total.redis.tail.hit": 4.0,
        "desfs_pages_pushed_total.stored": 3.0,
        "desfs_pages_pushed_total.dropped": 2.0,
    },
}


def mount(*problems: str, deadline_s: float = 60.0, **changes: Any) -> MountStatus:
    return build_mount_status("/mnt", STATS | changes, list(problems), deadline_s=deadline_s, now_s=1000.0)


def spool(**changes: Any) -> SpoolStatus:
    quiet: dict[str, Any] = {
        "place": "/srv/spool",
        "waiting": {"files": 1200, "bytes": 5 << 20, "oldest_seconds": 31.0, "oldest_file": "photos/a.jpg"},
        "temporary": 2,
        "claimed": {"files": 10, "bytes": 1 << 10, "batches": 1, "oldest_seconds": 2.0},
        "overdue": {"expected_seconds": 100.0, "waiting": 0, "claimed": 0},
        "rejected": {"count": 0, "first": []},
        "packers": [{"number": "0a1b2c00", "running": True, "pid": 123, "batches": 1}],
        "packer": {"running": True, "pid": 123},
        "warnings": [],
        "looked_at": 1000.0,
    }
    return SpoolStatus(**quiet | changes)


def store(objects: int = 1, *, size: int = 10, now_s: float = 1000.0) -> StoreStatus:
    infos = [ObjectInfo(f"2026-11-20/{shard:02x}.des", size, "etag", 10**18) for shard in range(objects)]
    return build_store_status("s3://bucket/", infos, None, None, now_s=now_s)


def shown(lines: list[Any]) -> str:
    """What people read."""
    return "\n".join(f"{line.name} {line.text}" for line in lines)


# --- records -----------------------------------------------------------------------------------------------------


def test_statistics_are_summed_up_by_their_labels() -> None:
    found = mount(*(f"problem {number}" for number in range(50)))
    assert found.days == {"a": 2, "b": None}
    assert found.kernel_requests == {"lookup": 9, "read": 7}
    assert found.kernel_errors == {"EIO": 2}
    assert found.store_requests == {"get": 8, "list": 1}
    assert (found.store_failures, found.store_retries) == (2, 1)
    assert found.bytes == {"received": 120, "sent": 0, "read": 50, "pushed": 30}
    assert found.caches == {"memory": {"hits": 3, "misses": 1}, "redis": {"hits": 4, "misses": 0}}
    assert found.prefetch == {"pushed": 3, "pushed_in_vain": 2, "containers_bought": 0}
    assert found.problems["count"] == 50
    assert found.problems["first"][0] == "problem 0"
    assert len(found.problems["first"]) == 10
    assert found.requests == {"open": 3, "oldest_seconds": 1.5}
    assert mount(requests=None).requests is None
    with_disk = mount(caches={"disk": {"bytes": 1, "max_bytes": 2, "folder": "/c", "fault": None}, "redis": False})
    assert with_disk.caches == {
        "memory": {"hits": 3, "misses": 1},
        "disk_blocks": {"hits": 0, "misses": 0},
        "disk_indexes": {"hits": 8, "misses": 0},
    }


def test_one_look_at_a_mount_has_averages_since_its_start() -> None:
    assert mount().rates == {
        "since": "start",
        "seconds": 10.0,
        "received": 12.0,
        "sent": 0.0,
        "read": 5.0,
        "pushed": 3.0,
        "kernel_requests": 1.6,
        "store_requests": 0.9,
        "hits": {"memory": 0.75, "redis": 1.0},
    }
    assert mount(uptime_seconds=0.0).rates["received"] == 0.0


def test_two_looks_at_a_mount_have_what_was_between_them() -> None:
    later = STATS["metrics"] | {
        "desfs_store_bytes_total.received": 220.0,
        "desfs_read_bytes_total.pushed": 130.0,
        "desfs_fuse_requests_total.read.OK": 25.0,
        "desfs_cache_requests_total.memory.block.miss": 4.0,
    }
    before = mount()
    found = mount_since(mount(metrics=later, uptime_seconds=12.0), before)
    assert found.rates == {
        "since": "look",
        "seconds": 2.0,
        "received": 50.0,
        "sent": 0.0,
        "read": 0.0,
        "pushed": 50.0,
        "kernel_requests": 10.0,
        "store_requests": 0.0,
        "hits": {"memory": 0.0, "redis": None},
    }
    text = shown(mount_lines(found))
    assert "rates between two looks, 2.0 s" in text
    assert "memory hits 0%; so far 3 of 7" in text
    assert "redis hits not asked; so far 4 of 4" in text


@pytest.mark.parametrize(
    "changes", [{"uptime_seconds": 3.0}, {"uptime_seconds": 11.0, "metrics": {}}], ids=["younger", "counts less"]
)
def test_another_daemon_begins_with_averages_again(changes: dict[str, Any]) -> None:
    found = mount(**changes)
    assert since(found, mount()) == found
    assert found.rates["since"] == "start"


def test_a_mount_warns_of_what_waits_too_long_and_of_a_cache_that_is_off() -> None:
    disk = {"bytes": 1, "max_bytes": 2, "folder": "/c", "fault": "No space left on device"}
    found = mount(requests={"open": 3, "oldest_seconds": 75.0}, caches={"disk": disk, "redis": False}, deadline_s=60.0)
    assert found.warnings == [
        "a request has been waiting for 75 s, longer than its deadline of 60 s",
        "the disk cache is off: No space left on device",
    ]
    bad = [line.text for line in mount_lines(found) if line.is_bad]
    assert bad == [*found.warnings, "2 (EIO 2)", "1 B of 2 B; off, in /c"]
    assert mount(requests={"open": 3, "oldest_seconds": 60.0}).warnings == []
    assert "oldest request none is without an answer" in shown(
        mount_lines(mount(requests={"open": 0, "oldest_seconds": 0.0}))
    )


def test_a_spool_says_how_what_waits_has_grown() -> None:
    before = spool()
    waiting = before.waiting | {"files": 1100, "bytes": 7 << 20}
    found = spool_since(spool(looked_at=1004.0, waiting=waiting), before)
    assert found.rates == {"seconds": 4.0, "files": -25.0, "bytes": 524288.0}
    assert "growth -25.0 files/s, +512.0 KiB/s between two looks, 4.0 s" in shown(spool_lines(found))
    assert spool_since(before, before).rates is None  # no time has passed
    assert "growth" not in shown(spool_lines(before))


def test_a_store_says_how_it_has_grown() -> None:
    found = store_since(store(5, now_s=1060.0), store(2))
    assert found.rates == {"seconds": 60.0, "containers": 0.05, "bytes": 0.5}
    assert "growth +3 containers, +0 B/s between two looks, 60 s" in shown(store_lines(found))
    assert store_since(store(now_s=900.0), store()).rates is None


def test_looks_at_different_places_are_not_compared() -> None:
    """And the first look has nothing to be compared with."""
    assert since(store(now_s=1060.0), spool()).rates is None
    assert since(store(now_s=1060.0), None).rates is None
    assert since(store(now_s=1060.0), store()) == store_since(store(now_s=1060.0), store())
    assert since(spool(looked_at=1060.0), spool()) == spool_since(spool(looked_at=1060.0), spool())


def test_a_file_is_expected_to_wait_as_long_as_its_packer_lets_it() -> None:
    """Until it is due, until somebody looks, and while a request of the batch before may be tried again."""
    assert expected_wait_s(PackerSettings()) == 30.0 + 10.0 + 60.0
    assert expected_wait_s(PackerSettings(settle=90.0, rescan_interval=5.0, deadline=1.0)) == 96.0


def test_packers_are_named_as_far_as_that_can_be_told() -> None:
    def packers(*running: bool | None, anybody: bool | None = True) -> str:
        each = [
            {"number": f"0a1b2c{number:02x}", "running": state, "pid": number + 1 if state else None, "batches": number}
            for number, state in enumerate(running)
        ]
        lines = spool_lines(spool(packers=each, packer={"running": anybody, "pid": None}))
        return shown([line for line in lines if line.name in ("packers", "")])

    assert packers(True, True) == "packers 2 at work: 0a1b2c00 (process 1), 0a1b2c01 (process 2, 1 batch)"
    assert packers(*[True] * 7).endswith("0a1b2c03 (process 4, 3 batches), and 3 more")
    assert packers(anybody=False) == "packers none at work"
    assert "\n 1 ended with batches left: 0a1b2c01 (1 batch)" in packers(True, False)
    unknown = packers(None, anybody=None).splitlines()
    assert unknown[0] == "packers cannot be told: they may be in other containers, or on other machines"
    assert unknown[1] == " 1 of which that cannot be told: 0a1b2c00"


# --- locks -------------------------------------------------------------------------------------------------------


def test_only_a_lock_on_that_very_file_counts() -> None:
    others = [
        "1: POSIX  ADVISORY  WRITE 11 fe:00:77 0 EOF",
        "2: FLOCK  ADVISORY  WRITE 12 ff:ff:77 0 EOF",
        "3: FLOCK  ADVISORY  WRITE 13 fe:00:771 0 EOF",
        "3: -> FLOCK  ADVISORY  WRITE 14 fe:00:77 0 EOF",
    ]
    assert lock_holders(others, "fe:00", 77) == []
    mine = ["4: FLOCK  ADVISORY  READ 15 fe:00:77 0 EOF", "5: FLOCK  ADVISORY  READ -1 fe:00:77 0 EOF"]
    assert lock_holders([*others, *mine], "fe:00", 77) == [15, 0]


def test_who_does_not_see_all_locks_says_nothing_of_those_he_does_not_see(tmp_path: Any) -> None:
    (tmp_path / "lock").touch()
    assert Locks([], has_all=True).holders(str(tmp_path / "lock")) == []
    assert Locks([], has_all=False).holders(str(tmp_path / "lock")) is None
    assert Locks(None, has_all=False).holders(str(tmp_path / "lock")) is None
    assert Locks([], has_all=False).holders(str(tmp_path / "gone")) == []
    # A file of another file system than those whose locks are all made here, such as NFS: /proc is one.
    assert Locks([], has_all=True).holders("/proc/version") is None


# --- words and times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["-w", "DIR"], ["-w", "", "DIR"]),
        (["DIR", "--watch"], ["DIR", "--watch", ""]),
        (["-w", "5", "DIR"], ["-w", "5", "DIR"]),
        (["--watch", ".5", "DIR"], ["--watch", ".5", "DIR"]),
        (["-w", "./5"], ["-w", "", "./5"]),
        (["-w", "--json", "DIR"], ["-w", "", "--json", "DIR"]),
        (["--watch=5", "DIR"], ["--watch=5", "DIR"]),
        (["--", "-w"], ["--", "-w"]),
        ([], []),
    ],
)
def test_watch_may_stand_without_its_seconds(words: list[str], wanted: list[str]) -> None:
    assert with_seconds(words) == wanted


@pytest.mark.parametrize("text", ["0", "-1", "0.01", "nan", "inf", "two"])
def test_seconds_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("/", {}, json=False, watch=text) == EXIT_USAGE
    assert capsys.readouterr().err.startswith(f"desfs: --watch: {text!r} is no number of seconds")


def test_durations_have_the_unit_that_people_would_take() -> None:
    seconds = (0.04, 9.96, 40.4, 300.0, 11520.0, 216_000.0)
    assert [format_duration(each) for each in seconds] == ["0.0 s", "10.0 s", "40 s", "5 min", "3.2 h", "2.5 days"]


# --- on a terminal -----------------------------------------------------------------------------------------------


def rendered(report: Report, width: int, **more: Any) -> str:
    """What a terminal of so many columns gets."""
    out = io.StringIO()
    # No variable of whoever runs the tests counts.
    console = Console(file=out, width=width, force_terminal=True, highlight=False, _environ={}, **more)
    console.print(as_table(report, width))
    return out.getvalue()


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


HUGE = 987_654_321
BUSY = build_mount_status(
    "/srv/archive/" + "deep/" * 20,
    STATS
    | {
        "source": "s3://bucket/" + "p" * 90,
        "uptime_seconds": 200_000.0,
        "days": {f"2026-{month:02}-{day:02}": {"files": HUGE} for month in range(1, 13) for day in range(1, 29)},
        "open_containers": {"bytes": 1 << 50, "files": HUGE},
        "caches": {
            "disk": {"bytes": 1 << 40, "max_bytes": 1 << 41, "folder": "/var/cache/" + "c" * 80, "fault": "[broken]"},
            "redis": True,
        },
        "requests": {"open": 12_345, "oldest_seconds": 4000.0},
        "levers": {"in_force": False, "why_not": "the kernel does not let us, and " * 4},
        "metrics": {
            name: float(HUGE * 1000 * (number + 1))
            for number, name in enumerate(
                [
                    *STATS["metrics"],
                    *(f"desfs_fuse_requests_total.{name}.OK" for name in ("getattr", "readdirplus", "open", "statfs")),
                    "desfs_cache_requests_total.disk.block.miss",
                ]
            )
        },
    },
    [f"2026-11-20/{number:02x}.des: a footer that is [none], at byte {HUGE}, and more words" for number in range(30)],
    deadline_s=60.0,
    now_s=1000.0,
)
FULL = spool(
    waiting={"files": HUGE, "bytes": 1 << 50, "oldest_seconds": 1e6, "oldest_file": "folder [x]/" * 20 + "é.jpg"},
    rejected={
        "count": 12,
        "first": [{"file": f"f{number}" * 30, "reason": "a socket", "folder": "/"} for number in range(10)],
    },
    warnings=["7 files have been waiting longer than expected (100 s), " + "name/" * 30 + " for 11.6 days"],
    packers=[{"number": f"0a1b2c{n:02x}", "running": True, "pid": 4_000_000 + n, "batches": 3} for n in range(40)],
    rates={"seconds": 2.0, "files": -12345.6, "bytes": -(1 << 30)},
)
LARGE = build_store_status(
    "s3://bucket/",
    [
        info
        for day in range(1, 29)
        for info in (
            ObjectInfo(f"2026-11-{day:02}/00.des", 10**15, "etag", 10**18),
            ObjectInfo(f"2026-11-{day:02}/_bigFiles/movie", 10**15, "etag", 10**18),
            ObjectInfo(f"other [{day}]" + "x" * 200 * (day == 10) + "/00-000001.des", 1, "etag", 10**18),
        )
    ],
    None,
    "a rule that this version does not know",
    now_s=1000.0,
)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("status", [BUSY, FULL, LARGE, mount(), spool(), store()], ids=lambda each: each.kind)
def test_a_terminal_gets_everything_and_no_line_is_too_long(
    status: MountStatus | SpoolStatus | StoreStatus, width: int
) -> None:
    """Whatever the numbers and names: what does not fit goes on in the next line, below where it began."""
    report = Report.of(status)
    lines = plain(rendered(report, width))
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    indent = max(len(line.name) for line in report.lines) + 2
    texts = "".join("".join(line[indent:] for line in lines).split())
    for line in report.lines:
        assert any(each.startswith(line.name) for each in lines)
        assert "".join(line.text.split()) in texts
    if report.store is LARGE:
        assert "\n".join(lines).count("x") == "".join(line.text for line in report.lines).count("x") + 200


def test_a_usual_mount_takes_a_terminal_of_80_columns_and_24_lines() -> None:
    """Each thing on a line of its own, and none wrapped."""
    report = Report.of(mount(caches={"disk": {"bytes": 1, "max_bytes": 2, "folder": "/c", "fault": None}, "redis": 1}))
    lines = plain(rendered(report, 80))
    assert len(lines) == len(report.lines) <= 23


def test_a_low_terminal_is_told_how_much_it_does_not_show() -> None:
    """What is wrong stands first, and the cursor has a line below."""
    out = io.StringIO()
    console = Console(file=out, width=80, height=12, force_terminal=True, _environ={})
    everything = plain(rendered(Report.of(BUSY), 80))
    console.print(Cut(as_table(Report.of(BUSY), 80)))
    lines = plain(out.getvalue())
    assert lines == [*everything[:10], f"… {len(everything) - 10} more; without --watch all are shown"]
    assert "problems         30, named below" in lines


def test_without_colour_the_same_words_stand_there() -> None:
    """https://no-color.org: colours go, what is wrong is still said in words."""
    report = Report.of(BUSY)
    colourful, colourless = rendered(report, 80), rendered(report, 80, no_color=True)
    assert plain(colourless) == plain(colourful)
    assert re.search(r"\x1b\[(?:\d+;)*3\d", colourful)
    assert not re.search(r"\x1b\[(?:\d+;)*[34]\d", colourless)
    assert any(line.startswith("warning") for line in plain(colourless))


def test_a_narrow_terminal_gets_fewer_columns_of_days() -> None:
    """The name and the sizes stay."""
    usual = store(200, size=123 << 30)
    assert day_table(usual, None).columns == day_table(usual, 200).columns
    assert len(day_table(usual, None).columns) == 8
    assert day_table(usual, 80).columns == ("day", "containers", "parts", "size", "large", "large size", "newest")
    for width in range(50, 200):
        table = day_table(usual, width)
        assert table.width <= width
        assert {"day", "containers", "size", "large size"} <= set(table.columns)
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_long_name_takes_no_column_from_the_others() -> None:
    """It goes on in the next line."""
    assert day_table(LARGE, 80).columns == ("day", "containers", "parts", "size", "large", "large size", "newest")


def test_many_days_are_counted_beyond_the_newest() -> None:
    infos = [ObjectInfo(f"20{year}-01-01/00.des", 1, "etag", 10**18) for year in range(10, 60)]
    report = Report.of(build_store_status("s3://b/", infos, None, None, now_s=0.0))
    lines = plain(rendered(report, 80))
    assert lines[-1] == "and 20 more; --json has all"
    assert sum(line.startswith("20") for line in lines) == 30


def test_a_mount_that_does_not_answer_is_a_record_too() -> None:
    report = Report.of_unserved("/mnt", NotServed("/mnt: no answer", "hung"))
    assert report.record == {"kind": "mount", "place": "/mnt", "state": "hung"}
    assert plain(rendered(report, 80)) == ["mount    /mnt", "warning  /mnt: no answer"]
