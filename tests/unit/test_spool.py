"""desfs/spool.py: what may be taken from a spool, and how it is taken without losing or tearing a file."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from desfs.errors import UsageError
from desfs.file_lease import lease_is_broken, take_lease
from desfs.settings import PackerSettings
from desfs.spool import FileState, Found, Kind, Spool, is_temporary

HOUR_S = 3600.0


class Clock:
    """A clock that a test sets; it begins with the file system's."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture(autouse=True)
def what_the_spool_says(announced_logs: list[str]) -> None:
    announced_logs += ["put aside", "the list of emptied folders is damaged"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path / "spool"


@pytest.fixture
def spool(root: Path) -> Iterator[Spool]:
    yield from _opened(root)


def _opened(root: Path, **options: object) -> Iterator[Spool]:
    before = signal.getsignal(signal.SIGIO)
    spool = Spool(root, **{"settle_s": 0.0, **options})  # type: ignore[arg-type]
    try:
        yield spool
    finally:
        spool.leave()
        signal.signal(signal.SIGIO, before)


@contextlib.contextmanager
def spool_with(root: Path, **options: object) -> Iterator[Spool]:
    yield from _opened(root, **options)


def write(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def kinds(spool: Spool) -> dict[str, Kind]:
    return {found.path: found.kind for found in spool.scan()}


def only(spool: Spool) -> Found:
    (found,) = spool.scan()
    return found


def claimed_now(spool: Spool, path: str) -> bool:
    """Claim one file; what it is refused for is raised."""

    def refused(path: str, error: Exception) -> None:
        raise error

    return path in spool.claim([path], "batch", refused)


# --- a spool -----------------------------------------------------------------------------------------------------


def test_a_root_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    """A spool is a directory that exists: nothing is made under a name that was mistyped."""
    for wrong in (tmp_path / "missing", write(tmp_path / "file")):
        with pytest.raises(UsageError, match="is no directory"):
            Spool(wrong)


def test_a_second_packer_is_kept_out(root: Path) -> None:
    """docs/semantics.md: One packer works in a spool at a time, unless all that do share a catalog (`--catalog`).

    The next one is told so, and gets it when the first has ended."""
    with spool_with(root) as first, spool_with(root) as second:
        first.join()
        with pytest.raises(UsageError, match="another packer is at work"):
            second.join()
        first.leave()
        second.join()
        second.leave()


def test_the_scan_goes_folder_by_folder_and_leaves_out_the_packers_own(spool: Spool, root: Path) -> None:
    """Names ascending by their bytes; `.desfs` at the root is the packer's, elsewhere it is a name like others."""
    for path in ("b/2", "b/1", "a", "b.txt", "ä", "b/.desfs/x"):
        write(root / path)
    assert [found.path for found in spool.scan()] == ["a", "b.txt", "ä", "b/1", "b/2", "b/.desfs/x"]


# --- settling ----------------------------------------------------------------------------------------------------


def test_a_file_is_taken_when_it_has_been_quiet(root: Path, clock: Clock) -> None:
    """docs/semantics.md: A file is taken when it has been quiet for `settle` seconds (2)."""
    assert PackerSettings().settle == 2
    with spool_with(root, settle_s=100.0, clock=clock) as spool:
        write(root / "a")
        for ahead_s in (0.0, 50.0, 90.0):
            clock.ahead_s = ahead_s
            assert only(spool).kind is Kind.WAITING
        clock.ahead_s = 101.0
        assert only(spool).kind is Kind.SETTLED
        clock.ahead_s = -HOUR_S  # a clock that was set back does not keep files for ever
        assert only(spool).kind is Kind.SETTLED


def test_a_rename_into_the_spool_is_a_touch_and_an_old_mtime_is_not_quiet(
    root: Path, tmp_path: Path, clock: Clock
) -> None:
    """A program can set mtime, as cp -p does: what counts is when the file itself was changed last."""
    os.utime(write(tmp_path / "old"), (0, 0))
    with spool_with(root, settle_s=100.0, clock=clock) as spool:
        os.rename(tmp_path / "old", root / "old")
        assert only(spool).kind is Kind.WAITING


@pytest.mark.parametrize(
    ("name", "temporary"),
    [
        ("a.tmp", True),
        ("a.part", True),
        (".photo.jpg.X1y2Z3", True),
        ("deep/down/.photo.jpg.X1y2Z3", True),
        (".photo.jpg.X1y2Z", False),
        ("photo.jpg.X1y2Z3", False),
        (".hidden", False),
        (".bashrc", False),
        ("a.TMP", False),
        ("tmp", False),
        ("x.tmp/file", False),
    ],
)
def test_names_that_look_temporary(name: str, temporary: bool) -> None:
    """*.tmp, *.part and rsync's .NAME.XXXXXX look temporary; other dot files are files like any other."""
    assert is_temporary(name) is temporary


def test_a_temporary_name_waits_an_hour_for_its_owner(root: Path, clock: Clock) -> None:
    """docs/semantics.md: Names that look temporary (`*.tmp`, `*.part`, or the patterns of `--temporary`; rsync's
    `.NAME.XXXXXX`) wait an hour for their owner to rename them. Other dot files are files like any other.

    After that it is a name like others."""
    temporary = ("a.tmp", "b.part", ".photo.X1y2Z3")
    with spool_with(root, settle_s=2.0, clock=clock) as spool:
        for name in (*temporary, ".hidden", ".x.tmpl"):
            write(root / name)
        others = dict.fromkeys((".hidden", ".x.tmpl"), Kind.SETTLED)
        for ahead_s in (10.0, HOUR_S - 10.0):
            clock.ahead_s = ahead_s
            assert kinds(spool) == {**dict.fromkeys(temporary, Kind.TEMPORARY), **others}
        clock.ahead_s = HOUR_S + 10.0
        assert kinds(spool) == {**dict.fromkeys(temporary, Kind.SETTLED), **others}


def test_other_names_can_be_the_temporary_ones(root: Path, clock: Clock) -> None:
    """docs/semantics.md: Names that look temporary (`*.tmp`, `*.part`, or the patterns of `--temporary`; rsync's
    `.NAME.XXXXXX`) wait an hour for their owner to rename them."""
    with spool_with(root, temporary=["*.wip"], clock=clock) as spool:
        for name in ("a.wip", "wip/a", "b.tmp", "c", ".photo.X1y2Z3"):
            write(root / name)
        clock.ahead_s = 10.0
        settled = dict.fromkeys(("wip/a", "b.tmp", "c"), Kind.SETTLED)
        assert kinds(spool) == {**dict.fromkeys(("a.wip", ".photo.X1y2Z3"), Kind.TEMPORARY), **settled}
        clock.ahead_s = HOUR_S + 10.0
        assert set(kinds(spool).values()) == {Kind.SETTLED}


# --- what can never be stored ------------------------------------------------------------------------------------


def test_links_fifos_sockets_and_devices_are_unsuitable_and_not_opened(spool: Spool, root: Path) -> None:
    """docs/semantics.md: Links are never followed.

    They, FIFOs, sockets and devices are put aside with the reason."""
    os.symlink("/etc/hostname", root / "link")
    os.symlink("/nowhere", root / "dangling")
    os.symlink("/etc", root / "folder")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    os.mknod(root / "disk", 0o60600, os.makedev(7, 0))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket"))
        found = {each.path: each for each in spool.scan()}
    assert set(found) == {"link", "dangling", "folder", "fifo", "null", "disk", "socket"}
    assert {each.kind for each in found.values()} == {Kind.UNSUITABLE}
    for path, reason in {
        "link": "a symbolic link",
        "folder": "a symbolic link",
        "fifo": "a FIFO",
        "socket": "a socket",
        "null": "a character device",
        "disk": "a block device",
    }.items():
        assert reason in found[path].reason


def test_what_was_exchanged_for_a_link_or_fifo_after_the_scan_is_not_claimed(spool: Spool, root: Path) -> None:
    """A claim looks at what it has opened: never through a link, and it does not wait for a FIFO's writer."""
    write(root / "target")
    os.symlink(root / "target", root / "link")
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket"))
        for path in ("link", "fifo", "socket", "folder", "missing", "missing/too", "target/below"):
            assert claimed_now(spool, path) is False, path
    assert spool.claims("batch") == []


def test_a_folder_that_was_exchanged_for_a_link_leads_nowhere(spool: Spool, root: Path, tmp_path: Path) -> None:
    """docs/semantics.md: Links are never followed.

    Whoever may write to the spool cannot make the packer take, or remove, what lies outside."""
    outside = write(tmp_path / "outside/file").parent
    (outside / "empty").mkdir()
    os.symlink(outside, root / "folder")
    assert claimed_now(spool, "folder/file") is False
    assert spool.remove_emptied({"folder/empty", "folder"}) == set()
    spool.reject("folder/file", "for a test")
    assert sorted(path.name for path in outside.iterdir()) == ["empty", "file"]
    assert list((root / ".desfs/rejected").iterdir()) == []


def test_names_and_sizes_that_cannot_be_stored(root: Path) -> None:
    """A name that is not UTF-8 and a file of more than `--max-file-size` are unsuitable; the reason says why."""
    with spool_with(root, max_file_size=10) as spool:
        (root / os.fsdecode(b"bad-\xff")).write_bytes(b"")
        write(root / "large", b"x" * 11)
        write(root / "fits", b"x" * 10)
        found = {os.fsencode(each.path): each for each in spool.scan()}
    assert found[b"fits"].kind is Kind.SETTLED
    assert found[b"large"].kind is found[b"bad-\xff"].kind is Kind.UNSUITABLE
    assert found[b"large"].reason == "11 bytes, more than the 10 of one object"
    assert "not UTF-8" in found[b"bad-\xff"].reason


def test_a_tree_that_is_too_deep_is_unsuitable_from_where_it_is_too_long(spool: Spool, root: Path) -> None:
    """A path longer than the kernel takes does not stop the packer: what lies there can be put aside."""
    here = os.open(root, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    write(root / "good")
    found = list(spool.scan())
    assert [each.kind for each in found] == [Kind.SETTLED, Kind.UNSUITABLE]
    assert "a folder whose path has" in found[1].reason
    spool.reject(found[1].path, found[1].reason)
    assert [each.path for each in spool.scan()] == ["good"]
    subprocess.run(["rm", "-rf", root], check=True)  # Python's own rmtree stops at the length of the path


def test_what_is_put_aside_has_its_reason_beside_it(spool: Spool, root: Path) -> None:
    """`.desfs/rejected/N/` has the file and `reason.txt`; the file may have that very name."""
    write(root / "a/file", b"its bytes")
    write(root / "reason.txt", b"a file's own")
    spool.reject("a/file", "does not fit")
    spool.reject("reason.txt", "neither")
    places = sorted((root / ".desfs/rejected").iterdir())
    assert [(place / "reason.txt").read_text() for place in places] == [
        "a/file: does not fit\n",
        "reason.txt: neither\n",
    ]
    assert (places[0] / "file").read_bytes() == b"its bytes"
    assert (places[1] / "reason.txt.file").read_bytes() == b"a file's own"
    spool.reject("gone", "for a test")
    assert sorted((root / ".desfs/rejected").iterdir()) == places


# --- claims ------------------------------------------------------------------------------------------------------


def test_a_claimed_file_is_under_its_path_in_its_batch(spool: Spool, root: Path) -> None:
    """A claim is a rename: the spool does not have the file any more, the batch has it, with all its attributes."""
    before = write(root / "a/b/file").stat()
    assert claimed_now(spool, "a/b/file")
    assert spool.claims("batch") == ["a/b/file"]
    after = Path(spool.claimed("batch", "a/b/file")).stat()
    assert FileState.of(after) == FileState.of(before)
    assert list(spool.scan()) == []
    assert spool.batches() == ["batch"]


@contextlib.contextmanager
def another_process(program: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A Python program with `path` as its argument, which has said a line; it ends when its input does."""
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.stdin.close()
            process.wait(30)


HELD_OPEN = "import sys; file = open(sys.argv[1], 'ab'); print('ready', flush=True); sys.stdin.read()"
HELD_MAPPED = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED)
print("ready", flush=True)
sys.stdin.read()
"""
HELD_FOR_READING = "import sys; file = open(sys.argv[1], 'rb'); print('ready', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("program", [HELD_OPEN, HELD_MAPPED], ids=["open", "shared mmap"])
def test_a_file_that_a_writer_holds_is_not_taken(spool: Spool, root: Path, program: str) -> None:
    """docs/semantics.md: As long as somebody has it open for writing, it is not.

    Or has mapped it so; however long it is quiet."""
    write(root / "a")
    with another_process(program, root / "a"):
        assert claimed_now(spool, "a") is False
        assert (root / "a").exists()
    assert claimed_now(spool, "a") is True


def test_a_file_that_is_open_for_reading_is_taken(spool: Spool, root: Path) -> None:
    """Readers are not in the way."""
    write(root / "a")
    with another_process(HELD_FOR_READING, root / "a"):
        assert claimed_now(spool, "a") is True


def test_a_private_mapping_is_not_in_the_way(spool: Spool, root: Path) -> None:
    """A program that runs from the file, or maps it privately, cannot change it."""
    write(root / "a")
    with open(root / "a", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert claimed_now(spool, "a") is True


def test_a_file_that_is_opened_for_writing_during_the_claim_stays_with_the_writer(root: Path) -> None:
    """A writer that opens the file between scan and claim waits for the lease, gets the file, and it is where it
    was."""
    opened: list[int] = []
    writer = threading.Thread(target=lambda: opened.append(os.open(root / "a", os.O_WRONLY)))

    def effect(name: str) -> None:
        if name == "claim a":
            writer.start()
            _wait_until(lambda: _is_being_broken(root / "a"))

    write(root / "a", b"before")
    with spool_with(root, effect=effect) as spool:
        assert claimed_now(spool, "a") is False
        writer.join(30)
        os.write(opened[0], b"after.")
        assert claimed_now(spool, "a") is False
        os.close(opened[0])
        assert (root / "a").read_bytes() == b"after."
        assert spool.claims("batch") == []


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _is_being_broken(path: Path) -> bool:
    """Whether somebody waits for a lease on the file: /proc/locks, see proc(5)."""
    inode = f":{path.stat().st_ino} "
    return any("BREAKING" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_a_lease_that_nobody_asks_for_is_not_broken(tmp_path: Path) -> None:
    """A reader does not break a read lease."""
    write(tmp_path / "a")
    with open(tmp_path / "a", "rb") as held:
        assert take_lease(held.fileno())
        assert not lease_is_broken(held.fileno())
        (tmp_path / "a").read_bytes()
        assert not lease_is_broken(held.fileno())


def test_another_file_that_has_the_name_at_the_rename_goes_back(root: Path) -> None:
    """What a claim has looked at is what it takes: a file that was put in its place meanwhile goes back."""

    def effect(name: str) -> None:
        if name == "claim a":
            write(root / "new", b"a newer one")
            os.rename(root / "new", root / "a")

    write(root / "a")
    with spool_with(root, effect=effect) as spool:
        assert claimed_now(spool, "a") is False
        assert (root / "a").read_bytes() == b"a newer one"
        assert spool.claims("batch") == []


def test_giving_back_never_replaces_a_newer_file(spool: Spool, root: Path) -> None:
    """A claimed file goes back to its place if that is free; else it stays claimed, and the newer one untouched."""
    write(root / "a/file", b"older")
    assert claimed_now(spool, "a/file")
    write(root / "a/file", b"newer")
    assert spool.give_back("batch", "a/file") is False
    assert (root / "a/file").read_bytes() == b"newer"
    assert Path(spool.claimed("batch", "a/file")).read_bytes() == b"older"
    (root / "a/file").unlink()
    (root / "a").rmdir()
    write(root / "a", b"a file where the folder was")
    assert spool.give_back("batch", "a/file") is False
    (root / "a").unlink()
    assert spool.give_back("batch", "a/file") is True
    assert (root / "a/file").read_bytes() == b"older"
    assert spool.claims("batch") == []


def test_each_name_of_a_file_is_a_file(spool: Spool, root: Path) -> None:
    """Hard links are files like others; deleting one leaves the other as it is."""
    os.link(write(root / "a"), root / "b")
    assert claimed_now(spool, "a")
    assert claimed_now(spool, "b")
    state = FileState.of(Path(spool.claimed("batch", "a")).stat())
    assert spool.remove_claimed("batch", "a", state)
    assert spool.remove_claimed("batch", "b", state)
    assert spool.claims("batch") == []


def test_what_changed_since_it_was_packed_is_not_deleted(spool: Spool, root: Path) -> None:
    """A file is deleted in the state in which it was packed, and in no other; one that is gone is no error."""
    write(root / "a", b"one")
    assert claimed_now(spool, "a")
    claimed = Path(spool.claimed("batch", "a"))
    packed = FileState.of(claimed.stat())
    claimed.write_bytes(b"other")
    assert spool.remove_claimed("batch", "a", packed) is False
    assert spool.remove_claimed("batch", "a", FileState.of(claimed.stat())) is True
    assert spool.remove_claimed("batch", "a", packed) is True


def test_a_batch_ends_when_all_its_files_have_left(spool: Spool, root: Path) -> None:
    """The journal goes last; while a file is claimed, it stays."""
    write(root / "a/b/c")
    assert claimed_now(spool, "a/b/c")
    spool.write_durably(spool.journal_path("batch"), b"{}")
    spool.finish("batch")
    assert spool.batches() == ["batch"]
    assert spool.journal_path("batch").exists()
    Path(spool.claimed("batch", "a/b/c")).unlink()
    spool.finish("batch")
    assert spool.batches() == []


def test_a_journal_is_replaced_as_a_whole(root: Path) -> None:
    """Whatever a write dies at, the file has the old content or the new one."""
    for die_at in range(4):
        count = 0

        def effect(name: str, die_at: int = die_at) -> None:
            nonlocal count
            if count == die_at:
                raise KeyboardInterrupt
            count += 1

        with spool_with(root, effect=effect) as spool:
            path = spool.journal_path("batch")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"old")
            with contextlib.suppress(KeyboardInterrupt):
                spool.write_durably(path, b"new")
            assert path.read_bytes() == (b"new" if die_at >= 2 else b"old")


# --- emptied folders ---------------------------------------------------------------------------------------------


def test_emptied_folders_go_when_they_are_quiet(root: Path, clock: Clock) -> None:
    """docs/semantics.md: Directories that the packer has emptied are removed when they are quiet.

    With those above them that this empties, when nobody has changed them for the settle time; what the packer itself
    changes there does not count."""
    with spool_with(root, settle_s=100.0, clock=clock) as spool:
        write(root / "a/b/c/file")
        clock.ahead_s = 50.0
        assert claimed_now(spool, "a/b/c/file")
        assert spool.remove_emptied({"a/b/c"}) == {"a/b/c"}
        assert (root / "a/b/c").is_dir()
        clock.ahead_s = 101.0
        assert spool.remove_emptied({"a/b/c"}) == set()
        assert not (root / "a").exists()


def test_a_folder_that_a_program_has_just_used_stays(root: Path, clock: Clock) -> None:
    """A program that has just made a folder, or changed one, finds it when it writes there, whatever times it has given
    to it."""
    with spool_with(root, settle_s=100.0, clock=clock) as spool:
        write(root / "a/b/file")
        clock.ahead_s = 101.0
        assert claimed_now(spool, "a/b/file")
        clock.ahead_s = 0.0
        os.utime(root / "a/b", (0, 0))  # as cp -p does: it is a touch all the same
        assert spool.remove_emptied({"a/b"}) == {"a/b"}
        write(root / "a/other")
        clock.ahead_s = 101.0
        assert spool.remove_emptied({"a/b"}) == set()
        assert sorted(path.name for path in root.rglob("*") if ".desfs" not in path.parts) == ["a", "other"]


def test_a_folder_in_use_is_left_until_a_file_is_taken_from_it(spool: Spool, root: Path) -> None:
    """A folder that is not empty is not looked at again by itself; one that is gone is no error."""
    write(root / "a/file")
    assert spool.remove_emptied({"a", "gone", "a/gone"}) == set()
    assert (root / "a/file").exists()


def test_the_list_of_emptied_folders_survives_a_restart(spool: Spool, root: Path) -> None:
    """Names of every kind come back; a damaged list is empty."""
    path = root / f".desfs/emptied-{spool.join().number}.json"
    folders = {"a", "a/ä", os.fsdecode(b"bad-\xff"), 'with "quotes"\n'}
    spool.write_emptied(folders)
    assert spool.read_emptied() == folders
    for damaged in (b"", b"{", b"\xff", b"7"):
        path.write_bytes(damaged)
        assert spool.read_emptied() == set()
    path.unlink()
    assert spool.read_emptied() == set()


def test_what_was_being_built_is_thrown_away(spool: Spool, root: Path) -> None:
    """`work/` is worth nothing after a crash; what another worker builds is its own."""
    mine, other = spool.join().number, write(root / ".desfs/work/another/half.des")
    write(root / f".desfs/work/{mine}/half.des")
    spool.clear_work()
    assert list((root / f".desfs/work/{mine}").iterdir()) == []
    assert other.exists()
