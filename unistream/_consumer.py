"""The consuming side as applications see it: one member of a group, from joining to leaving.

Knows no broker. One event loop touches it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Generator, Iterable
from typing import TYPE_CHECKING, Any, cast

from unistream._dead_letters import DeadLetters
from unistream._delivery import Delivery
from unistream._intake import Intake, not_open
from unistream._link import Link
from unistream._loans import Loans
from unistream._settler import LEAVE_SECONDS, Settler
from unistream._stats import ConsumerStats, DrainReport
from unistream._turns import TURN
from unistream.driver.types import RawDelivery, Token
from unistream.errors import ClosedError, SettleError

if TYPE_CHECKING:
    from types import TracebackType

    from unistream._group import Group

__all__ = ["Consumer"]

_log = logging.getLogger("unistream.consumer")


class Consumer:
    """
    One member of a group. An async context manager that joins on entry; an async iterator of deliveries.

    Made by `Group.consumer`.

    Attributes:
        topic: Name of the topic.
        group_name: Name of the group.
        stats: What it has seen.
    """

    def __init__(self, group: Group, max_in_flight: int, max_in_flight_bytes: int) -> None:
        self.topic = group.topic
        self.group_name = group.name or ""
        self.stats = ConsumerStats()
        self._group = group
        self._max_in_flight = max_in_flight
        self._max_bytes = max_in_flight_bytes
        self._entered = False
        self._closed = False
        # There once it has joined.
        self._intake: Intake | None = None
        # The handlers of `Group.run`, each with what it works on.
        self._handlers: dict[asyncio.Task[Any], Token] = {}
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
        spec, topic = await group._ensure()
        self.group_name = spec.name
        loans = Loans(group, spec, self.stats, client._loop)
        link = Link(f"consumer {self._name}", client._emit, _log)
        dead = await DeadLetters.open(group, spec)
        try:
            driver = await client._driver.consumer(spec, topic, max_in_flight=self._max_in_flight, lost=loans.lost)
            if self._closed:
                await driver.close()
                raise not_open(self._name, self.topic)
        except BaseException:
            await dead.close()
            raise
        watchdog = client._watchdog
        intake = Intake(
            loans, driver, link, watchdog, max_in_flight=self._max_in_flight, max_in_flight_bytes=self._max_bytes
        )
        loans.begin(Settler(loans, intake, driver, link), dead, intake)
        self._intake = intake
        watchdog.add(spec.lease, loans.any_held)
        client._parts.links[self] = link

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Receiving

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        try:
            intake = self._joined()
            if intake.turns.unbroken >= TURN:
                await intake.turns.take()
            raw = intake.next() or await intake.wait(None)
        except ClosedError:
            if self._closed:
                raise StopAsyncIteration from None
            raise
        return intake.hand_out(cast(RawDelivery, raw), sys._getframe(1))

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
        intake = self._joined()
        if intake.turns.unbroken >= TURN:
            await intake.turns.take()
        raw = intake.next() or await intake.wait(timeout)
        return None if raw is None else intake.hand_out(raw, sys._getframe(1))

    async def receive_many(self, max: int, timeout: float | None = None) -> list[Delivery]:
        """
        Up to `max` deliveries, waiting for the first as `receive` does.

        Returns:
            At least one, or an empty list when the time is up.

        Raises, Cancellation, Concurrency: As `receive`.
        """
        if max < 1:
            raise ValueError(f"receive_many(max={max}): ask for 1 or more")
        intake = self._joined()
        if intake.turns.unbroken >= TURN:
            await intake.turns.take()
        raw = intake.next() or await intake.wait(timeout)
        frame = sys._getframe(1)
        batch: list[Delivery] = []
        while raw is not None:
            batch.append(intake.hand_out(raw, frame))
            raw = intake.next_many(batch, max, frame)
        return batch

    async def ack_many(self, deliveries: Iterable[Delivery], *, confirm: bool = False) -> list[SettleError | None]:
        """
        Done with all of these: `Delivery.ack` for each, in one batch.

        Args:
            deliveries: What `receive_many` gave, or any part of it.
            confirm: Wait until the broker holds the acks.

        Returns:
            One outcome per delivery, in order: `None`, or the error that its `ack` would have raised. An error of one
            keeps none of the others from being acked.

        Raises:
            ClosedError: The consumer was never entered.
            UnsupportedError: `confirm`, and the backend can't.

        Cancellation: The acks are sent all the same.
        """
        loans = self._joined().loans
        if confirm:
            self._group._require("ack_confirm", "ack_many(confirm=True)")
        return await loans.ack_many(list(deliveries), confirm)

    def pause(self) -> Awaitable[None]:
        """Hand out nothing more until `resume`, at once; membership, and the leases of what is held, are kept."""
        intake = self._joined()
        intake.loans.check_loop()
        intake.pause()
        return DONE

    def resume(self) -> Awaitable[None]:
        """Go on after `pause`, at once."""
        intake = self._joined()
        intake.loans.check_loop()
        intake.resume()
        return DONE

    def _joined(self) -> Intake:
        if self._intake is None:
            raise not_open(self._name, self.topic)
        return self._intake

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
        intake = self._intake
        if intake is None:
            self._closed = True
            return DrainReport(0, 0, 0)
        loans = intake.loans
        loans.check_loop()
        handled = self._handlers.get(cast("asyncio.Task[Any]", asyncio.current_task()))
        if handled is not None:
            loans.exempt(handled)
        if self._leaving is None:
            self._closed = loans.closed = True
            intake.dismiss()
            self._leaving = loans.loop.create_task(self._leave(intake, drain))
        leaving = self._leaving
        try:
            return await asyncio.shield(leaving)
        except asyncio.CancelledError:
            loans.hurry()
            await asyncio.wait([leaving])
            raise

    async def _leave(self, intake: Intake, drain: float) -> DrainReport:
        loans = intake.loans
        try:
            await intake.stop(LEAVE_SECONDS)
            if drain > 0:
                await loans.drained(drain)
            await loans.dead.settle(LEAVE_SECONDS)
            loans.give_back(list(loans.held))
            abandoned = await loans.settler.close()
        finally:
            client = self._group._client
            client._watchdog.remove(loans.any_held)
            client._parts.links.pop(self, None)
            try:
                await intake.driver.close()
            finally:
                await loans.dead.close()
        handled = self.stats.acked + self.stats.nacked + self.stats.rejected
        return DrainReport(handled, loans.given_back - abandoned, abandoned)

    @property
    def _name(self) -> str:
        return f"{self.topic}/{self.group_name or 'an ephemeral group'}"


class _Done:
    """An awaitable for calls that took effect before they returned."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


DONE: Awaitable[None] = _Done()
