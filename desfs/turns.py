"""Who goes when, among those who open and list a day. Trio thread only: no await between looking and taking."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from desfs.errors import StoreError


class Turns:
    """One at a time asks the store; those who waited meanwhile share its failure instead of trying in their turn, or
    the last of them would wait for as many deadlines as there are others."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._failed_at = -math.inf
        self._failure: StoreError | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        asked_at = trio.current_time()
        async with self._lock:
            if self._failure is not None and self._failed_at >= asked_at:
                raise self._failure
            try:
                yield
            except StoreError as error:
                self._failed_at, self._failure = trio.current_time(), error
                raise


class Gate:
    """Many are in together, or one is alone; who comes after one that waits to be alone waits for it."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = False
        self._waiting = 0
        self._moved = trio.Event()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        while self._alone or self._waiting:
            await self._moved.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._wake()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            while self._alone or self._inside:
                await self._moved.wait()
            self._alone = True
        finally:  # a cancelled one lets those in that came after it
            self._waiting -= 1
            self._wake()
        try:
            yield
        finally:
            self._alone = False
            self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = trio.Event()
