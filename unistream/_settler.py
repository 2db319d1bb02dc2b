"""What a consumer tells the broker about its loans: settles, coalesced, and renewals, in time.

Knows the driver contract and the leases; decides nothing about deliveries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Sequence
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from unistream._link import Link
from unistream._turns import follow
from unistream.core.leases import Lease
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import MaybeAwaitable, Settlement, SettleOutcome, Token, Verb
from unistream.errors import BrokerUnavailableError, ContractError, LeaseLostError, SettleError, UnistreamError

if TYPE_CHECKING:
    from unistream._delivery import Delivery
    from unistream._intake import Intake
    from unistream._loans import Loans

__all__ = ["Settler"]

BATCH = 1000
LEAVE_SECONDS = 5.0
"""How long a consumer that leaves tries to give back what it holds while the broker is out of reach."""


class _Entry(NamedTuple):
    """A settle that waits to be sent: beyond `deadline` its lease has ended and sending it is idle."""

    settlement: Settlement
    deadline: float
    delivery: Delivery | None
    done: asyncio.Future[SettleError | None] | None


class Settler:
    """
    Sends settles in batches, one at a time: what comes while one is under way forms the next.

    A batch whose outcome is unknown is sent again while the leases last: a repetition is harmless (fencing).

    Attributes:
        acks: Deliveries whose ack nobody waits for, which is nearly all of them; a refusal comes after it returned.
            Who puts one in calls `soon`, unless it is `scheduled`.
        scheduled: Whether `soon` was called and they are still to be sent.
    """

    def __init__(self, loans: Loans, intake: Intake, driver: ConsumerDriver, link: Link) -> None:
        self.acks: list[Delivery] = []
        self._loans = loans
        self._intake = intake
        self._driver = driver
        self._leases = loans.leases
        self._link = link
        self._loop = loans.loop
        # Every settle but the acks that nobody waits for.
        self._entries: list[_Entry] = []
        self.scheduled = False
        self._sending: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # The contract allows one `extend` at a time.
        self._extending = asyncio.Lock()
        self._give_up_at = inf
        self._given_up = False
        self._abandoned = 0

    # Settling

    def soon(self) -> None:
        """Send what is taken from now on, together, before the event loop turns."""
        if not self.scheduled:
            self.scheduled = True
            self._loop.call_soon(self._tick)

    def put(
        self, token: Token, verb: Verb, delay: float = 0.0, *, wait: bool = False
    ) -> asyncio.Future[SettleError | None] | None:
        """
        Take a settle of a loan that is still held.

        Args:
            token: The loan.
            verb: How it ends.
            delay: Seconds, for a nack.
            wait: Return a future of the outcome.
        """
        done: asyncio.Future[SettleError | None] | None = self._loop.create_future() if wait else None
        lease = self._loans.held.get(token)
        deadline = lease.deadline if lease is not None else self._loop.time()
        self._entries.append(_Entry(Settlement(token, verb, delay), deadline, None, done))
        self.soon()
        return done

    def _tick(self) -> None:
        self.scheduled = False
        self.flush()

    def flush(self) -> None:
        """Send what has been taken, unless a batch is under way: then it follows."""
        while (self.acks or self._entries) and self._sending is None:
            if self._given_up:
                self._drop_all()
                return
            acks, entries = self.acks[:BATCH], self._entries[:BATCH]
            del self.acks[:BATCH], self._entries[:BATCH]
            try:
                answer = self._ask(acks, entries)
            except Exception as error:
                answer = _refused(error)
            if not isinstance(answer, list):
                self._sending = follow(self._send(acks, entries, answer), answer, self._sent)
                return
            if self._link.error is not None:
                self._link.up()
            self._answered(acks, entries, answer)

    def _ask(self, acks: Sequence[Delivery], entries: Sequence[_Entry]) -> MaybeAwaitable[list[SettleOutcome]]:
        tokens = [delivery._raw[1] for delivery in acks]
        if not entries:
            return self._driver.ack(tokens)
        settlements = [Settlement(token, Verb.ACK) for token in tokens]
        return self._driver.settle([*settlements, *[entry.settlement for entry in entries]])

    def _answered(self, acks: Sequence[Delivery], entries: Sequence[_Entry], outcomes: Sequence[SettleOutcome]) -> None:
        if entries or type(outcomes) is not list or len(outcomes) != len(acks) or any(outcomes):
            self._conclude(_as_entries(acks, entries), outcomes)

    def _drop_all(self) -> None:
        """Nothing more is sent: tell everybody who waits."""
        rest = _as_entries(self.acks, self._entries)
        self.acks.clear()
        self._entries.clear()
        self._conclude(rest, [self._unknown(TimeoutError("the consumer left"))] * len(rest))

    async def _send(
        self, acks: Sequence[Delivery], entries: Sequence[_Entry], answer: Awaitable[list[SettleOutcome]]
    ) -> None:
        """See a batch through; whatever happens, everybody who waits for one of its settles is told."""
        try:
            outcomes = await answer
        except BrokerUnavailableError as error:
            await self._insist(_as_entries(acks, entries), error)
        except BaseException as error:
            self._give_up(_as_entries(acks, entries), error)
        else:
            self._link.up()
            self._answered(acks, entries, outcomes)

    async def _insist(self, batch: Sequence[_Entry], error: BrokerUnavailableError) -> None:
        """Send a batch again until it is answered or its leases have ended."""
        try:
            while True:
                await self._link.wait(error)
                now = self._loop.time()
                late = [entry for entry in batch if entry.deadline <= now or now >= self._give_up_at]
                self._conclude(late, [self._unknown(error)] * len(late))
                batch = [entry for entry in batch if entry.deadline > now and now < self._give_up_at]
                if not batch:
                    return
                try:
                    outcomes = await self._again(batch)
                except BrokerUnavailableError as unavailable:
                    error = unavailable
                else:
                    self._link.up()
                    self._conclude(batch, outcomes)
                    return
        except BaseException as failed:
            self._give_up(batch, failed)

    def _give_up(self, batch: Sequence[_Entry], error: BaseException) -> None:
        self._conclude(batch, [error if isinstance(error, SettleError) else self._unknown(error)] * len(batch))
        if not isinstance(error, (Exception, asyncio.CancelledError)):
            raise error

    async def _again(self, batch: Sequence[_Entry]) -> list[SettleOutcome]:
        answer = self._driver.settle([entry.settlement for entry in batch])
        return answer if isinstance(answer, list) else await answer

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending = None
        task.result()
        self.flush()

    def _unknown(self, error: BaseException) -> SettleError:
        """The error of a settle whose answer never came: the broker may hold it, so it is not a LeaseLostError."""
        unknown = SettleError(
            f"{self._loans.name}: a settle was not answered before the lease ended ({error!r}); "
            "the broker may hold it, or the message comes again",
            topic=self._loans.topic,
        )
        unknown.__cause__ = error
        return unknown

    def _conclude(self, batch: Sequence[_Entry], outcomes: Sequence[SettleOutcome]) -> None:
        for entry, refused in zip(batch, self._sound(outcomes, len(batch)), strict=True):
            if entry.done is not None:
                if not entry.done.done():
                    entry.done.set_result(refused)
            elif refused is not None:
                if entry.delivery is not None:
                    self._loans.settle_refused(entry.delivery, refused)
                elif entry.settlement.verb is Verb.RELEASE:
                    self._abandoned += 1

    def _sound(self, outcomes: Sequence[SettleOutcome], count: int) -> Sequence[SettleOutcome]:
        """The outcomes, or as many refusals if these are none."""
        kinds = isinstance(outcomes, Sequence) and all(one is None or isinstance(one, SettleError) for one in outcomes)
        if kinds and len(outcomes) == count:
            return outcomes
        defect = ContractError(f"the driver answered {count} settles with {outcomes!r:.200}")
        return [self._unknown(defect)] * count

    # Renewing

    def watch(self, at: float) -> None:
        """See to it that the timer goes off at `at` or before."""
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
            self._timer = None
        if at != inf:
            self._timer = self._loop.call_at(at, self._wake)

    def _watch_next(self, not_before: float) -> None:
        self.watch(max(self._leases.next_at(), not_before))

    def _wake(self) -> None:
        self._timer = None
        now = self._loop.time()
        expired = self._leases.expired(now)
        if expired:
            self._expire(expired)
        if self._renewing is None:
            due = self._leases.due(now)
            if due:
                self._renewing = self._loop.create_task(self._renew(due, now))
                self._renewing.add_done_callback(self._renewed)
        # While a renewal is under way, and after one that failed, there is a pause before the next look.
        self._watch_next(now + self._leases.lease / 12)

    def _tokens(self, leases: Collection[Lease]) -> list[Token]:
        return [token for token, lease in self._loans.held.items() if lease in leases]

    def _expire(self, leases: Sequence[Lease]) -> None:
        """Leases ended: the deliveries are lost, and brokers that do not end leases are told."""
        tokens = self._tokens(set(leases))
        for token in tokens:
            self.put(token, Verb.EXPIRE)
        self._loans.lost(tokens, "their leases ended")

    async def _renew(self, due: dict[Lease, float], now: float) -> None:
        by_seconds: dict[float, list[Token]] = {}
        for token, lease in self._loans.held.items():
            if lease in due:
                by_seconds.setdefault(due[lease], []).append(token)
        try:
            lost: list[Token] = []
            for seconds, tokens in by_seconds.items():
                outcomes = await self._ask_to_extend(tokens, seconds)
                lost += [token for token, refused in zip(tokens, outcomes, strict=True) if refused is not None]
        except UnistreamError as error:
            # The leases stand until their deadlines; the next look tries again.
            if error.retryable:
                self._link.down(error)
            else:
                self._intake.fail(error)
            return
        except Exception as error:
            self._intake.defect(error)
            return
        for lease, seconds in due.items():
            self._leases.renewed(lease, now, seconds)
        if lost:
            self._loans.lost(lost, "the broker refused to renew their leases")

    async def _ask_to_extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[SettleOutcome]:
        async with self._extending:
            answer = self._driver.extend(tokens, seconds)
            return self._sound(answer if isinstance(answer, list) else await answer, len(tokens))

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewing = None
        if not task.cancelled():
            task.result()

    async def extend(self, delivery: Delivery, seconds: float) -> None:
        """Extend one loan on the application's behalf; see `Delivery.extend`."""
        now = self._loop.time()
        token = delivery._raw.token
        # Beyond `max_lease` the broker would not follow, and the local lease must end before the broker's.
        seconds = min(seconds, delivery._lease.until - now)
        [refused] = await self._ask_to_extend([token], seconds)
        if refused is not None:
            self._loans.lost([token], "the broker refused to extend its lease")
            raise refused
        old = self._loans.held.get(token)
        if old is None:
            raise LeaseLostError(f"extend of {delivery._name}: its lease has ended", topic=self._loans.topic)
        self._replace(token, old, now + seconds, old.until, delivery)

    def stop_renewing(self, token: Token) -> None:
        """Let the lease of a loan run out by itself."""
        old = self._loans.held.get(token)
        if old is not None:
            self._replace(token, old, old.deadline, old.deadline, None)

    def _replace(self, token: Token, old: Lease, deadline: float, until: float, delivery: Delivery | None) -> None:
        own = self._leases.split(old, deadline, until)
        self._loans.held[token] = own
        if delivery is not None:
            delivery._lease = own
        self.watch(self._leases.wake_at(own))

    # Leaving

    async def close(self) -> int:
        """Send what is left, for a bounded time; how many loans could not be given back."""
        self._give_up_at = self._loop.time() + LEAVE_SECONDS
        self.flush()
        while (sending := self._sending) is not None:
            await asyncio.wait([sending], timeout=self._give_up_at - self._loop.time())
            # By now `_sending` may be the next batch, which has just begun.
            if not sending.done():
                self._given_up = True
                sending.cancel()
                await asyncio.wait([sending], timeout=LEAVE_SECONDS)
                break
            # Its done callback starts the next batch.
            await asyncio.sleep(0)
        if self._timer is not None:
            self._timer.cancel()
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing], timeout=LEAVE_SECONDS)
        return self._abandoned


def _as_entries(acks: Sequence[Delivery], entries: Sequence[_Entry]) -> list[_Entry]:
    """A batch with its acks in the form of every other settle, for when it has to be followed up."""
    return [
        *(_Entry(Settlement(each._raw.token, Verb.ACK), each._lease.deadline, each, None) for each in acks),
        *entries,
    ]


async def _refused(error: Exception) -> list[SettleOutcome]:
    raise error
