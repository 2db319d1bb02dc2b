"""What a client tells about itself: health, and the events that applications listen to.

Knows links and events; contacts nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple
from weakref import WeakSet

from unistream.driver.types import Event

__all__ = ["EVENTS_KEPT", "Check", "Health", "Listeners", "health_of"]

EVENTS_KEPT = 1000


class Check(NamedTuple):
    """One part of `Health`: what was looked at, and what is wrong with it if anything."""

    name: str
    ok: bool
    detail: str = ""


class Health(NamedTuple):
    """
    Whether a client does its work.

    Attributes:
        ok: Every check is.
        state: `connected`, `reconnecting` (something will come back by itself), `failed`, or `closed`.
        checks: The connection, and every producer and consumer.
    """

    ok: bool
    state: str
    checks: tuple[Check, ...]


def health_of(parts: Iterable[tuple[str, Exception | None]]) -> Health:
    """The health of a client whose parts have these names, and these errors where something is wrong."""
    checks = []
    state = "connected"
    for name, error in parts:
        checks.append(Check(name, error is None, str(error or "")))
        if error is not None and state != "failed":
            state = "reconnecting" if getattr(error, "retryable", False) else "failed"
    return Health(state == "connected", state, tuple(checks))


class Listeners:
    """Those who listen to a client's events; one who lets go of its iterator is forgotten."""

    def __init__(self) -> None:
        self._all: WeakSet[_Listener] = WeakSet()

    def add(self) -> AsyncIterator[Event]:
        """A new one, who hears what happens from now on."""
        listener = _Listener()
        self._all.add(listener)
        return listener

    def tell(self, event: Event) -> None:
        """Tell everybody; waits for nobody."""
        for listener in self._all:
            listener.put(event)

    def end(self) -> None:
        """Let every iteration end, after what was told before."""
        for listener in self._all:
            listener.end()
        self._all = WeakSet()


class _Listener(AsyncIterator[Event]):
    """One listener's queue of events."""

    def __init__(self) -> None:
        self._queue: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._news = asyncio.Event()
        self._ended = False

    def put(self, event: Event) -> None:
        self._queue.append(event)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._queue.popleft()
