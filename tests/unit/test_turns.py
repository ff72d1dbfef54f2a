"""Who goes when: desfs/turns.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from desfs.errors import StoreUnavailable
from desfs.turns import Gate, Turns


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


STEPS = st.lists(
    st.tuples(st.sampled_from(["together", "alone"]), st.integers(0, 5), st.integers(1, 5), st.integers(1, 9)),
    max_size=8,
)


@given(STEPS)
@settings(deadline=None)
def test_one_is_alone_or_many_are_together(steps: list[tuple[str, int, int, int]]) -> None:
    """Whoever comes when, stays how long, and gives up when: nobody is beside one that is alone, and all come to an
    end."""
    inside = {"together": 0, "alone": 0}
    ended = 0

    async def main() -> None:
        gate = Gate()

        async def visit(kind: str, comes: int, stays: int, patience: int) -> None:
            nonlocal ended
            await trio.sleep(comes)
            with trio.move_on_after(patience):
                async with gate.together() if kind == "together" else gate.alone():
                    inside[kind] += 1
                    assert inside["alone"] == 0 or inside == {"together": 0, "alone": 1}
                    try:
                        await trio.sleep(stays)
                    finally:
                        inside[kind] -= 1
            ended += 1

        async with trio.open_nursery() as nursery:
            for step in steps:
                nursery.start_soon(visit, *step)
        with trio.fail_after(1):  # nothing is left behind
            async with gate.alone():
                pass
            async with gate.together():
                pass

    run(main)
    assert ended == len(steps)


def test_who_waits_to_be_alone_is_not_overtaken() -> None:
    order: list[str] = []

    async def main() -> None:
        gate = Gate()

        async def visit(name: str, comes: float) -> None:
            await trio.sleep(comes)
            async with gate.alone() if name == "alone" else gate.together():
                order.append(name)
                await trio.sleep(10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(visit, "first", 0)
            nursery.start_soon(visit, "beside it", 1)
            nursery.start_soon(visit, "alone", 2)
            nursery.start_soon(visit, "later", 3)

    run(main)
    assert order == ["first", "beside it", "alone", "later"]


def test_those_who_waited_share_a_failure() -> None:
    tried: list[float] = []

    async def main() -> None:
        turns = Turns()

        async def fail() -> None:
            async with turns.turn():
                tried.append(trio.current_time())
                await trio.sleep(1)
                raise StoreUnavailable("down")

        async def ask() -> None:
            with pytest.raises(StoreUnavailable):
                await fail()

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert len(tried) == 1
        await trio.sleep(1)
        await ask()
        assert len(tried) == 2

    run(main)
