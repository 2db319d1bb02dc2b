"""One member of one group, on the event loop: joins, lends, settles, steps back when nobody works, leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import (
    MaybeAwaitable,
    RawDelivery,
    RawMessage,
    Settlement,
    SettleOutcome,
    Token,
    Verb,
)
from unistream.errors import (
    BrokerUnavailableError,
    ClosedError,
    LeaseLostError,
    SettleError,
)
from unistream_kafka.errors import translated
from unistream_kafka.member import UnsentError
from unistream_kafka.producer import ENVELOPE
from unistream_kafka.progress import Progress
from unistream_kafka.told import Told
from unistream_kafka.topics import position_of
from unistream_kafka.waiter import Waiter, answer

__all__ = ["KafkaConsumerDriver"]

COMMIT_SECONDS = 0.1
"""Added to a delay that is written down, for the time until the commit stands: it is never cut short."""
HURRY_SECONDS = 0.03
GRACE_SECONDS = 0.3
"""Added to a lease here, so that the portable layer, which is nearer to the application, ends it first."""
IDLE_SECONDS = 1.0
"""How long a message that is to be lent again waits for somebody to ask, at a member that holds no other loan."""
_ID = "unistream-id"
_new = tuple.__new__
_log = logging.getLogger("unistream.driver.kafka")


class KafkaConsumerDriver(Told, ConsumerDriver):
    """One member of one group."""

    # Joining and leaving

    async def join(self) -> None:
        """Become a member; returns when it takes part in the group."""
        try:
            await self._join()
        except TimeoutError:
            # Seen once under heavy load: the broker had forgotten a member whose client went on waiting to join.
            self._begin()
            try:
                await self._join()
            except TimeoutError as error:
                self._failure = BrokerUnavailableError(f"join {self._name}: no answer in time", driver="kafka")
                raise self._failure from error
        if not self._keepers:
            self._keepers = [self._loop.create_task(work) for work in (self._watching(), self._sweeping())]

    async def _join(self) -> None:
        self._member.start()
        try:
            # A join may have to wait until the others have noticed: for a session, if one of them is dead.
            async with asyncio.timeout(self._setting.place.connect_timeout + 1.5 * self._setting.session):
                await self._joining
        except BaseException as error:
            self._failure = self._failure or error
            await asyncio.shield(self._leave())
            raise

    async def _leave(self) -> None:
        self._member.leave()
        await self._gone

    async def _again(self) -> None:
        """The member ended: one attempt to become one again."""
        await self._gone
        self._drop(list(self._parts), "the member ended")
        self._begin()
        await self.join()

    async def close(self) -> None:
        """See `ConsumerDriver.close`."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        for keeper in self._keepers:
            keeper.cancel()
        if self._failure is None:
            await self._last_commit(list(self._parts.values()))
        for task in self._tasks:
            task.cancel()
        await self._leave()
        if self._next_commit is not None:
            self._next_commit.cancel()
        self._drop(list(self._parts), "the consumer was closed")
        answer(self._waiters, self._lost_loan())

    # Receiving

    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        """See `ConsumerDriver.receive`."""
        self._usable()
        self._stale_since = None
        return self._take(limit) or self._receive(limit, timeout)

    async def _receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        if self._failure is not None:
            await self._again()
        self._demand = limit
        self._pump()
        until = self._loop.time() + timeout
        while not (batch := self._take(limit)):
            self._usable()
            if self._failure is not None:
                raise translated(self._failure, f"receive from {self._name}", self._setting.group.topic)
            if self._unreachable is not None:
                raise BrokerUnavailableError(f"receive from {self._name}: {self._unreachable}", driver="kafka")
            left = until - self._loop.time()
            if left <= 0:
                return []
            self._waiter = self._loop.create_future()
            await asyncio.wait([self._waiter], timeout=left)
            self._waiter = None
        return batch

    def _usable(self) -> None:
        if self._closed:
            raise ClosedError(f"the consumer of {self._name} is closed", driver="kafka")
        if self._error is not None:
            raise self._error

    def _take(self, limit: int) -> list[RawDelivery]:
        batch: list[RawDelivery] = []
        ready, loans = self._ready, self._loans
        until = self._loop.time() + self._setting.group.lease + GRACE_SECONDS
        untils, token = self._until, self._serial
        while ready and len(batch) < limit:
            progress, message, attempt, suspect = ready[0]
            if suspect and batch:
                break
            ready.popleft()
            token += 1
            loans[token] = (progress, message)
            untils[token] = until
            batch.append(_delivery(message, token, attempt, suspect))
            if suspect:
                break
        self._serial = token
        if batch:
            now = self._loop.time()
            # Whoever comes back that soon would wait for commits most of the time: what follows is written down while
            # it works. Not beside a suspect, and not for the slow: what is written down counts as lent in a crash.
            hurried = now - self._took_at < HURRY_SECONDS and not batch[-1].suspect
            self._demand = self._buffer if hurried else 0
            self._took_at = now
            self._pump()
        return batch

    def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`."""
        until = self._loop.time() + seconds + GRACE_SECONDS
        outcomes: list[SettleOutcome] = []
        for token in tokens:
            stands = token in self._loans
            if stands:
                self._until[token] = until
            outcomes.append(None if stands else self._lost_loan())
        return outcomes

    # Settling

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        applied: dict[int, Progress] = {}
        doubtful: set[int] = set()
        released: dict[Progress, list[Any]] = {}
        resting: list[tuple[float, Progress, int]] = []
        wall = time.time()
        loans, untils = self._loans, self._until
        for at, (token, verb, delay) in enumerate(batch):
            untils.pop(token, None)
            loan = loans.pop(token, None)
            if loan is None:
                known, sent, _ = self._unsure.pop(token, (None, False, 0.0))
                if known is not None and self._parts.get(known.partition) is known:
                    # Settled by an earlier call whose commit had no answer: to be committed again.
                    known.dirty = True
                    applied[token] = known
                    if sent:
                        doubtful.add(token)
                else:
                    outcomes[at] = self._unknown() if sent else self._lost_loan()
                continue
            progress, message = loan
            if verb is Verb.ACK:
                progress.settle(message)
                applied[token] = progress
            elif verb is Verb.RELEASE:
                released.setdefault(progress, []).append(message)
            elif verb is Verb.EXPIRE:
                self._expire(progress, message)
            elif delay > 0:
                progress.rest(message, wall + delay + COMMIT_SECONDS)
                resting.append((delay, progress, message.offset))
                applied[token] = progress
            else:
                progress.nack(message)
        for progress, messages in released.items():
            progress.give_back(messages)
        if self._drained is not None:
            self._check_drained()
        if applied and self._setting.identity is not None:
            # Now, not when somebody awaits the answer: the next commit holds what was settled just now.
            waiter = Waiter(self._loop, applied, doubtful)
            # A delay counts from the commit that stores it.
            waiter.decided.add_done_callback(lambda _: self._rest(resting))
            self._waiters.append(waiter)
            self._pump()
            return self._confirm(waiter, batch, outcomes)
        self._rest(resting)
        self._pump()
        return outcomes

    async def _confirm(
        self, waiter: Waiter, batch: Sequence[Settlement], outcomes: list[SettleOutcome]
    ) -> list[SettleOutcome]:
        """Wait for the commit that stores settles; if it had no answer, they can be asked for again."""
        try:
            error = await asyncio.shield(waiter.decided)
        except asyncio.CancelledError:
            self._keep(waiter, sent=True)
            raise
        if error is not None and not isinstance(error, LeaseLostError):
            self._keep(waiter, sent=not isinstance(error.__cause__, UnsentError))
            raise translated(error, f"settle in {self._name}", self._setting.group.topic)
        if error is None and not waiter.gone:
            return outcomes
        for at, (token, _, _) in enumerate(batch):
            progress = waiter.settled.get(token)
            if progress is not None and (error is not None or progress in waiter.gone):
                outcomes[at] = self._unknown() if token in waiter.doubtful else self._lost_loan()
        return outcomes

    def _keep(self, waiter: Waiter, *, sent: bool) -> None:
        """Settles that have no answer may be asked for again; what was sent may stand already."""
        until = self._loop.time() + self._setting.group.lease + GRACE_SECONDS
        for token, progress in waiter.settled.items():
            self._unsure[token] = (progress, sent or token in waiter.doubtful, until)

    def _unknown(self) -> SettleError:
        return SettleError(
            f"settle in {self._name}: its commit was not answered before the partition went to another member; "
            "Kafka may hold it, or the message comes again",
            driver="kafka",
            topic=self._setting.group.topic,
        )

    # Looking after the group

    async def _watching(self) -> None:
        """Nobody tells a member that its topic or group was deleted."""
        while self._error is None:
            await asyncio.sleep(max(0.5, self._setting.place.dead_peer_after / 3))
            try:
                await self._look()
            except ClosedError:
                # The driver is closed, and forgot this member.
                self._member.leave()
                return

    async def _sweeping(self) -> None:
        """
        End the leases that nobody renews, and leave the group if nobody works here any more.

        Otherwise the heartbeats of a client whose application hangs would keep its messages from the others.
        """
        while True:
            await asyncio.sleep(min(1.0, self._setting.group.lease / 4))
            now = self._loop.time()
            self._unsure = {token: one for token, one in self._unsure.items() if one[-1] > now}
            for token in [token for token, until in self._until.items() if until <= now]:
                loan = self._end(token)
                if loan is not None:
                    self._expire(*loan)
                    self._setting.lost([token], "its lease was not renewed")
            if self._stale_since is not None and not self._loans and now - self._stale_since > IDLE_SECONDS:
                self._stale_since = None
                if self._waiter is None and self._failure is None and self._setting.identity is not None:
                    await self._step_back()

    async def _step_back(self) -> None:
        """Leave the group until somebody asks for messages again; see `_receive`."""
        _log.warning(
            "%s: messages are to be lent again and nobody asks for them; this member leaves until somebody does",
            self._name,
        )
        await self._last_commit(list(self._parts.values()))
        self._part("this member left, since nobody asked for messages")


def _delivery(message: Any, token: int, attempt: int, suspect: bool) -> RawDelivery:
    _, partition, _, offset, stored, _, key, value, headers, *_ = message
    if len(headers) == 2 and headers[0][0] == _ID:
        # Without application headers: by far the most, so worth a short way.
        raw = _new(RawMessage, (headers[0][1].decode("ascii", "replace"), value or b"", key, (), partition, ""))
    else:
        told = ENVELOPE.unwrap((name, value or b"") for name, value in headers)
        raw = RawMessage(told.id, value or b"", key, told.headers, partition)
    published_at = stored / 1000 if stored is not None and stored >= 0 else None
    return _new(RawDelivery, (raw, token, position_of(partition, offset), published_at, attempt, suspect, message))
