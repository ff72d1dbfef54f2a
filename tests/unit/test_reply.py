"""desfs/operations.py: whatever becomes of a handler, its request has an answer."""

from __future__ import annotations

import errno

import pyfuse3
import pytest
import trio

from desfs.errors import NoSuchPath
from desfs.operations import reply
from desfs.requests import OpenRequests


class Handlers:
    """What the wrapper needs of the operations, and handlers that end in every way."""

    def __init__(self) -> None:
        self.requests = OpenRequests()
        self.is_refusing = False

    @reply("lookup")
    async def waits(self) -> None:
        await trio.sleep_forever()

    @reply("lookup")
    async def waits_for_tasks(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    @reply("lookup")
    async def fails_while_it_is_cancelled(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError

    @reply("lookup")
    async def finds_nothing(self) -> None:
        raise NoSuchPath("nothing")

    @reply("lookup")
    async def answers(self) -> int:
        return 1


def answer_of(name: str, handlers: Handlers) -> int:
    """The errno that the kernel is told, 0 for success; cancelled at once, if it waits."""
    found: list[int] = []

    async def serve() -> None:
        with trio.move_on_after(0):
            try:
                await getattr(handlers, name)()
                found.append(0)
            except pyfuse3.FUSEError as error:
                found.append(error.errno)

    trio.run(serve)
    (code,) = found
    assert handlers.requests.oldest() is None
    return code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("waits", errno.ENOTCONN),
        ("waits_for_tasks", errno.ENOTCONN),
        ("fails_while_it_is_cancelled", errno.EIO),
        ("finds_nothing", errno.ENOENT),
        ("answers", 0),
    ],
)
def test_every_request_is_answered(name: str, code: int, announced_logs: list[str]) -> None:
    announced_logs.append("unexpected error")
    assert answer_of(name, Handlers()) == code


def test_when_it_refuses_nothing_is_begun() -> None:
    handlers = Handlers()
    handlers.is_refusing = True
    assert answer_of("answers", handlers) == errno.ENOTCONN
