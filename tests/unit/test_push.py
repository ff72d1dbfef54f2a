"""docs/architecture.md, Prefetch: payloads go to the kernel in a thread of their own."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from desfs import metrics
from desfs.inode import split_file_inode
from desfs.pieces import SMALL, Piece
from desfs.push import ASKED, LISTED, PUSHED, PlainQueue, Pusher
from tests.mount.stores import put_container
from tests.unit.opened import KEY, World

PATIENCE_S = 20.0
FILES = {f"{n:04d}": Random(n).randbytes(n % 50 + 1) for n in range(1000)}


class Kernel:
    """A page cache. `hold` makes it wait for a page that a read has locked; what is in `fail` is raised."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.calls = 0
        self.unknown: dict[int, int] = {}  # rows whose inode it does not know, and for how many calls yet
        self.refuse = 0
        self.fail: list[Exception] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()

    def hold(self) -> None:
        self.go.clear()

    def store(self, inode: int, payload: memoryview) -> int:
        self.calls += 1
        self.entered.set()
        assert self.go.wait(20)
        if self.fail:
            raise self.fail.pop()
        row = split_file_inode(inode)[1]
        if self.unknown.get(row, 0):
            self.unknown[row] -= 1
            return errno.ENOENT
        if self.refuse:
            return self.refuse
        self.pages[inode] = bytes(payload)
        return 0


class Pushing:
    """An open container, all of it in a piece, and the thread."""

    def __init__(self, root: Path, pieces: float = 100) -> None:
        """The queue holds so many pieces."""
        put_container(root / KEY, FILES)
        self.world = World(root)
        self.container = self.world.container
        blocks = self.container.blocks
        start, stop = blocks.extent(0, len(blocks))
        data = (root / KEY).read_bytes()[start:stop]
        self.piece = Piece(self.container.number, SMALL, 0, len(blocks), start, data)
        self.kernel = Kernel()
        self.pusher = Pusher(PlainQueue(self.kernel.store), int(pieces * len(data)))
        self.rows = list(range(len(FILES)))
        self.container.pages[:] = bytes([LISTED]) * len(FILES)

    def push(self, rows: list[int] | None = None, piece: Piece | None = None) -> None:
        wanted = np.array(self.rows if rows is None else rows, np.uint32)
        self.pusher.push(self.container, piece or self.piece, wanted)


@pytest.fixture
def pushing(tmp_path: Path) -> Pushing:
    return Pushing(tmp_path)


def counted(result: str) -> float:
    return metrics.snapshot().get(f"desfs_pages_pushed_total.{result}", 0.0)


def finish(pushing: Pushing) -> None:
    """Let the thread take what is queued, and end it."""
    while pushing.pusher.queued:
        pushing.kernel.entered.wait(0.01)
    assert pushing.pusher.stop(PATIENCE_S)


def test_every_file_gets_its_own_bytes(pushing: Pushing) -> None:
    before = counted("stored")
    pushing.pusher.start()
    pushing.push()
    finish(pushing)
    index = pushing.container.loaded.index
    names = {inode: index.name(split_file_inode(inode)[1]).decode() for inode in pushing.kernel.pages}
    assert {names[inode]: data for inode, data in pushing.kernel.pages.items()} == FILES
    assert {split_file_inode(inode)[0] for inode in pushing.kernel.pages} == {pushing.container.slot}
    assert counted("stored") - before == len(FILES)
    assert set(pushing.container.pages) == {LISTED | PUSHED}


def test_what_was_asked_for_meanwhile_is_left_out(pushing: Pushing) -> None:
    pushing.push()
    for row in (3, 500):
        pushing.container.pages[row] |= ASKED
    pushing.pusher.start()
    finish(pushing)
    rows = {split_file_inode(inode)[1] for inode in pushing.kernel.pages}
    assert rows == set(range(len(FILES))) - {3, 500}


def test_an_inode_that_the_kernel_does_not_know_is_to_be_listed_again(pushing: Pushing) -> None:
    """ENOENT is normal: nothing is known of the row then."""
    before = counted("unknown")
    pushing.kernel.unknown = {7: 1 << 30}
    pushing.pusher.start()
    pushing.push()
    finish(pushing)
    assert pushing.container.pages[7] == 0
    assert pushing.container.pages[8] == LISTED | PUSHED
    assert counted("unknown") - before == 1


def test_an_inode_that_the_kernel_comes_to_know_is_waited_for(pushing: Pushing) -> None:
    """A listing is sent a moment before the kernel has made its inodes of it."""
    before = counted("unknown")
    pushing.kernel.unknown = {0: 5, 500: 2}
    pushing.pusher.start()
    pushing.push()
    finish(pushing)
    assert set(pushing.container.pages) == {LISTED | PUSHED}
    assert counted("unknown") == before


def test_refused_pages_are_counted_and_logged(pushing: Pushing, capsys: pytest.CaptureFixture[str]) -> None:
    before = counted("failed")
    pushing.kernel.refuse = errno.ENOMEM
    pushing.pusher.start()
    pushing.push([1, 2])
    finish(pushing)
    assert counted("failed") - before == 2
    assert "Cannot allocate memory" in capsys.readouterr().out


def test_an_error_in_the_thread_does_not_end_it(pushing: Pushing, capsys: pytest.CaptureFixture[str]) -> None:
    pushing.kernel.fail = [ZeroDivisionError("a defect of ours")]
    pushing.pusher.start()
    pushing.push([1])
    pushing.push([2])
    finish(pushing)
    assert [split_file_inode(inode)[1] for inode in pushing.kernel.pages] == [2]
    assert "unexpected error in a push" in capsys.readouterr().out


def test_the_queue_is_bounded_and_what_does_not_fit_is_dropped(tmp_path: Path) -> None:
    """Pages are a gift: nobody waits until there is room for them."""
    pushing = Pushing(tmp_path, pieces=2.5)
    before = counted("dropped")
    for row in range(5):
        pushing.push([row], replace(pushing.piece))  # another one with the same bytes
    assert counted("dropped") - before == 3
    pushing.pusher.start()
    finish(pushing)
    assert sorted(split_file_inode(inode)[1] for inode in pushing.kernel.pages) == [0, 1]


def test_room_in_the_queue_comes_back(tmp_path: Path) -> None:
    pushing = Pushing(tmp_path, pieces=3)
    pushing.pusher.start()
    before = counted("dropped")
    for row in range(20):
        pushing.push([row])
        while pushing.pusher.queued:
            pushing.kernel.entered.wait(0.01)
    assert pushing.pusher.stop(PATIENCE_S)
    assert counted("dropped") == before
    assert len(pushing.kernel.pages) == 20


def test_it_stops_behind_the_file_at_hand(pushing: Pushing) -> None:
    """What waits is dropped, and nothing is taken any more."""
    pushing.kernel.hold()
    pushing.pusher.start()
    pushing.push()
    pushing.push()
    assert pushing.kernel.entered.wait(20)
    stopper = threading.Thread(target=pushing.pusher.stop, args=(PATIENCE_S,))
    stopper.start()
    while not pushing.pusher._stopping:
        pass
    pushing.kernel.go.set()
    stopper.join(20)
    assert not stopper.is_alive()
    assert pushing.kernel.calls == 1
    before = counted("dropped")
    pushing.push([1, 2, 3])
    assert counted("dropped") - before == 3


def test_a_pusher_that_never_started_can_be_stopped(pushing: Pushing) -> None:
    pushing.push()
    assert pushing.pusher.stop(PATIENCE_S)
    assert pushing.kernel.calls == 0


def test_offsets_beyond_4_gib_are_right(pushing: Pushing) -> None:
    """Offsets are reckoned in 64 bits."""
    index = pushing.container.loaded.index
    far = 5 << 30
    index.data_offset += np.uint64(far)
    pushing.piece.start += far
    pushing.pusher.start()
    pushing.push([999])
    finish(pushing)
    assert list(pushing.kernel.pages.values()) == [FILES["0999"]]


def test_a_piece_that_is_queued_in_parts_is_counted_once(tmp_path: Path) -> None:
    pushing = Pushing(tmp_path, pieces=1)
    before = counted("dropped")
    for row in range(10):
        pushing.push([row])
    assert pushing.pusher.queued == len(pushing.piece.data)
    pushing.pusher.start()
    finish(pushing)
    assert counted("dropped") == before
    assert len(pushing.kernel.pages) == 10
