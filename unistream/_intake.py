"""How deliveries come to a member: fetched for credit that is free, buffered, handed out in turn.

Fetches only for free credit, so the backlog stays at the broker. Knows the driver contract; settles nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Sequence
from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING, cast

from unistream._delivery import Delivery
from unistream._link import Link
from unistream._loans import Loans, finish
from unistream._turns import Turns
from unistream._watchdog import Watchdog
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import RawDelivery
from unistream.errors import ClosedError, ContractError, UnistreamError

if TYPE_CHECKING:
    from types import CodeType

    from unistream._consumer import Consumer
    from unistream._group import Group

__all__ = ["POLL_SECONDS", "Intake"]

POLL_SECONDS = 5.0
"""The longest that one fetch waits at the broker; shorter for short leases, since a lease counts from the request."""

_TOKEN = itemgetter(RawDelivery._fields.index("token"))
_ATTEMPT = itemgetter(RawDelivery._fields.index("attempt"))

_log = logging.getLogger("unistream.consumer")


class Intake(Loans):
    """What a member has fetched and not handed out yet, and who waits for it. The middle of `Consumer`."""

    _link: Link
    _watchdog: Watchdog
    _poll: float

    __slots__ = (
        "_buffer",
        "_driver",
        "_error",
        "_fetch",
        "_link",
        "_low",
        "_max_bytes",
        "_max_in_flight",
        "_paused",
        "_poll",
        "_turns",
        "_watchdog",
    )

    def __init__(self, group: Group, max_in_flight: int, max_in_flight_bytes: int) -> None:
        super().__init__(group)
        self._max_in_flight = max_in_flight
        self._max_bytes = max_in_flight_bytes
        self._low = max_in_flight // 4
        self._driver: ConsumerDriver | None = None
        self._paused = False
        self._error: UnistreamError | None = None
        # What is held and waits to be handed out, and who waits for it.
        self._buffer: deque[RawDelivery] = deque()
        self._waiting: deque[asyncio.Future[RawDelivery | None]] = deque()
        self._fetch: asyncio.Task[None] | None = None
        # Counts what the driver gave at once.
        self._turns = Turns()

    # Handing out

    def _next(self) -> RawDelivery | None:
        """The next one, if one may be handed out without waiting."""
        if self._closed or self._error is not None or self._driver is None:
            raise self._refusal()
        if asyncio._get_running_loop() is not self._loop:
            self._group._client._wrong_loop()
        if self._waiting or self._paused:
            return None
        if len(self._buffer) <= self._low:
            self._ask()
        return self._pop()

    def _pop(self) -> RawDelivery | None:
        buffer = self._buffer
        while buffer:
            raw = buffer[0]
            lease = self._held.get(raw.token)
            # By the clock too: after a stop of the whole process the timer may not have gone off yet.
            if lease is not None and self._now() < lease.deadline:
                size = len(raw.message.value)
                if self._bytes_out and self._bytes_out + size > self._max_bytes:
                    return None
                self._bytes_out += size
                self._out[raw.token] = size
                return buffer.popleft()
            buffer.popleft()
        return None

    def _pop_many(self, batch: list[Delivery], most: int, code: CodeType, line: int) -> None:
        """Add to `batch` what is at hand, up to `most` in all: `_pop` for many, handed out."""
        buffer, held, out = self._buffer, self._held, self._out
        total, most_bytes = self._bytes_out, self._max_bytes
        consumer = cast("Consumer", self)
        before, again, now = len(batch), 0, self._now()
        while buffer and len(batch) < most:
            raw = buffer[0]
            token = raw[1]
            lease = held.get(token)
            if lease is not None and now < lease.deadline:
                size = len(raw[0][1])
                if total and total + size > most_bytes:
                    break
                total += size
                out[token] = size
                if raw[4] > 1:
                    again += 1
                batch.append(Delivery(consumer, raw, lease, code, line))
            buffer.popleft()
        self._bytes_out = total
        self.stats.delivered += len(batch) - before
        self.stats.redelivered += again

    async def _wait(self, timeout: float | None) -> RawDelivery | None:
        waiter: asyncio.Future[RawDelivery | None] = self._loop.create_future()
        self._waiting.append(waiter)
        self._serve()
        timer = None if timeout is None else self._loop.call_later(max(timeout, 0), finish, waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # Cancelled in the moment in which it was served: what it got goes to the next.
            served = waiter.done() and not waiter.cancelled() and waiter.exception() is None
            if served and (raw := waiter.result()) is not None:
                self._bytes_out -= self._out.pop(raw.token, 0)
                self._buffer.appendleft(raw)
                self._serve()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _serve(self) -> None:
        """Give those who wait, in turn, what is at hand, and fetch for the rest."""
        waiting = self._waiting
        while waiting and not self._paused:
            if waiting[0].done():
                waiting.popleft()
                continue
            raw = self._pop()
            if raw is None:
                if not self._ask():
                    return
                continue
            waiting.popleft().set_result(raw)

    def _refusal(self) -> UnistreamError:
        if self._error is not None and not self._closed:
            return self._error
        return ClosedError(
            f"the consumer of {self._name} is closed, or was never entered: use `async with group.consumer()`",
            topic=self.topic,
        )

    # Fetching

    def _ask(self) -> bool:
        """Fetch for the credit that is free, unless there is a reason not to; True if something came at once."""
        free = self._max_in_flight - len(self._held)
        if (
            self._fetch is not None
            or free <= 0
            or (self._buffer and free * 2 < self._max_in_flight)
            or self._suspect is not None
            or self._paused
            or self._closed
            or self._driver is None
        ):
            return False
        self._settler.flush()
        started = self._loop.time()
        try:
            answer = self._driver.receive(free, self._poll)
        except Exception as error:
            # A driver that answers at once also refuses at once; both ways end in the same place.
            answer = _refused(error)
        if isinstance(answer, list):
            if self._link.error is not None:
                self._link.up()
            self._turns.unbroken += len(answer)
            self._admit(answer, started)
            return bool(answer)
        self._fetch = self._loop.create_task(self._fetching(answer, started))
        self._fetch.add_done_callback(self._fetched)
        return False

    async def _fetching(self, answer: Awaitable[list[RawDelivery]], started: float) -> None:
        try:
            raws = await answer
        except UnistreamError as error:
            if error.retryable:
                await self._link.wait(error)
            elif not self._closed:
                self._fail(error)
        except asyncio.CancelledError as error:
            if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                raise
            self._defect(error)
        except Exception as error:
            self._defect(error)
        else:
            self._link.up()
            self._admit(raws, started)

    def _fetched(self, task: asyncio.Task[None]) -> None:
        self._fetch = None
        if task.cancelled():
            return
        task.result()
        if not self._closed:
            self._serve()

    def _defect(self, cause: BaseException) -> None:
        """A driver let something through that is no error of the contract: nobody may wait for it for ever."""
        error = ContractError(f"the driver of {self._name} raised {cause!r}", topic=self.topic)
        error.__cause__ = cause
        self._fail(error)

    def _fail(self, error: UnistreamError) -> None:
        """It will not work again by itself: everybody who waits, now or later, is told (GRP-7)."""
        self._error = error
        self._link.fail(error)
        self._dismiss()

    def _dismiss(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(self._refusal())

    def _admit(self, raws: Sequence[RawDelivery], started: float) -> None:
        """Take up what was fetched: put it under a lease, and aside what has no attempt left."""
        if not raws:
            return
        lease = self._leases.grant(started, len(raws))
        self._held.update(zip(map(_TOKEN, raws), repeat(lease), strict=False))
        limit = self._group.retry.max_attempts
        if raws[0].suspect:
            self._suspect = raws[0].token
        if limit is None or max(map(_ATTEMPT, raws)) <= limit:
            self._buffer.extend(raws)
        else:
            for raw in raws:
                if raw.attempt <= limit:
                    self._buffer.append(raw)
                else:
                    delivery = Delivery(cast("Consumer", self), raw, lease)
                    self._dead.bury_later(delivery, "no attempt is left, and the last one ended without being settled")
        self._settler.watch(self._leases.wake_at(lease))
        self._watchdog.wake()
        if self._waiting:
            self._serve()


async def _refused(error: Exception) -> list[RawDelivery]:
    raise error
