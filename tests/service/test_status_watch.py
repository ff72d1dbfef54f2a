"""`desfs status` on a terminal, and `desfs status --watch`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from desfs.spool import Spool
from tests.mount.mounting import PATIENCE_S, PROGRAM, daemon_of, desfs, mount
from tests.mount.stores import put_container
from tests.servers import MountPoint

DAY = "2026-11-20"


# A shell has what it runs in the background ignore SIGINT, and all that is started from there.
STATUS = ("env", "--default-signal=INT", str(PROGRAM), "status")


class Terminal:
    """The program on a terminal of some size, and all that it has written there."""

    def __init__(self, *arguments: object, columns: int = 80, rows: int = 24, **env: str) -> None:
        self._terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*STATUS, *map(str, arguments)],
            stdin=end,
            stdout=end,
            stderr=end,
            env=inherited | {"TERM": "xterm"} | env,
        )
        os.close(end)
        self.written = b""

    @property
    def text(self) -> str:
        """What it has written, without control codes; each look of a watch begins on a line of its own."""
        text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.written.decode())
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def read_until(self, said: str, count: int = 1) -> None:
        """Wait until a text stands there that many times."""
        deadline = time.monotonic() + PATIENCE_S
        while self.text.count(said) < count:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"no {said!r} in:\n{self.text}"
            if select.select([self._terminal], [], [], left_s)[0]:
                piece = self._read()
                assert piece, f"it ended without {said!r}:\n{self.text}"

    def end(self) -> int:
        """Its exit status, after the rest of what it writes."""
        while self._read():
            pass
        os.close(self._terminal)
        return self.process.wait(PATIENCE_S)

    def _read(self) -> bytes:
        try:
            piece = os.read(self._terminal, 65536)
        except OSError:  # EIO: the program has ended
            return b""
        self.written += piece
        return piece


@contextlib.contextmanager
def terminal(*arguments: object, **more: Any) -> Iterator[Terminal]:
    shown = Terminal(*arguments, **more)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()


def watch(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    """The program with its output in a pipe."""
    command = [*STATUS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def next_record(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def test_a_terminal_gets_tables(tmp_path: Path) -> None:
    """On a terminal the days are a table of rich's; nothing is cut off or taken for markup."""
    put_container(tmp_path / "[bold]x.des", {"f": b"x"})
    put_container(tmp_path / DAY / "0.des", {"f": b"x"})
    with terminal(tmp_path) as shown:
        assert shown.end() == 0
    assert DAY in shown.text
    assert "[bold]x" in shown.text
    assert "newest" in shown.text
    assert b"\x1b[1m" in shown.written
    assert max(map(len, shown.text.splitlines())) <= 80


@pytest.mark.fuse
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_mount_is_watched_on_a_terminal(number: str, tmp_path: Path, mount_dir: MountPoint) -> None:
    """The first look has averages, the others what was since the one before; interrupted it leaves the terminal as it
    was."""
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"x"})
    mount(tmp_path / "store", mount_dir.path)
    with terminal("-w", "0.1", mount_dir.path) as shown:
        shown.read_until("averages since the start")
        shown.read_until("between two looks", 2)
        shown.process.send_signal(signal.Signals[number])
        assert shown.end() == {"SIGINT": 0, "SIGTERM": 143}[number]
    hidden, visible = shown.written.rfind(b"\x1b[?25l"), shown.written.rfind(b"\x1b[?25h")
    assert -1 < hidden < visible
    assert "Traceback" not in shown.text
    for said in ("from the store", "to readers", "oldest request", "memory hits", "problems"):
        assert said in shown.text
    assert max(map(len, shown.text.splitlines())) <= 80


@pytest.mark.fuse
def test_a_watch_ends_when_the_mount_goes(tmp_path: Path, mount_dir: MountPoint) -> None:
    """With 0 when somebody unmounts it, with 1 when its daemon was killed; the terminal has its cursor again."""
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"x"})
    for how, code, said in (("umount", 0, "is not mounted there any more"), ("kill", 1, "is dead, its daemon")):
        mount(tmp_path / "store", mount_dir.path)
        with terminal("-w", "0.1", mount_dir.path, columns=200) as shown:
            shown.read_until("between two looks")
            if how == "umount":
                # Busy while it is looked at; who is cut off meanwhile sees the mount gone as well.
                done = desfs("umount", "--lazy", mount_dir.path)
                assert (done.returncode, done.stderr) == (0, "")
            else:
                os.kill(daemon_of(mount_dir.path), signal.SIGKILL)
            assert shown.end() == code, shown.text
        assert said in shown.text
        assert shown.written.rfind(b"\x1b[?25l") < shown.written.rfind(b"\x1b[?25h")


@pytest.mark.fuse
def test_a_watch_of_a_mount_that_hangs_goes_on_and_hangs_not(tmp_path: Path, mount_dir: MountPoint) -> None:
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"x"})
    mount(tmp_path / "store", mount_dir.path)
    daemon = daemon_of(mount_dir.path)
    with watch("--watch", "0.1", "--json", "--deadline", "1", mount_dir.path) as process:
        try:
            first, second = next_record(process), next_record(process)
            assert (first["rates"]["since"], second["rates"]["since"]) == ("start", "look")
            assert 0 < second["rates"]["seconds"] < PATIENCE_S
            os.kill(daemon, signal.SIGSTOP)
            while (hung := next_record(process))["state"] == "served":
                pass
            assert hung == {"kind": "mount", "place": str(mount_dir.path), "state": "hung"}
            os.kill(daemon, signal.SIGCONT)
            while (again := next_record(process))["state"] == "hung":
                pass
            assert again["rates"]["since"] == "look"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE_S)
            assert (process.returncode, said) == (0, "")
        finally:
            os.kill(daemon, signal.SIGCONT)
            process.kill()


def test_a_watch_whose_output_is_no_terminal_prints_one_look_after_the_other(tmp_path: Path) -> None:
    """Without control codes, an empty line between two; files that come meanwhile are counted."""
    Spool(tmp_path)
    with watch(tmp_path, "--watch=0.1") as process:
        try:
            assert process.stdout is not None
            text = ""
            while text.count("growth") < 1:
                text += process.stdout.readline()
            (tmp_path / "f").write_bytes(b"content")
            while "1 file, 7 B" not in text or text.count("\n\nspool ") < 3:
                text += process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE_S)
            assert (process.returncode, said) == (0, "")
        finally:
            process.kill()
    assert "\x1b" not in text
    assert re.search(r"^at +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, again every 0.1 s$", text, re.MULTILINE)
    assert re.search(r"^growth +\+[1-9]", text, re.MULTILINE)


def test_a_store_is_watched_rarely(tmp_path: Path) -> None:
    """Each look lists all of it."""
    put_container(tmp_path / DAY / "0.des", {"f": b"x"})
    with terminal(tmp_path.as_uri(), "-w", TERM="dumb") as shown:
        shown.read_until("again every 60 s")
        shown.read_until("total")
        shown.process.send_signal(signal.SIGINT)
        assert shown.end() == 0
    assert b"\x1b[?25l" not in shown.written
