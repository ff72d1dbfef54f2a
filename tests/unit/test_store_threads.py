"""desfs/store_threads.py: how long anybody waits for a store. No clock but the tests' own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from desfs.errors import DeadlineExceeded
from desfs.store.file import FileStore
from desfs.store_threads import Patience, StoreThreads

DEADLINE_S = 10.0


@pytest.fixture
def threads(tmp_path: Path) -> StoreThreads:
    (tmp_path / "object").write_bytes(b"bytes")
    return StoreThreads(FileStore(tmp_path), DEADLINE_S)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Time passes when nobody has anything else to do."""
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def answer(threads: StoreThreads) -> None:
    """What any request of the mount is: a GET that is answered."""
    threads.store.get_tail("object", 3)


async def given_up_after(patience: Patience, event: trio.Event) -> float:
    """Seconds until somebody gives up waiting for something that does not come, from now on."""
    began = trio.current_time()
    with pytest.raises(DeadlineExceeded):
        await patience.wait(event)
    return round(trio.current_time() - began, 6)


def test_a_silent_store_is_given_up_at_the_deadline(threads: StoreThreads) -> None:
    """What it has answered before the wait began does not count."""

    async def main() -> None:
        answer(threads)
        assert await given_up_after(threads.patience(), trio.Event()) == DEADLINE_S

    run(main)


@pytest.mark.parametrize("at_s", [0.0, 5.0, 9.9])
def test_one_that_answers_something_is_given_up_at_twice_the_deadline(threads: StoreThreads, at_s: float) -> None:
    """docs/semantics.md: When other requests were answered meanwhile, a read waits on, and answers EIO by twice the
    deadline."""

    async def main() -> None:
        patience = threads.patience()
        async with trio.open_nursery() as nursery:

            async def answer_later() -> None:
                await trio.sleep(at_s)
                answer(threads)

            nursery.start_soon(answer_later)
            assert await given_up_after(patience, trio.Event()) == 2 * DEADLINE_S

    run(main)


def test_an_answer_after_the_deadline_is_too_late(threads: StoreThreads) -> None:
    async def main() -> None:
        patience = threads.patience()
        assert await given_up_after(patience, trio.Event()) == DEADLINE_S
        answer(threads)

    run(main)


def test_patience_does_not_begin_anew_with_each_wait(threads: StoreThreads) -> None:
    """Who waits for one fetch after the other waits no longer in all."""

    async def main() -> None:
        patience = threads.patience()
        await trio.sleep(7)
        assert await given_up_after(patience, trio.Event()) == DEADLINE_S - 7
        patience = threads.patience()
        answer(threads)
        await trio.sleep(15)
        assert await given_up_after(patience, trio.Event()) == 2 * DEADLINE_S - 15

    run(main)


@pytest.mark.parametrize(("comes_after_s", "answers"), [(0.0, False), (9.9, False), (9.9, True), (19.9, True)])
def test_what_comes_in_time_is_waited_for(threads: StoreThreads, comes_after_s: float, answers: bool) -> None:
    async def main() -> None:
        patience, event = threads.patience(), trio.Event()
        if answers:
            answer(threads)
        async with trio.open_nursery() as nursery:

            async def come() -> None:
                await trio.sleep(comes_after_s)
                event.set()

            nursery.start_soon(come)
            await patience.wait(event)
            assert event.is_set()

    run(main)


def test_a_deadline_that_is_changed_holds_for_who_waits(threads: StoreThreads) -> None:
    """docs/operations.md, Signals: `deadline` takes effect at once."""

    async def main() -> None:
        patience = threads.patience()
        threads.deadline_s = 3.0
        assert await given_up_after(patience, trio.Event()) == 3.0

    run(main)
