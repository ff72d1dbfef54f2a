"""A catalog whose calls are counted, and that fails or stands still when a test wants it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from assignment.catalog import Catalog
from assignment.errors import AssignmentError


class WatchedCatalog:
    """The catalog inside; use `watched()` for what takes a Catalog."""

    def __init__(self, inner: Catalog) -> None:
        self._inner = inner
        self.calls: list[str] = []
        """The methods that were called, in order, those that failed too."""
        self.failure: AssignmentError | None = None
        """What every call raises, `close` excepted."""
        self.gates: dict[str, asyncio.Event] = {}
        """Calls of these methods wait for their event before they do anything."""
        self.waiting: asyncio.Queue[str] = asyncio.Queue()
        """The method of each call that has come to its gate."""

    def watched(self) -> Catalog:
        return cast("Catalog", self)

    async def close(self) -> None:
        await self._inner.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._inner, name)

        async def call(*args: Any, **named: Any) -> Any:
            self.calls.append(name)
            if name in self.gates:
                self.waiting.put_nowait(name)
                await self.gates[name].wait()
            if self.failure is not None:
                raise self.failure
            return await method(*args, **named)

        return call
