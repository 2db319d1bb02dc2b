"""How deliveries come to a member: fetched for credit that is free, buffered, handed out in turn.

Fetches only for free credit, so the backlog stays at the broker. Knows the driver contract; settles nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Sequence
from itertools import islice, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, TypeGuard, cast

from unistream._delivery import Delivery
from unistream._link import Link
from unistream._loans import Loans, finish
from unistream._turns import Turns, follow
from unistream._watchdog import Watchdog
from unistream.core.leases import Lease
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import RawDelivery
from unistream.errors import ClosedError, ContractError, UnistreamError

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["POLL_SECONDS", "Intake", "not_open"]

POLL_SECONDS = 5.0
"""The longest that one fetch waits at the broker; shorter for short leases, since a lease counts from the request."""

_TOKEN = itemgetter(RawDelivery._fields.index("token"))
_ATTEMPT = itemgetter(RawDelivery._fields.index("attempt"))

_log = logging.getLogger("unistream.consumer")


class Intake:
    """
    What a member has fetched and not handed out yet, and who waits for it.

    Attributes:
        loans: What the member holds.
        driver: Fetches; see `ConsumerDriver`.
        waiting: Who waits for a delivery, in turn.
        turns: Counts what the driver gave at once.
        buffer: What is held and waits to be handed out.
        error: Why nothing will come any more.
    """

    __slots__ = (
        "_fetch",
        "_link",
        "_low",
        "_max_bytes",
        "_max_in_flight",
        "_paused",
        "_poll",
        "_watchdog",
        "buffer",
        "driver",
        "error",
        "loans",
        "turns",
        "waiting",
    )

    def __init__(
        self,
        loans: Loans,
        driver: ConsumerDriver,
        link: Link,
        watchdog: Watchdog,
        *,
        max_in_flight: int,
        max_in_flight_bytes: int,
    ) -> None:
        self.loans = loans
        self.driver = driver
        self._link = link
        self._watchdog = watchdog
        self._max_in_flight = max_in_flight
        self._max_bytes = max_in_flight_bytes
        self._low = max_in_flight // 4
        self._poll = min(POLL_SECONDS, loans.leases.lease / 4)
        self._paused = False
        self._fetch: asyncio.Task[None] | None = None
        self.buffer: deque[RawDelivery] = deque()
        self.waiting: deque[asyncio.Future[RawDelivery | None]] = deque()
        self.turns = Turns()
        self.error: UnistreamError | None = None

    # Handing out

    def next(self) -> RawDelivery | None:
        """The next one, if one may be handed out without waiting."""
        loans = self.loans
        if loans.closed or self.error is not None:
            raise self._refusal()
        loans.check_loop()
        if self.waiting or self._paused:
            return None
        if len(self.buffer) <= self._low:
            self._ask()
        return self._pop()

    def hand_out(self, raw: RawDelivery, frame: FrameType) -> Delivery:
        """Make the delivery; `frame` is the application's, where it awaits it."""
        loans = self.loans
        stats = loans.stats
        stats.delivered += 1
        if raw.attempt > 1:
            stats.redelivered += 1
        lease = loans.held.get(raw.token)
        if lease is None:
            # Lost since it was fetched: it says so when it is asked.
            lease = Lease(loans.now(), loans.now(), 0)
        return Delivery(loans, raw, lease, frame.f_code, frame.f_lineno)

    def _pop(self) -> RawDelivery | None:
        loans, buffer = self.loans, self.buffer
        while buffer:
            raw = buffer[0]
            lease = loans.held.get(raw.token)
            # By the clock too: after a stop of the whole process the timer may not have gone off yet.
            if lease is not None and loans.now() < lease.deadline:
                size = len(raw.message.value)
                if loans.bytes_out and loans.bytes_out + size > self._max_bytes:
                    return None
                loans.bytes_out += size
                loans.out[raw.token] = size
                return buffer.popleft()
            buffer.popleft()
        return None

    def next_many(self, batch: list[Delivery], most: int, frame: FrameType) -> RawDelivery | None:
        """
        Add to `batch` what is at hand, up to `most` in all: `_pop` for many, handed out.

        Returns:
            One more, if there is one after all.
        """
        loans = self.loans
        raws = list(islice(self.buffer, most - len(batch)))
        tokens = list(map(_TOKEN, raws))
        sizes = [len(raw[0][1]) for raw in raws]
        leases = list(map(loans.held.get, tokens))
        total = loans.bytes_out + sum(sizes)
        # All at once if that needs no second thought, as nearly always; else one by one.
        if raws and total <= self._max_bytes and _all_stand(leases, loans.now()):
            for _ in raws:
                self.buffer.popleft()
            loans.out.update(zip(tokens, sizes, strict=True))
            loans.bytes_out = total
            loans.stats.delivered += len(raws)
            loans.stats.redelivered += len(raws) - list(map(_ATTEMPT, raws)).count(1)
            code, line = frame.f_code, frame.f_lineno
            batch += [Delivery(loans, raw, lease, code, line) for raw, lease in zip(raws, leases, strict=True)]
        # Once there is something, nothing that happens meanwhile is raised: it would be lost.
        over = len(batch) == most or loans.closed or self.error is not None
        return None if over else self.next()

    async def wait(self, timeout: float | None) -> RawDelivery | None:
        """The next one; `None` when `timeout` seconds have passed. Cancelled, it loses nothing."""
        loop = self.loans.loop
        waiter: asyncio.Future[RawDelivery | None] = loop.create_future()
        self.waiting.append(waiter)
        self.serve()
        timer = None if timeout is None else loop.call_later(max(timeout, 0), finish, waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # Cancelled in the moment in which it was served: what it got goes to the next.
            served = waiter.done() and not waiter.cancelled() and waiter.exception() is None
            if served and (raw := waiter.result()) is not None:
                self.loans.bytes_out -= self.loans.out.pop(raw.token, 0)
                self.buffer.appendleft(raw)
                self.serve()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if waiter in self.waiting:
                self.waiting.remove(waiter)

    def serve(self) -> None:
        """Give those who wait, in turn, what is at hand, and fetch for the rest."""
        waiting = self.waiting
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

    def pause(self) -> None:
        """Hand out nothing more until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        self.serve()

    def _refusal(self) -> UnistreamError:
        if self.error is not None and not self.loans.closed:
            return self.error
        return not_open(self.loans.name, self.loans.topic)

    # Fetching

    def _ask(self) -> bool:
        """Fetch for the credit that is free, unless there is a reason not to; True if something came at once."""
        loans = self.loans
        free = self._max_in_flight - len(loans.held)
        if loans.group.retry.max_attempts == 1:
            # What is held when its member dies has had its only attempt: nothing is fetched that nobody asks for.
            free = min(free, max(1, len(self.waiting)) - len(self.buffer))
        if (
            self._fetch is not None
            or free <= 0
            or (self.buffer and free * 2 < self._max_in_flight)
            or loans.suspect is not None
            or self._paused
            or loans.closed
        ):
            return False
        loans.settler.flush()
        started = loans.loop.time()
        try:
            answer = self.driver.receive(free, self._poll)
        except Exception as error:
            # A driver that answers at once also refuses at once; both ways end in the same place.
            answer = _refused(error)
        if isinstance(answer, list):
            if self._link.error is not None:
                self._link.up()
            self.turns.unbroken += len(answer)
            self._admit(answer, started)
            return bool(answer)
        self._fetch = follow(self._fetching(answer, started), answer, self._fetched)
        return False

    async def _fetching(self, answer: Awaitable[list[RawDelivery]], started: float) -> None:
        try:
            raws = await answer
        except UnistreamError as error:
            if error.retryable:
                await self._link.wait(error)
            elif not self.loans.closed:
                self.fail(error)
        except asyncio.CancelledError as error:
            if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                raise
            self.defect(error)
        except Exception as error:
            self.defect(error)
        else:
            self._link.up()
            self._admit(raws, started)

    def _fetched(self, task: asyncio.Task[None]) -> None:
        self._fetch = None
        if task.cancelled():
            return
        task.result()
        if not self.loans.closed:
            self.serve()

    def defect(self, cause: BaseException) -> None:
        """A driver let something through that is no error of the contract: nobody may wait for it for ever."""
        error = ContractError(f"the driver of {self.loans.name} raised {cause!r}", topic=self.loans.topic)
        error.__cause__ = cause
        self.fail(error)

    def fail(self, error: UnistreamError) -> None:
        """It will not work again by itself: everybody who waits, now or later, is told (GRP-7)."""
        self.error = error
        self._link.fail(error)
        self.dismiss()

    def dismiss(self) -> None:
        """Tell everybody who waits that nothing will come."""
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_exception(self._refusal())

    def _admit(self, raws: Sequence[RawDelivery], started: float) -> None:
        """Take up what was fetched: put it under a lease, and aside what has no attempt left."""
        if not raws:
            return
        loans = self.loans
        lease = loans.leases.grant(started, len(raws))
        loans.held.update(zip(map(_TOKEN, raws), repeat(lease), strict=False))
        limit = loans.group.retry.max_attempts
        if raws[0].suspect:
            loans.suspect = raws[0].token
        if limit is None or max(map(_ATTEMPT, raws)) <= limit:
            self.buffer.extend(raws)
        else:
            for raw in raws:
                if raw.attempt <= limit:
                    self.buffer.append(raw)
                else:
                    delivery = Delivery(loans, raw, lease)
                    loans.dead.bury_later(delivery, "no attempt is left, and the last one ended without being settled")
        loans.settler.watch(loans.leases.wake_at(lease))
        self._watchdog.wake()
        if self.waiting:
            self.serve()

    # Leaving

    async def stop(self, timeout: float) -> None:
        """End the fetch that is under way, within `timeout` seconds, and give back what was not handed out."""
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait([self._fetch], timeout=timeout)
        self.loans.give_back([raw.token for raw in self.buffer])
        self.buffer.clear()


def not_open(name: str, topic: str) -> ClosedError:
    """What whoever asks a consumer that has left, or never joined, is told."""
    return ClosedError(
        f"the consumer of {name} is closed, or was never entered: use `async with group.consumer()`", topic=topic
    )


def _all_stand(leases: list[Lease | None], now: float) -> TypeGuard[list[Lease]]:
    return all(lease is not None and now < lease.deadline for lease in set(leases))


async def _refused(error: Exception) -> list[RawDelivery]:
    raise error
