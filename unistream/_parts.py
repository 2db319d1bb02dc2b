"""The producers and consumers of one client: entered so that nothing leaks, closed together.

Knows parts by their `close` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, Protocol

from unistream._link import Link
from unistream.errors import ClosedError

__all__ = ["Parts"]

CLOSE_SECONDS = 5.0
"""How long closing waits for parts that were being opened."""


class Part(Protocol):
    """A producer or a consumer."""

    def close(self) -> Coroutine[Any, Any, object]:
        """Close it; may raise an ExceptionGroup."""


class Parts:
    """
    What a client has open.

    Attributes:
        links: Every open part with its way to the broker, in the order of opening.
    """

    def __init__(self) -> None:
        self.links: dict[Part, Link] = {}
        self._openings: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Part]:
        return iter(list(self.links))

    async def enter(self, part: Part, opening: Coroutine[Any, Any, None]) -> None:
        """
        Run the opening of a part, so that closing the client ends it and cancelling it leaves nothing open.

        Raises:
            ClosedError: The client was closed meanwhile.
        """
        task = asyncio.get_running_loop().create_task(opening)
        self._openings.add(task)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is None:
                await part.close()
            raise
        finally:
            self._openings.discard(task)
        if task.cancelled():
            raise ClosedError("the client was closed meanwhile")
        task.result()

    async def close(self, *kinds: type[Part]) -> list[Exception]:
        """Close all parts, kind after kind, those that are being opened first; returns what they raised."""
        failures: list[Exception] = []
        for task in self._openings:
            task.cancel()
        if self._openings:
            await asyncio.wait(list(self._openings), timeout=CLOSE_SECONDS)
        for kind in kinds:
            parts = [part for part in self if isinstance(part, kind)]
            ends = await asyncio.gather(*(part.close() for part in parts), return_exceptions=True)
            failures += [end for end in ends if isinstance(end, Exception)]
        return failures
