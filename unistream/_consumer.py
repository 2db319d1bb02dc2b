"""The consuming side as applications see it: one member of a group, and the deliveries that it holds.

Fetches only for credit that is free, so the backlog stays at the broker. Knows no broker. One event loop touches it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from unistream._dead_letters import DeadLetters
from unistream._delivery import Delivery
from unistream._link import Link
from unistream._settler import Settler
from unistream.core.leases import Lease, Leases
from unistream.core.lifecycle import Move, State, refusal
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import RawDelivery, Token, Verb
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ClosedError,
    ContractError,
    GroupMissingError,
    PublishError,
    Reject,
    SettleError,
    TopicMissingError,
    UnistreamError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from unistream._group import Group

__all__ = ["Consumer", "ConsumerStats", "DrainReport"]

POLL_SECONDS = 5.0
"""The longest that one fetch waits at the broker; shorter for short leases, since a lease counts from the request."""

_log = logging.getLogger("unistream.consumer")


class DrainReport(NamedTuple):
    """
    What became of the deliveries of a consumer, from joining to leaving.

    Attributes:
        handled: Settled by the application, or dead-lettered for it.
        returned: Given back unsettled while leaving; another member, or the same one after a restart, gets them.
        abandoned: Not given back, since the broker was out of reach; they come again when their leases end.
    """

    handled: int
    returned: int
    abandoned: int


@dataclass(slots=True)
class ConsumerStats:
    """
    What this consumer has seen.

    Attributes:
        delivered: Deliveries handed to the application.
        redelivered: Of these, with `attempt` above 1.
        acked: Acks accepted for sending.
        nacked: Nacks.
        rejected: Rejects.
        dead_lettered: Messages moved to the dead letter topic.
        dropped: Messages dropped, because there is no dead letter topic.
        acks_lost: Acks that the broker refused, or whose outcome stayed unknown, after `ack()` had returned.
        leases_lost: Leases that ended before their delivery was settled.
    """

    delivered: int = 0
    redelivered: int = 0
    acked: int = 0
    nacked: int = 0
    rejected: int = 0
    dead_lettered: int = 0
    dropped: int = 0
    acks_lost: int = 0
    leases_lost: int = 0


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
        self._low = max_in_flight // 4
        self._driver: ConsumerDriver | None = None
        self._entered = False
        self._closed = False
        self._paused = False
        self._error: UnistreamError | None = None
        # Every unsettled loan with its lease; of these, what waits to be handed out, and the bytes of what was.
        self._held: dict[Token, Lease] = {}
        self._buffer: deque[Delivery] = deque()
        self._out: dict[Token, int] = {}
        self._bytes_out = 0
        self._suspect: Token = None
        self._waiting: deque[asyncio.Future[Delivery | None]] = deque()
        self._fetch: asyncio.Task[None] | None = None
        # Handed-out deliveries that closing does not wait for, and the signal that all others are back.
        self._handlers: dict[asyncio.Task[Any], Token] = {}
        self._exempt: set[Token] = set()
        self._all_back: asyncio.Future[None] | None = None
        self._leaving: asyncio.Task[DrainReport] | None = None

    async def __aenter__(self) -> Consumer:
        group = self._group
        client = group._client
        if self._entered:
            raise ClosedError(f"this consumer of {self._name} was entered before; make another", topic=self.topic)
        driver = client._use()
        self._entered = True
        self._loop = client._loop
        self._now = self._loop.time
        spec, topic = await group._ensure()
        self.group_name = spec.name
        self._leases = Leases(spec.lease, spec.max_lease)
        self._poll = min(POLL_SECONDS, spec.lease / 4)
        self._link = Link(f"consumer {self._name}", client._emit, _log)
        self._dead = await DeadLetters.open(group, spec)
        try:
            self._driver = await driver.consumer(spec, topic, max_in_flight=self._max_in_flight, lost=self._lost)
        except BaseException:
            await self._dead.close()
            raise
        self._settler = Settler(self, self._driver, self._leases, self._link)
        client._parts[self] = self._link
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Receiving

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        try:
            delivery = self._next() or await self._wait(None)
        except ClosedError:
            if self._closed:
                raise StopAsyncIteration from None
            raise
        return self._hand_out(cast(Delivery, delivery))

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
        delivery = self._next() or await self._wait(timeout)
        return None if delivery is None else self._hand_out(delivery)

    async def receive_many(self, max: int, timeout: float | None = None) -> list[Delivery]:
        """
        Up to `max` deliveries, waiting for the first as `receive` does.

        Returns:
            At least one, or an empty list when the time is up.

        Raises, Cancellation, Concurrency: As `receive`.
        """
        if max < 1:
            raise ValueError(f"receive_many(max={max}): ask for 1 or more")
        delivery = self._next() or await self._wait(timeout)
        batch: list[Delivery] = []
        frame = sys._getframe(1)
        code, line = frame.f_code, frame.f_lineno
        redelivered = 0
        while delivery is not None:
            delivery._code = code
            delivery._line = line
            redelivered += delivery._raw.attempt > 1
            batch.append(delivery)
            if len(batch) == max:
                break
            delivery = self._pop() or self._next()
        self.stats.delivered += len(batch)
        self.stats.redelivered += redelivered
        return batch

    def pause(self) -> Awaitable[None]:
        """Hand out nothing more until `resume`, at once; membership, and the leases of what is held, are kept."""
        self._paused = True
        return DONE

    def resume(self) -> Awaitable[None]:
        """Go on after `pause`, at once."""
        self._paused = False
        self._serve()
        return DONE

    def _next(self) -> Delivery | None:
        """The next delivery, if one may be handed out without waiting."""
        if self._closed or self._error is not None or self._driver is None:
            raise self._refusal()
        if asyncio._get_running_loop() is not self._loop:
            self._group._client._wrong_loop()
        if self._waiting or self._paused:
            return None
        if len(self._buffer) <= self._low:
            self._ask()
        return self._pop()

    def _pop(self) -> Delivery | None:
        buffer = self._buffer
        while buffer:
            delivery = buffer[0]
            raw = delivery._raw
            # Ends of leases are noticed by the timer here, and by the clock when the delivery is settled.
            if raw.token in self._held:
                size = len(raw.message.value)
                if self._bytes_out and self._bytes_out + size > self._max_bytes:
                    return None
                self._bytes_out += size
                self._out[raw.token] = size
                return buffer.popleft()
            buffer.popleft()
        return None

    async def _wait(self, timeout: float | None) -> Delivery | None:
        waiter: asyncio.Future[Delivery | None] = self._loop.create_future()
        self._waiting.append(waiter)
        self._serve()
        timer = None if timeout is None else self._loop.call_later(max(timeout, 0), _finish, waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and (delivery := waiter.result()) is not None:
                self._bytes_out -= self._out.pop(delivery._raw.token)
                self._buffer.appendleft(delivery)
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
            delivery = self._pop()
            if delivery is None:
                if not self._ask():
                    return
                continue
            waiting.popleft().set_result(delivery)

    def _refusal(self) -> UnistreamError:
        if self._error is not None and not self._closed:
            return self._error
        return ClosedError(
            f"the consumer of {self._name} is closed, or was never entered: use `async with group.consumer()`",
            topic=self.topic,
        )

    def _hand_out(self, delivery: Delivery) -> Delivery:
        stats = self.stats
        stats.delivered += 1
        if delivery._raw.attempt > 1:
            stats.redelivered += 1
        # Two frames up stands the application's `await consumer.receive()` or `async for`.
        frame = sys._getframe(2)
        delivery._code = frame.f_code
        delivery._line = frame.f_lineno
        return delivery

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
        except UnistreamError as error:
            # A driver that answers at once also refuses at once; both ways end in the same place.
            answer = _refused(error)
        if isinstance(answer, list):
            self._admit(answer, started)
            return bool(answer)
        self._fetch = self._loop.create_task(self._fetching(answer, started))
        self._fetch.add_done_callback(self._fetched)
        return False

    async def _fetching(self, answer: Awaitable[list[RawDelivery]], started: float) -> None:
        try:
            raws = await answer
        except BrokerUnavailableError as error:
            await self._link.wait(error)
        except (TopicMissingError, GroupMissingError, AccessError) as error:
            self._fail(error)
        else:
            self._link.up()
            self._admit(raws, started)

    def _fetched(self, task: asyncio.Task[None]) -> None:
        self._fetch = None
        if not task.cancelled() and (defect := task.exception()) is not None and not self._closed:
            error = ContractError(f"fetching for {self._name} failed: {defect!r}", topic=self.topic)
            error.__cause__ = defect
            self._fail(error)
        if not self._closed:
            self._serve()

    def _fail(self, error: UnistreamError) -> None:
        """The group or topic is gone: everybody who waits, now or later, is told (GRP-7)."""
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
        limit = self._group.retry.max_attempts
        held, buffer = self._held, self._buffer
        for raw in raws:
            held[raw.token] = lease
            delivery = Delivery(self, raw, lease)
            if raw.suspect:
                self._suspect = raw.token
            if limit is not None and raw.attempt > limit:
                self._dead.bury_later(delivery, "the lease of the last attempt was lost")
            else:
                buffer.append(delivery)
        self._settler.watch(self._leases.wake_at(lease))
        if self._waiting:
            self._serve()

    # Holding and settling; called by deliveries

    def _holds(self, delivery: Delivery) -> bool:
        lease = delivery._lease
        return self._held.get(delivery._raw.token) is lease and self._loop.time() < lease.deadline

    def _let_go(self, token: Token) -> bool:
        """A loan ended: its credit is free again. False if it had ended before."""
        lease = self._held.pop(token, None)
        if lease is None:
            return False
        self._leases.drop(lease)
        size = self._out.pop(token, None)
        if size is not None:
            self._bytes_out -= size
            if self._all_back is not None and not self._out.keys() - self._exempt:
                _finish(self._all_back)
        if token == self._suspect:
            self._suspect = None
        if self._waiting:
            self._serve()
        return True

    def _ack(self, delivery: Delivery) -> bool:
        """Accept an ack for sending; False if the delivery is not held any more."""
        if asyncio._get_running_loop() is not self._loop:
            self._group._client._wrong_loop()
        token = delivery._raw[1]
        lease = delivery._lease
        held = self._held
        if held.get(token) is not lease or self._now() >= lease.deadline:
            return False
        self._settler.ack(delivery)
        self.stats.acked += 1
        if self._waiting or self._all_back is not None or self._suspect is not None or lease.held == 1:
            self._let_go(token)
        else:
            # What `_let_go` would do, for nearly every ack.
            del held[token]
            lease.held -= 1
            self._bytes_out -= self._out.pop(token)
        return True

    async def _settle(self, delivery: Delivery, move: Move, verb: Verb, delay: float = 0.0) -> None:
        """Settle, and wait until the broker holds it."""
        token = delivery._raw.token
        done = self._settler.put(token, verb, delay, wait=True)
        self._let_go(token)
        delivery._move(move)
        refused = await asyncio.shield(cast("asyncio.Future[SettleError | None]", done))
        if refused is not None:
            delivery._move(Move.LOSE)
            raise refused
        self.stats.acked += move is Move.ACK

    async def _nack(self, delivery: Delivery, delay: float | None, reason: str | None) -> None:
        retry = self._group.retry
        self.stats.nacked += 1
        if retry.exhausted(delivery.attempt):
            await self._dead.bury(delivery, Move.NACK, reason or "nacked at the last attempt")
            return
        if delay is None:
            delay = retry.backoff.delay(delivery.attempt, random.random())
        await self._settle(delivery, Move.NACK, Verb.NACK, delay)

    async def _reject(self, delivery: Delivery, reason: str) -> None:
        await self._dead.bury(delivery, Move.REJECT, reason)
        self.stats.rejected += 1

    async def _give_back(self, delivery: Delivery) -> None:
        await self._settle(delivery, Move.NACK, Verb.RELEASE)

    async def _extend(self, delivery: Delivery, seconds: float) -> None:
        await self._settler.extend(delivery, seconds)

    async def _conclude(self, delivery: Delivery, error: BaseException | None) -> None:
        """End a delivery as its block or handler ended (DEL-10, DEL-11); what is refused is logged, not raised."""
        try:
            if delivery.state is State.LOST:
                raise refusal(State.LOST, Move.ACK, delivery._name)
            if delivery.state is not State.LENT:
                return
            if error is None:
                await delivery.ack()
            elif isinstance(error, Reject):
                await delivery.reject(error.reason)
            elif isinstance(error, Exception):
                await delivery.nack(reason=f"{type(error).__name__}: {error}")
            else:
                await self._settle(delivery, Move.NACK, Verb.RELEASE)
        except SettleError as refused:
            self._settle_refused(delivery, refused)
        except PublishError as failed:
            # Its dead letter was not confirmed. It stays this group's and comes here again after the backoff.
            _log.error("%s could not be dead-lettered: %s", delivery._name, failed)
            delay = self._group.retry.backoff.delay(delivery.attempt, random.random())
            await self._settle(delivery, Move.NACK, Verb.NACK, delay)

    def _settle_refused(self, delivery: Delivery, error: SettleError) -> None:
        """An ack or nack that was accepted for sending came to nothing (DEL-7)."""
        if delivery._state is not State.LOST:
            delivery._move(Move.LOSE)
        self.stats.acks_lost += 1
        if self.stats.acks_lost.bit_count() == 1:
            # Rate-limited by powers of two: a broker that refuses one refuses many.
            _log.warning("%s (%d settles lost so far by this consumer)", error, self.stats.acks_lost)

    def _lost(self, tokens: Collection[Token], reason: str) -> None:
        """The driver, or the clock, says that loans ended without being asked to."""
        lost = sum([self._let_go(token) for token in tokens])
        if lost:
            self.stats.leases_lost += lost
            _log.warning("%s: %d deliveries lost: %s", self._name, lost, reason)

    def _dropped_unsettled(self, delivery: Delivery) -> None:
        """The application let go of a delivery without settling it (DEL-8); called by the garbage collector."""
        if self._closed or delivery._raw.token not in self._held or self._loop.is_closed():
            return
        code = delivery._code
        where = f"{code.co_filename}:{delivery._line}" if code is not None else "?"
        _log.warning(
            "%s was dropped without being settled; received at %s; it comes again when its lease ends",
            delivery._name,
            where,
        )
        self._loop.call_soon_threadsafe(self._settler.stop_renewing, delivery._raw.token)

    @property
    def _name(self) -> str:
        return f"{self.topic}/{self.group_name or 'an ephemeral group'}"

    @staticmethod
    def _wall() -> float:
        return time.time()

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
        here = asyncio.current_task()
        if here in self._handlers:
            self._exempt.add(self._handlers[here])
        if self._leaving is None:
            self._closed = True
            self._dismiss()
            if self._driver is None:
                return DrainReport(0, 0, 0)
            self._leaving = self._loop.create_task(self._leave(self._driver, drain))
        try:
            return await asyncio.shield(self._leaving)
        except asyncio.CancelledError:
            if self._all_back is not None:
                _finish(self._all_back)
            await self._leaving
            raise

    async def _leave(self, driver: ConsumerDriver, drain: float) -> DrainReport:
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait([self._fetch])
        returned = self._return([delivery._raw.token for delivery in self._buffer])
        self._buffer.clear()
        if drain > 0 and self._out.keys() - self._exempt:
            self._all_back = self._loop.create_future()
            timer = self._loop.call_later(drain, _finish, self._all_back)
            await self._all_back
            timer.cancel()
        await self._dead.settle()
        returned += self._return(list(self._held))
        abandoned = await self._settler.close()
        await driver.close()
        await self._dead.close()
        self._group._client._parts.pop(self, None)
        stats = self.stats
        handled = stats.acked + stats.nacked + stats.rejected
        return DrainReport(handled, returned - abandoned, abandoned)

    def _return(self, tokens: Collection[Token]) -> int:
        """Give loans back unsettled; how many there were."""
        count = 0
        for token in tokens:
            if token in self._held:
                self._settler.put(token, Verb.RELEASE)
                self._let_go(token)
                count += 1
        return count


class _Done:
    """An awaitable for calls that took effect before they returned."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


DONE: Awaitable[None] = _Done()


async def _refused(error: UnistreamError) -> list[RawDelivery]:
    raise error


def _finish(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_result(None)
