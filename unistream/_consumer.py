"""The consuming side as applications see it: one member of a group, from joining to leaving.

Knows no broker. One event loop touches it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Generator
from typing import TYPE_CHECKING, Any, cast

from unistream._dead_letters import DeadLetters
from unistream._delivery import Delivery
from unistream._intake import POLL_SECONDS, Intake
from unistream._link import Link
from unistream._loans import DrainReport, finish
from unistream._settler import LEAVE_SECONDS, Settler
from unistream._turns import TURN
from unistream.core.leases import Lease, Leases
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import RawDelivery, Token, Verb
from unistream.errors import ClosedError

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from unistream._group import Group

__all__ = ["Consumer"]

_log = logging.getLogger("unistream.consumer")


class Consumer(Intake):
    """
    One member of a group. An async context manager that joins on entry; an async iterator of deliveries.

    Made by `Group.consumer`.

    Attributes:
        topic: Name of the topic.
        group_name: Name of the group.
        stats: What it has seen.
    """

    __slots__ = (
        "_entered",
        "_handlers",
        "_in_a_hurry",
        "_leaving",
    )

    def __init__(self, group: Group, max_in_flight: int, max_in_flight_bytes: int) -> None:
        super().__init__(group, max_in_flight, max_in_flight_bytes)
        self._entered = False
        # The handlers of `Group.run`, each with what it works on.
        self._handlers: dict[asyncio.Task[Any], Token] = {}
        self._in_a_hurry = False
        self._leaving: asyncio.Task[DrainReport] | None = None

    async def __aenter__(self) -> Consumer:
        client = self._group._client
        client._use()
        if self._entered or self._closed:
            raise ClosedError(f"this consumer of {self._name} was entered or closed before; make another")
        self._entered = True
        await client._parts.enter(self, self._join())
        return self

    async def _join(self) -> None:
        group = self._group
        client = group._client
        self._loop = client._loop
        # The clock of asyncio's own loops, without the frame around it.
        own = getattr(type(self._loop), "time", None) is asyncio.BaseEventLoop.time
        self._now = time.monotonic if own else self._loop.time
        spec, topic = await group._ensure()
        self.group_name = spec.name
        self._leases = Leases(spec.lease, spec.max_lease)
        self._poll = min(POLL_SECONDS, spec.lease / 4)
        self._link = Link(f"consumer {self._name}", client._emit, _log)
        self._dead = await DeadLetters.open(group, spec)
        try:
            driver = await client._driver.consumer(spec, topic, max_in_flight=self._max_in_flight, lost=self._lost)
            if self._closed:
                await driver.close()
                raise self._refusal()
        except BaseException:
            await self._dead.close()
            raise
        self._driver = driver
        self._settler = Settler(self, driver, self._leases, self._link)
        self._watchdog = client._watchdog
        self._watchdog.add(spec.lease, self._holds_any)
        client._parts.links[self] = self._link

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Receiving

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        if self._turns.unbroken >= TURN:
            await self._turns.take()
        try:
            raw = self._next() or await self._wait(None)
        except ClosedError:
            if self._closed:
                raise StopAsyncIteration from None
            raise
        return self._hand_out(cast(RawDelivery, raw), sys._getframe(1))

    async def receive(self, timeout: float | None = None) -> Delivery | None:
        """
        The next delivery.

        Args:
            timeout: Seconds to wait; `None`: for as long as it takes; 0: what is at hand.

        Returns:
            `None` when the time is up, also when the window (`max_in_flight`) was full all the while.

        Raises:
            ClosedError: The consumer is closed, also while waiting.
            TopicMissingError, GroupMissingError: It was deleted.

        Cancellation: Nothing is lost; the next call gets it.

        Concurrency: Several callers are served in turn.
        """
        if self._turns.unbroken >= TURN:
            await self._turns.take()
        raw = self._next() or await self._wait(timeout)
        return None if raw is None else self._hand_out(raw, sys._getframe(1))

    async def receive_many(self, max: int, timeout: float | None = None) -> list[Delivery]:
        """
        Up to `max` deliveries, waiting for the first as `receive` does.

        Returns:
            At least one, or an empty list when the time is up.

        Raises, Cancellation, Concurrency: As `receive`.
        """
        if max < 1:
            raise ValueError(f"receive_many(max={max}): ask for 1 or more")
        if self._turns.unbroken >= TURN:
            await self._turns.take()
        raw = self._next() or await self._wait(timeout)
        frame = sys._getframe(1)
        batch: list[Delivery] = []
        while raw is not None:
            batch.append(self._hand_out(raw, frame))
            self._pop_many(batch, max, frame.f_code, frame.f_lineno)
            # Once there is something, nothing that happens meanwhile is raised: it would be lost.
            over = len(batch) == max or self._closed or self._error is not None
            raw = None if over else self._next()
        return batch

    def pause(self) -> Awaitable[None]:
        """Hand out nothing more until `resume`, at once; membership, and the leases of what is held, are kept."""
        self._check_joined()
        self._paused = True
        return DONE

    def resume(self) -> Awaitable[None]:
        """Go on after `pause`, at once."""
        self._check_joined()
        self._paused = False
        self._serve()
        return DONE

    def _hand_out(self, raw: RawDelivery, frame: FrameType) -> Delivery:
        """Make the delivery; `frame` is the application's, where it awaits it."""
        stats = self.stats
        stats.delivered += 1
        if raw.attempt > 1:
            stats.redelivered += 1
        lease = self._held.get(raw.token)
        if lease is None:
            # Lost since it was fetched: it says so when it is asked.
            lease = Lease(self._now(), self._now(), 0)
        return Delivery(self, raw, lease, frame.f_code, frame.f_lineno)

    def _check_joined(self) -> None:
        if self._driver is None:
            raise self._refusal()
        self._check_loop()

    # Leaving

    async def close(self, drain: float = 0.0) -> DrainReport:
        """
        Leave the group: take nothing new, let the application settle what it holds until `drain`, give the rest back.

        Idempotent. From inside a handler of `Group.run` it does not wait for that handler.

        Args:
            drain: Seconds to wait for deliveries that were handed out.

        Returns:
            What became of this consumer's deliveries.

        Cancellation: The rest is given back at once, then CancelledError goes on.
        """
        if self._driver is None:
            self._closed = True
            return DrainReport(0, 0, 0)
        self._check_loop()
        handled = self._handlers.get(cast("asyncio.Task[Any]", asyncio.current_task()))
        if handled is not None:
            self._exempt.add(handled)
            self._look_if_drained()
        if self._leaving is None:
            self._closed = True
            self._dismiss()
            self._leaving = self._loop.create_task(self._leave(self._driver, drain))
        leaving = self._leaving
        try:
            return await asyncio.shield(leaving)
        except asyncio.CancelledError:
            self._in_a_hurry = True
            if self._all_back is not None:
                finish(self._all_back)
            await asyncio.wait([leaving])
            raise

    async def _leave(self, driver: ConsumerDriver, drain: float) -> DrainReport:
        try:
            if self._fetch is not None:
                self._fetch.cancel()
                await asyncio.wait([self._fetch], timeout=LEAVE_SECONDS)
            self._return([raw.token for raw in self._buffer])
            self._buffer.clear()
            if drain > 0 and not self._in_a_hurry and self._out.keys() - self._exempt:
                self._all_back = self._loop.create_future()
                timer = self._loop.call_later(drain, finish, self._all_back)
                await self._all_back
                timer.cancel()
            await self._dead.settle(LEAVE_SECONDS)
            self._return(list(self._held))
            abandoned = await self._settler.close()
        finally:
            self._watchdog.remove(self._holds_any)
            self._group._client._parts.links.pop(self, None)
            try:
                await driver.close()
            finally:
                await self._dead.close()
        stats = self.stats
        handled = stats.acked + stats.nacked + stats.rejected
        return DrainReport(handled, self._given_back - abandoned, abandoned)

    def _return(self, tokens: Collection[Token]) -> None:
        """Give loans back unsettled."""
        for token in tokens:
            if token in self._held:
                self._settler.put(token, Verb.RELEASE)
                self._let_go(token)
                self._given_back += 1


class _Done:
    """An awaitable for calls that took effect before they returned."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


DONE: Awaitable[None] = _Done()
