"""Whether one side of a client reaches its broker: waiting times, events and log lines of reconnecting."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from unistream.core.backoff import RECONNECT
from unistream.driver.types import Connected, Disconnected, Event, HealthChanged

__all__ = ["Link"]


class Link:
    """
    The state of one producer's or consumer's way to the broker.

    One log line when it goes down and one when it is back, whatever the number of tries between (END-3).

    Args:
        what: Names it in events, log lines and `Client.health()`, for example `"producer orders"`.
        emit: Takes the events.
        logger: Takes the log lines.
    """

    def __init__(self, what: str, emit: Callable[[Event], None], logger: logging.Logger) -> None:
        self.what = what
        self.error: Exception | None = None
        self._emit = emit
        self._log = logger
        self._tries = 0
        self._failed = False
        # What `HealthChanged` events said last.
        self.told = True
        # Those who wait for their next try.
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def ok(self) -> bool:
        """Whether the last call reached the broker."""
        return self.error is None

    def down(self, error: Exception) -> float:
        """A call failed to reach the broker; returns the seconds to wait before the next one."""
        self._tries += 1
        if self._failed:
            return RECONNECT.delay(self._tries, random.random())
        if self.error is None:
            self._log.warning("%s: connection lost, reconnecting: %s", self.what, error)
            self._emit(Disconnected(self.what, str(error)))
        self.error = error
        return RECONNECT.delay(self._tries, random.random())

    def up(self) -> None:
        """A call reached the broker."""
        if self._failed:
            # For good: a settle may still reach a broker whose group is gone.
            return
        if self.error is not None:
            self._log.warning("%s: connected again after %d tries", self.what, self._tries)
            self._emit(Connected(self.what))
            self.error = None
        self._tries = 0
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """It will not come back by itself: the topic or group is gone, or access was refused."""
        if self.error is None or type(self.error) is not type(error):
            self._log.error("%s: %s", self.what, error)
        self.error = error
        self._failed = True
        if self.told:
            self.told = False
            self._emit(HealthChanged(self.what, False, str(error)))

    async def wait(self, error: Exception) -> None:
        """
        Note that the broker was not reached, and wait the backoff, but no longer than until another call reaches it.

        A settle that slept on while its consumer fetches again would let leases run out beside a broker that is up.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await asyncio.wait([waiter], timeout=self.down(error))
        finally:
            self._waiting.remove(waiter)
