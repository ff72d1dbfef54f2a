"""What `desfs doctor` makes of what it has seen, without a machine, a store or a mount that is broken."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from des_format.s3 import Trouble
from desfs.cli.doctor import lines, record
from desfs.doctor.answers import Asked, Found, HttpAnswer, judge_answer, judge_clock, judge_credentials, judge_region
from desfs.doctor.contents import Contents, Sample, judge_days
from desfs.doctor.finding import Budget, Finding, State, TooLate, error, in_parallel, in_time, ok, warning
from desfs.doctor.machine import (
    check_device,
    check_helper,
    check_memory,
    check_open_files,
    check_system,
    judge_levers,
    judge_trial,
)
from desfs.doctor.place import judge_cache, judge_directory, judge_new_cache
from desfs.hanging import Call, Outcome, look
from desfs.mountpoint import Mounted
from tests.fakes.s3_front import http_date

HOUR_S = 3600.0
DIRECTORY = Outcome([0o040755, os.geteuid(), 0, 1])
ROOM = Outcome([50 << 30, 100 << 30])


def answered(status: int, body: bytes = b"", **headers: str) -> HttpAnswer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpAnswer(status, {"date": http_date(), **named}, body, time.time(), 0.01)


def refused(code: str, status: int = 403) -> Asked:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return Asked(trouble=Trouble.DENIED, reason=f"no ({code}, status {status})", answers=(answered(status, body),))


# --- time --------------------------------------------------------------------------------------------------------


def test_a_call_that_does_not_come_back_is_given_up() -> None:
    forever = threading.Event()
    with pytest.raises(TooLate):
        in_time(forever.wait, Budget(0.01, 1.0))
    forever.set()


def test_no_call_begins_when_the_time_of_all_is_over() -> None:
    now = [0.0]
    budget = Budget(5.0, 8.0, clock=lambda: now[0])
    assert budget.left_s == 5.0
    now[0] = 6.0
    assert budget.left_s == 2.0
    now[0] = 9.0
    called: list[bool] = []
    with pytest.raises(TooLate, match="no time is left"):
        in_time(lambda: called.append(True), budget)
    assert not called


def test_a_call_gives_its_value_or_its_own_error() -> None:
    budget = Budget(60.0, 60.0)
    assert in_time(lambda: None, budget) is None
    assert in_time(lambda: 7, budget) == 7
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, budget)


def test_a_series_that_fails_or_hangs_hides_no_other_one() -> None:
    forever = threading.Event()

    def good() -> Iterator[Finding]:
        yield ok("one", "found")

    def failing() -> Iterator[Finding]:
        yield ok("two", "found")
        raise ZeroDivisionError

    def hanging() -> Iterator[Finding]:
        yield ok("three", "found")
        forever.wait()

    series = {"failing": failing, "hanging": hanging, "good": good}
    found = list(in_parallel(series, 0.2))
    forever.set()
    assert [finding.check for finding in found] == ["two", "failing", "three", "hanging", "one"]
    assert [finding.state for finding in found] == [State.OK, State.ERROR, State.OK, State.ERROR, State.OK]
    assert "ZeroDivisionError" in found[1].found
    assert "not done" in found[3].found


def test_what_cleans_up_is_waited_for_at_the_end_of_the_program() -> None:
    kinds: dict[str, bool] = {}

    def series(name: str) -> Iterator[Finding]:
        kinds[name] = threading.current_thread().daemon
        yield ok(name, "found")

    list(in_parallel({"one": lambda: series("one"), "two": lambda: series("two")}, 60.0, finishing=("two",)))
    assert kinds == {"one": True, "two": False}


def test_paths_are_looked_at_one_by_one(tmp_path: Path) -> None:
    """Each call has its own outcome, whatever becomes of the others; names need not be UTF-8."""
    odd = os.fsdecode(b"\xff odd")
    (tmp_path / odd).write_text("żółć")
    calls = [
        Call("stat", str(tmp_path)),
        Call("read", str(tmp_path / odd)),
        Call("list", str(tmp_path)),
        Call("names", str(tmp_path)),
        Call("stat", str(tmp_path / "missing")),
        Call("list", str(tmp_path / odd)),
        Call("writable", str(tmp_path)),
    ]
    status, text, count, names, missing, none, writable = look(calls, limit_s=30.0)
    assert status.value[:2] == [tmp_path.stat().st_mode, os.geteuid()]
    assert (text.value, count.value, names.value, writable.value) == ("żółć", 1, [odd], True)
    assert (missing.errno, none.errno) == (errno.ENOENT, errno.ENOTDIR)


def test_a_path_that_hangs_is_left_alone(tmp_path: Path) -> None:
    """A FIFO without a writer stands for a mount without an answer: what was answered before is there."""
    os.mkfifo(tmp_path / "fifo")
    found = look([Call("stat", str(tmp_path)), Call("read", str(tmp_path / "fifo"))], limit_s=0.5)
    assert [each.answered for each in found] == [True, False]
    with (tmp_path / "fifo").open("wb", buffering=0):
        pass  # lets the other process end


# --- the machine -------------------------------------------------------------------------------------------------


def test_a_device_that_is_missing_or_another_one(tmp_path: Path) -> None:
    missing = check_device(str(tmp_path / "fuse"))
    assert (missing.state, "modprobe fuse" in missing.remedy) == (State.ERROR, True)
    other = check_device("/dev/null")
    assert other.state is State.ERROR
    assert "mknod" in other.remedy


def test_a_missing_helper_is_an_error_for_users_alone() -> None:
    assert check_helper(None, is_root=True).state is State.WARNING
    found = check_helper(None, is_root=False)
    assert found.state is State.ERROR
    assert "fuse3" in found.remedy


def test_a_helper_needs_the_rights_of_root(tmp_path: Path) -> None:
    (tmp_path / "fusermount3").write_bytes(b"")
    found = check_helper(str(tmp_path / "fusermount3"), is_root=False)
    assert found.state is State.ERROR
    assert "chmod 4755" in found.remedy


@pytest.mark.parametrize(
    ("known", "wanted", "state", "said"),
    [
        ({"loaded": True, "bound": True}, "auto", State.OK, "bound"),
        ({"loaded": True, "bound": False}, "auto", State.WARNING, "directly"),
        ({"loaded": False, "why_not": "not installed: x"}, "auto", State.WARNING, "not installed: x"),
        ({"loaded": False, "why_not": "switched off"}, "off", State.OK, "levers=off"),
    ],
)
def test_levers(known: dict[str, object], wanted: str, state: State, said: str) -> None:
    found = judge_levers(known, wanted)
    assert found.state is state
    assert said in found.found


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("fusermount3: option allow_other only allowed if 'user_allow_other' is set", "echo user_allow_other"),
        ("fusermount3: too many FUSE filesystems mounted; mount_max=1000", "mount_max"),
        ("fusermount3: mount failed: Operation not permitted", "--cap-add SYS_ADMIN"),
        ("something else", "what is said above"),
    ],
)
def test_a_mount_that_fails_has_a_remedy(said: str, remedy: str) -> None:
    found = judge_trial({"mounted": False, "error": "fuse_session_mount failed"}, said)
    assert (found.state, found.found) == (State.ERROR, said)
    assert remedy in found.remedy


def test_memory_and_open_files() -> None:
    assert check_memory(0).state is State.OK
    much = check_memory(1 << 60)
    assert much.state is State.WARNING
    assert "memory=" in much.remedy
    assert check_open_files(1024).state is State.OK
    assert check_open_files(-1).state is State.OK
    few = check_open_files(100)
    assert few.state is State.WARNING
    assert "ulimit -n" in few.remedy


def test_an_old_kernel_is_said() -> None:
    assert check_system("6.1.0-13-amd64").state is State.OK
    assert check_system("5.1").state is State.OK
    assert check_system("4.19.0-27-amd64").state is State.WARNING


# --- S3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_s", "state", "said"),
    [
        (0.0, State.OK, "within"),
        (-4 * 60.0, State.OK, "within"),
        (10 * 60.0, State.WARNING, "10 minutes behind"),
        (HOUR_S, State.ERROR, "60 minutes behind"),
        (-HOUR_S, State.ERROR, "60 minutes ahead of"),
        (-26 * HOUR_S, State.ERROR, "26.0 hours ahead of"),
    ],
)
def test_a_clock_that_is_off(ahead_s: float, state: State, said: str) -> None:
    found = judge_clock([answered(200, date=http_date(ahead_s))])
    assert found.state is state
    assert said in found.found
    assert (state is State.OK) or "chrony" in found.remedy


def test_a_clock_that_the_server_refuses_is_an_error_with_or_without_a_date() -> None:
    skewed = b"<Error><Code>RequestTimeTooSkewed</Code></Error>"
    found = judge_clock([answered(403, skewed, date=http_date(7 * 60.0))])
    assert found.state is State.ERROR
    assert "7 minutes behind" in found.found
    for date in ("", "no date"):
        assert judge_clock([answered(403, skewed, date=date)]).state is State.ERROR
        assert judge_clock([answered(200, date=date)]).state is State.SKIPPED


@pytest.mark.parametrize(
    "redirect",
    [
        answered(301, b"", x_amz_bucket_region="eu-west-3"),
        answered(400, b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"),
        answered(
            400,
            b"<Error><Code>AuthorizationHeaderMalformed</Code>"
            b"<Message>the region is wrong; expecting 'eu-west-3'</Message></Error>",
        ),
    ],
)
def test_a_wrong_region_is_named(redirect: HttpAnswer) -> None:
    followed = judge_region(Asked(value={}, answers=(redirect, answered(200))), "us-east-1")
    assert followed.state is State.WARNING
    stuck = judge_region(Asked(trouble=Trouble.DENIED, reason="no", answers=(redirect,)), "us-east-1")
    assert stuck.state is State.ERROR
    for found in (followed, stuck):
        assert "us-east-1" in found.found
        assert "eu-west-3" in found.found
        assert "region=eu-west-3" in found.remedy


@pytest.mark.parametrize(
    ("reason", "said", "remedy"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1006)",
            "not trusted: self-signed certificate",
            "ca_bundle",
        ),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1006)",
            "expired",
            "renew",
        ),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch, certificate is not valid",
            "mismatch",
            "addressing_style=path",
        ),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "does not speak TLS", "http://"),
        ("no answer in time", "no answer in time", "curl -v"),
    ],
)
def test_an_endpoint_that_does_not_answer(reason: str, said: str, remedy: str) -> None:
    found = judge_answer(Asked(trouble=Trouble.UNAVAILABLE, reason=reason), "https://h")
    assert found.state is State.ERROR
    assert said in found.found
    assert remedy in found.remedy


def test_what_is_no_s3_server_is_told_from_one_that_refuses() -> None:
    page = Asked(
        trouble=Trouble.GARBLED, reason="x", answers=(answered(200, b"<html>", content_type="text/html; charset=x"),)
    )
    assert "status 200 and text/html" in judge_answer(page, "http://h").found
    assert judge_answer(page, "http://h").state is State.ERROR
    assert judge_answer(refused("AccessDenied"), "http://h").state is State.OK
    bare = Asked(trouble=Trouble.DENIED, reason="status 403", answers=(answered(403, b"", x_amz_request_id="1"),))
    assert judge_answer(bare, "http://h").state is State.OK
    busy = Asked(trouble=Trouble.THROTTLED, reason="SlowDown", answers=refused("SlowDown", 503).answers)
    assert judge_answer(busy, "http://h").state is State.WARNING


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_credentials_that_are_refused(code: str) -> None:
    found = judge_credentials(Found("from the environment"), refused(code))
    assert found.state is State.ERROR
    assert "from the environment" in found.found
    assert found.remedy
    assert judge_credentials(Found("from the environment"), refused("AccessDenied")).state is State.OK


def test_an_empty_store_is_worth_a_warning() -> None:
    assert judge_days(Contents((), ())).state is State.WARNING
    found = judge_days(Contents((Sample("a.des", 1),), ("2026-11-20", "2026-11-18", "x")))
    assert found.found == "2 days, 2026-11-18 to 2026-11-20, 1 other folder, 1 container in the root"


# --- places ------------------------------------------------------------------------------------------------------

DESFS = Mounted(1, "0:50", "fuse.desfs", "s3://bucket/")
OTHER = Mounted(1, "0:50", "fuse.sshfs", "host:/")
DISK = Mounted(1, "8:1", "ext4", "/dev/sda1")
DEAD, HUNG, LIVE = Outcome(errno=errno.ENOTCONN), Outcome(), ROOM


@pytest.mark.parametrize(
    ("mounted", "whole", "inside", "state", "said"),
    [
        (None, ROOM, Outcome(0), State.OK, "free"),
        (DISK, ROOM, Outcome(0), State.OK, "free"),
        (None, ROOM, Outcome(12), State.WARNING, "not empty"),
        (None, ROOM, Outcome(1000), State.WARNING, "1,000 or more"),
        (None, Outcome(errno=errno.ENOENT), Outcome(errno=errno.ENOENT), State.ERROR, "does not exist"),
        (None, Outcome(errno=errno.EACCES), Outcome(errno=errno.EACCES), State.ERROR, "Permission denied"),
        (None, ROOM, Outcome(errno=errno.ENOTDIR), State.ERROR, "no directory"),
        (None, HUNG, HUNG, State.ERROR, "no answer in time"),
        (DESFS, LIVE, Outcome(1), State.ERROR, "busy: s3://bucket/"),
        (DESFS, DEAD, DEAD, State.WARNING, "dead mount of s3://bucket/"),
        (DESFS, HUNG, HUNG, State.ERROR, "does not answer"),
        (OTHER, LIVE, Outcome(1), State.ERROR, "busy: host:/ (fuse.sshfs)"),
        (OTHER, DEAD, DEAD, State.ERROR, "dead mount: host:/"),
    ],
)
def test_mount_points(mounted: Mounted | None, whole: Outcome, inside: Outcome, state: State, said: str) -> None:
    found = judge_directory("/mnt/x", mounted, whole, inside, Outcome(True), is_root=True)
    assert found.state is state
    assert said in found.found
    assert bool(found.remedy) == (state is not State.OK)


def test_users_mount_on_what_they_may_write_to() -> None:
    arguments = ("/mnt/x", None, ROOM, Outcome(0), Outcome(False))
    assert judge_directory(*arguments, is_root=True).state is State.OK
    found = judge_directory(*arguments, is_root=False)
    assert found.state is State.ERROR
    assert "chown" in found.remedy


@pytest.mark.parametrize(
    ("folders", "whole", "writable", "state", "said"),
    [
        ([DIRECTORY, DIRECTORY], ROOM, True, State.OK, "up to 10.0 GiB"),
        ([DIRECTORY, Outcome(errno=errno.ENOENT)], ROOM, True, State.OK, "up to 10.0 GiB"),
        ([Outcome([0o100600, os.geteuid(), 0, 1])], ROOM, True, State.ERROR, "no directory"),
        ([Outcome([0o040755, os.geteuid() + 1, 0, 1])], ROOM, True, State.ERROR, "belongs to uid"),
        ([DIRECTORY, Outcome([0o040757, os.geteuid(), 0, 1])], ROOM, True, State.ERROR, "by everybody"),
        ([Outcome()], ROOM, True, State.ERROR, "no answer in time"),
        ([DIRECTORY], ROOM, False, State.ERROR, "not be written to"),
        ([DIRECTORY], Outcome([4 << 30, 100 << 30]), True, State.WARNING, "last 5%"),
        ([DIRECTORY], Outcome([8 << 30, 100 << 30]), True, State.WARNING, "room for 3.0 GiB"),
    ],
)
def test_cache_folders(folders: list[Outcome], whole: Outcome, writable: bool, state: State, said: str) -> None:
    found = judge_cache("/var/cache/x", folders, whole, Outcome(writable), 10 << 30)
    assert found.state is state
    assert said in found.found


def test_a_cache_folder_that_is_still_to_be_made() -> None:
    assert judge_new_cache("/a/b", Outcome(True)).state is State.OK
    assert judge_new_cache("/a/b", Outcome(errno=errno.ENOENT)).state is State.OK
    assert judge_new_cache("/a/b", Outcome(False)).state is State.ERROR


# --- what is printed ---------------------------------------------------------------------------------------------


def test_a_finding_is_one_line_and_its_remedy_another() -> None:
    """Whatever a server has sent, no control character gets to the terminal."""
    finding = error("list", "two\nlines \x1b[31m", "do this")
    first, second = lines(finding)
    assert first == "error    list            two lines \\x1b[31m"
    assert second.strip() == "-> do this"
    assert first.index("two") == second.index("->")
    assert len(lines(ok("list", "fine"))) == 1
    assert json.loads(json.dumps(record(warning("a", "b", "c")))) == {
        "check": "a",
        "state": "warning",
        "found": "b",
        "remedy": "c",
    }
