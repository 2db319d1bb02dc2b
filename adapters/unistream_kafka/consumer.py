"""The half of a member on the event loop: lends messages, settles them, and keeps what Kafka stores of it up to date.

Every lending is written down before it happens: the commit that stores it is also what proves that this member still
owns the partition. So attempts survive a crash, and a member that was put out lends nothing more. Acks ride on the
same commits; one is under way at a time, and what comes meanwhile goes with the next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kafka.errors import CommitFailedError, RebalanceInProgressError

from unistream.driver.contract import ConsumerDriver
from unistream.driver.owner_thread import Crossing
from unistream.driver.types import (
    DataLoss,
    Event,
    GroupSpec,
    MaybeAwaitable,
    RawDelivery,
    RawMessage,
    Settlement,
    SettleOutcome,
    Token,
    Verb,
)
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ClosedError,
    GroupMissingError,
    LeaseLostError,
    TopicMissingError,
    UnistreamError,
)
from unistream_kafka.client import Place
from unistream_kafka.control import position_of
from unistream_kafka.errors import translated
from unistream_kafka.member import Assigned, Member
from unistream_kafka.producer import ENVELOPE
from unistream_kafka.progress import Progress

__all__ = ["KafkaConsumerDriver", "Setting"]

COMMIT_GAP = 0.02
"""Seconds between two commits that nothing but acks asks for."""
COMMIT_SECONDS = 0.1
"""Added to a delay that is written down, for the time until the commit stands: it is never cut short."""
HURRY_SECONDS = 0.03
GRACE_SECONDS = 0.3
"""Added to a lease here, so that the portable layer, which is nearer to the application, ends it first."""
IDLE_SECONDS = 1.0
"""How long a message that is to be lent again waits for somebody to ask, at a member that holds no other loan."""
RETRY_SECONDS = 0.1
DRAIN_SECONDS = 1.5
"""How long a partition that goes to another member waits for its loans to be settled."""
MOST_UNSETTLED = 2000
MOST_WAITING = 1000
"""The same in ordered groups, where messages also wait behind others of their key."""
MOST_SPAN = 100_000
LEAST_FETCH = 32
MOST_FETCH = 1000
_ID = "unistream-id"
_log = logging.getLogger("unistream.driver.kafka")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """
    Where a member works, and for whom.

    Attributes:
        identity: Kafka's name of the group; `None`: ephemeral.
        starts: Where partitions begin for which Kafka holds no cursor.
        session: Seconds without a heartbeat after which the broker puts a member out.
        text_bytes: The most that Kafka stores with a cursor.
        check: Looks whether topic and group are still there; raises `TopicMissingError` or `GroupMissingError`.
        lost: To be told of loans that ended.
    """

    place: Place
    group: GroupSpec
    identity: str | None
    starts: Sequence[int]
    max_in_flight: int
    session: float
    text_bytes: int
    check: Callable[[], Awaitable[object]]
    emit: Callable[[Event], None]
    lost: Callable[[Collection[Token], str], None]


class _Item(NamedTuple):
    """A message that is being lent."""

    progress: Progress
    message: Any
    attempt: int
    suspect: bool


class _Flight(NamedTuple):
    """A commit under way: what it allows to hand out, and who waits for it."""

    items: list[_Item]
    waiters: list[asyncio.Future[BaseException | None]]
    partitions: list[Progress]


class KafkaConsumerDriver(ConsumerDriver):
    """One member of one group."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._name = f"group {setting.group.name!r} of topic {setting.group.topic!r}"
        self._loop = asyncio.get_running_loop()
        self._crossing = Crossing(self._loop)
        self._parts: dict[int, Progress] = {}
        # Partitions that are leaving, or whose missing cursor is being looked into: nothing of them is lent.
        self._held: set[int] = set()
        self._loans: dict[int, tuple[Progress, Any]] = {}
        self._until: dict[int, float] = {}
        self._stale_since: float | None = None
        self._unsure: dict[int, Progress] = {}
        # Of an ephemeral group that must begin again: where it stood.
        self._starts = list(setting.starts)
        self._serial = 0
        self._marking: list[_Item] = []
        self._ready: deque[_Item] = deque()
        self._demand = 0
        self._took_at = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._flight: _Flight | None = None
        self._landed: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[BaseException | None]] = []
        self._next_commit: asyncio.TimerHandle | None = None
        self._committed_at = 0.0
        self._retry_at = 0.0
        self._fetching = False
        self._buffer = min(MOST_FETCH, max(LEAST_FETCH, 4 * setting.max_in_flight))
        self._leaving: set[int] = set()
        self._drained: asyncio.Future[None] | None = None
        self._error: UnistreamError | None = None
        self._unreachable: str | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self._begin()

    # Joining and leaving

    def _begin(self) -> None:
        setting = self._setting
        self._joining: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._failure: BaseException | None = None
        self._fetching = False
        self._member = Member(
            setting.place,
            self,
            self._crossing,
            topic=setting.group.topic,
            group=setting.identity,
            starts=self._starts,
            session=setting.session,
            patience=max(setting.group.lease, setting.session),
        )

    async def join(self) -> None:
        """Become a member; returns when it takes part in the group."""
        self._member.start()
        try:
            # A join may have to wait until the others have noticed: for a session, if one of them is dead.
            async with asyncio.timeout(2 * self._setting.place.connect_timeout + 2 * self._setting.session):
                await self._joining
        except TimeoutError as error:
            await asyncio.shield(self._leave())
            self._failure = BrokerUnavailableError(f"join {self._name}: no answer in time", driver="kafka")
            raise self._failure from error
        except BaseException as error:
            self._failure = self._failure or error
            await asyncio.shield(self._leave())
            raise
        if not self._keepers:
            self._keepers = [self._loop.create_task(work) for work in (self._watching(), self._sweeping())]

    async def _leave(self) -> None:
        self._member.leave()
        await self._gone

    async def _again(self) -> None:
        """The member ended by a failure: one attempt to become one again."""
        await self._gone
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
        _answer(self._waiters, self._lost_loan())

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

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self, limit: int) -> list[RawDelivery]:
        batch: list[RawDelivery] = []
        ready, loans = self._ready, self._loans
        until = self._loop.time() + self._setting.group.lease + GRACE_SECONDS
        while ready and len(batch) < limit:
            item = ready[0]
            if item.suspect and batch:
                break
            ready.popleft()
            progress, message = item.progress, item.message
            self._serial += 1
            loans[self._serial] = (progress, message)
            self._until[self._serial] = until
            batch.append(_delivery(message, self._serial, item.attempt, item.suspect))
            if item.suspect:
                break
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

    def _lost_loan(self) -> LeaseLostError:
        return LeaseLostError(
            f"a message of {self._name} is no longer lent to this member",
            driver="kafka",
            topic=self._setting.group.topic,
        )

    # Settling

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        applied: dict[int, Progress] = {}
        released: dict[Progress, list[Any]] = {}
        resting: list[tuple[float, Progress, int]] = []
        wall = time.time()
        for at, (token, verb, delay) in enumerate(batch):
            loan = self._end(token)
            if loan is None:
                known = self._unsure.pop(token, None)
                if known is not None and self._parts.get(known.partition) is known:
                    # Settled by an earlier call whose commit had no answer: to be committed again.
                    known.dirty = True
                    applied[token] = known
                else:
                    outcomes[at] = self._lost_loan()
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
                progress.fresh.append(message)
        for progress, messages in released.items():
            progress.give_back(messages)
        if self._drained is not None:
            self._check_drained()
        if applied and self._setting.identity is not None:
            return self._confirm(applied, resting, outcomes)
        self._rest(resting)
        self._pump()
        return outcomes

    async def _confirm(
        self, applied: dict[int, Progress], resting: list[tuple[float, Progress, int]], outcomes: list[SettleOutcome]
    ) -> list[SettleOutcome]:
        """Wait for the commit that stores settles; if it had no answer, they can be asked for again."""
        waiter: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._waiters.append(waiter)
        self._pump()
        try:
            error = await waiter
        except asyncio.CancelledError:
            self._unsure.update(applied)
            raise
        finally:
            # A delay counts from the commit that stores it.
            self._rest(resting)
        if isinstance(error, LeaseLostError):
            return [outcome or error for outcome in outcomes]
        if error is not None:
            self._unsure.update(applied)
            raise translated(error, f"settle in {self._name}", self._setting.group.topic)
        return outcomes

    def _end(self, token: int) -> tuple[Progress, Any] | None:
        self._until.pop(token, None)
        return self._loans.pop(token, None)

    def _expire(self, progress: Progress, message: Any) -> None:
        progress.expire(message)
        self._stale_since = self._loop.time()

    def _rest(self, resting: Iterable[tuple[float, Progress, int]]) -> None:
        for delay, progress, offset in resting:
            self._loop.call_later(delay, self._rested, progress, offset)

    def _rested(self, progress: Progress, offset: int) -> None:
        if self._parts.get(progress.partition) is progress:
            progress.wake(offset)
            self._stale_since = self._loop.time()
            self._pump()

    # Lending: fresh -> marking -> (commit) -> ready -> loan

    def _pump(self) -> None:
        """Move everything on as far as it goes."""
        if self._closed or self._failure is not None:
            return
        if self._demand:
            self._mark()
        if self._setting.identity is None:
            self._ready.extend(self._marking)
            self._marking = []
            for progress in self._parts.values():
                progress.dirty = False
        else:
            self._flush()
        if self._ready:
            self._wake()
        self._fetch()

    def _mark(self) -> None:
        parts = [progress for at, progress in self._parts.items() if at not in self._held]
        for progress in parts:
            if progress.suspects:
                # A suspect goes alone, and nothing is counted as lent beside it.
                if not self._ready and not self._marking and (self._flight is None or not self._flight.items):
                    message = progress.suspects.popleft()
                    self._marking.append(_Item(progress, message, progress.lend(message), True))
                return
        under_way = len(self._flight.items) if self._flight is not None else 0
        room = self._demand - len(self._ready) - len(self._marking) - under_way
        for progress in parts:
            fresh = progress.fresh
            while fresh and room > 0:
                message = fresh.popleft()
                self._marking.append(_Item(progress, message, progress.lend(message), False))
                room -= 1

    def _fetch(self) -> None:
        if self._fetching:
            return
        waiting = len(self._ready) + len(self._marking)
        waiting += sum(len(progress.fresh) + len(progress.suspects) for progress in self._parts.values())
        if waiting * 2 <= self._buffer:
            self._member.blocked = self._blocked()
            self._fetching = True
            self._member.want(self._buffer - waiting)

    def _blocked(self) -> frozenset[int]:
        most = MOST_WAITING if self._setting.group.ordering == "key" else MOST_UNSETTLED
        most = max(most, self._setting.max_in_flight + self._buffer)
        return frozenset(
            at
            for at, progress in self._parts.items()
            if progress.unsettled >= most or progress.frontier.span >= MOST_SPAN
        )

    # Commits

    def _flush(self) -> None:
        if self._flight is not None or not (self._marking or self._waiters):
            return
        now = self._loop.time()
        wait = max(self._retry_at - now, 0.0 if self._marking else self._committed_at + COMMIT_GAP - now)
        if wait <= 0:
            self._commit()
        elif self._next_commit is None:
            self._next_commit = self._loop.call_later(wait, self._due)

    def _due(self) -> None:
        self._next_commit = None
        self._pump()

    def _commit(self) -> None:
        """Send what changed; nothing else is under way."""
        if self._next_commit is not None:
            self._next_commit.cancel()
            self._next_commit = None
        self._committed_at = self._loop.time()
        chosen = [progress for progress in self._parts.values() if progress.dirty]
        offsets = {}
        for progress in chosen:
            progress.dirty = False
            offsets[progress.partition] = (progress.frontier.frontier, progress.text(self._setting.text_bytes))
        items = [item for item in self._marking if self._owns(item.progress)]
        flight = self._flight = _Flight(items, self._waiters, chosen)
        self._marking, self._waiters = [], []
        if offsets:
            self._member.commit(offsets, lambda error: self._committed(flight, error))
        else:
            self._committed(flight, None)

    def _owns(self, progress: Progress) -> bool:
        return self._parts.get(progress.partition) is progress

    def _committed(self, flight: _Flight, error: BaseException | None) -> None:
        if self._flight is not flight:
            return
        self._flight = None
        items = [item for item in flight.items if self._owns(item.progress)]
        if error is None:
            self._ready.extend(items)
            _answer(flight.waiters, None)
        else:
            for progress in flight.partitions:
                progress.dirty = True
            self._marking = items + self._marking
            self._refused(flight, error)
        if self._landed is not None:
            _finish(self._landed)
            self._landed = None
        self._pump()

    def _refused(self, flight: _Flight, error: BaseException) -> None:
        inner = error.args[0] if isinstance(error, CommitFailedError) and error.args else error
        if isinstance(inner, RebalanceInProgressError):
            # The membership stands; the commit goes again when the rebalance is over.
            self._waiters = flight.waiters + self._waiters
            self._later()
        elif isinstance(error, CommitFailedError):
            self._drop(list(self._parts), "another generation of the group has begun")
            _answer(flight.waiters, self._lost_loan())
        else:
            made = translated(error, f"commit for {self._name}", self._setting.group.topic)
            if isinstance(made, BrokerUnavailableError):
                self._later()
            elif isinstance(made, TopicMissingError):
                self._spawn(self._look())
                self._later()
            else:
                self._fail(made)
            _answer(flight.waiters, made if isinstance(made, BrokerUnavailableError) else self._lost_loan())

    def _later(self) -> None:
        self._retry_at = self._loop.time() + RETRY_SECONDS

    async def _last_commit(self, partitions: list[Progress]) -> None:
        """Store what is known of partitions that this member gives up; within a few seconds or not at all."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._flight is not None:
                    self._landed = self._loop.create_future()
                    await asyncio.wait([self._landed])
                # Only now: what the commit under way wrote down as lent is not handed out either.
                self._put_back(partitions)
                if any(progress.dirty for progress in partitions) and self._setting.identity is not None:
                    waiter: asyncio.Future[BaseException | None] = self._loop.create_future()
                    self._waiters.append(waiter)
                    self._commit()
                    await waiter
        except TimeoutError:
            # The next owner goes on from the commit before: messages may come again.
            return

    # What the member tells; see `Half`

    def joined(self) -> None:
        """See `Half.joined`."""
        _finish(self._joining)

    def place(self, partition: int) -> int:
        """See `Half.place`. Partitions that were added to the topic later begin at their first message."""
        starts = self._setting.starts
        return starts[partition] if partition < len(starts) else 0

    def assigned(self, stored: Assigned) -> None:
        """See `Half.assigned`."""
        ordered = self._setting.group.ordering == "key"
        missing = []
        for at, found in stored.items():
            if found is None:
                found = (self.place(at), "")
                if at < len(self._setting.starts):
                    missing.append(at)
            self._parts[at] = Progress(at, *found, ordered=ordered)
        if missing:
            self._held.update(missing)
            self._spawn(self._expired(missing))
        self._pump()

    async def _expired(self, partitions: list[int]) -> None:
        """Kafka holds no cursor although the group was pinned: it was deleted, or its offsets have expired."""
        await self._look()
        if self._error is None:
            group = self._setting.group
            detail = (
                f"Kafka holds no offsets of partitions {partitions}: they expired, or were deleted. The group begins "
                "again where it was created; what it had settled since comes again, what retention removed does not"
            )
            self._setting.emit(DataLoss(group.topic, group.name, None, detail))
            self._held.difference_update(partitions)
            self._pump()

    def arrived(self, found: Mapping[int, Sequence[Any]]) -> None:
        """See `Half.arrived`."""
        self._fetching = False
        wall = time.time()
        for at, messages in found.items():
            progress = self._parts.get(at)
            if progress is not None:
                for offset in progress.arrive(messages, wall):
                    self._loop.call_later(progress.rests[offset] - wall, self._rested, progress, offset)
        self._pump()

    def trimmed(self, partition: int, wanted: int, first: int, end: int) -> None:
        """See `Half.trimmed`."""
        group = self._setting.group
        progress = self._parts.get(partition)
        if progress is None:
            return
        if wanted < first:
            progress.frontier.skip_to(first)
            detail = f"partition {partition}: retention removed the messages from {wanted} to {first - 1}"
            self._setting.emit(DataLoss(group.topic, group.name, first - wanted, detail))
        else:
            self._drop([partition], "the partition was truncated")
            self._parts[partition] = Progress(partition, end, "", ordered=group.ordering == "key")
            detail = f"partition {partition}: its log ends at {end}, before {wanted}, which this group had reached"
            self._setting.emit(DataLoss(group.topic, group.name, None, detail))
        self._parts[partition].dirty = True

    def revoked(self, partitions: Sequence[int], done: Callable[[], None]) -> None:
        """See `Half.revoked`."""
        leaving = [self._parts[at] for at in partitions if at in self._parts]
        if self._closed or self._failure is not None or not leaving:
            done()
        else:
            self._spawn(self._hand_over(leaving, done))

    async def _hand_over(self, leaving: list[Progress], done: Callable[[], None]) -> None:
        places = {progress.partition for progress in leaving}
        try:
            self._held |= places
            self._put_back(leaving)
            self._leaving = places
            if any(progress.partition in places for progress, _ in self._loans.values()):
                self._drained = self._loop.create_future()
                await asyncio.wait([self._drained], timeout=DRAIN_SECONDS)
                self._drained = None
            self._lose(places, "the partition goes to another member")
            await self._last_commit(leaving)
            self._drop(sorted(places), "the partition went to another member")
        finally:
            self._held -= places
            done()

    def _check_drained(self) -> None:
        if not any(progress.partition in self._leaving for progress, _ in self._loans.values()):
            assert self._drained is not None
            _finish(self._drained)

    def lost(self, partitions: Sequence[int] | None, reason: str) -> None:
        """See `Half.lost`."""
        if partitions is not None:
            self._drop(partitions, reason)
            return
        # Maybe this is still a member: the commit before the next lending will tell.
        self._put_back(self._parts.values())
        for progress, message in self._lose(self._parts, reason):
            progress.expire(message)

    def failed(self, error: BaseException) -> None:
        """See `Half.failed`."""
        made = translated(error, f"member of {self._name}", self._setting.group.topic)
        self._failure = made
        self._drop(list(self._parts), str(made))
        flight, self._flight = self._flight, None
        _answer([*(flight.waiters if flight is not None else ()), *self._waiters], self._lost_loan())
        self._waiters = []
        if not self._joining.done():
            self._joining.set_exception(made)
        if isinstance(made, AccessError):
            self._error = made
        self._wake()

    def left(self) -> None:
        """See `Half.left`."""
        _finish(self._gone)

    def reachable(self, error: str | None) -> None:
        """See `Half.reachable`."""
        self._unreachable = error
        self._wake()
        if error is None:
            self._pump()

    # Losing

    def _put_back(self, partitions: Iterable[Progress]) -> None:
        """What was counted as lent and is not handed out yet waits again, uncounted."""
        chosen = set(partitions)
        back: dict[Progress, list[Any]] = {}
        for item in (*self._ready, *self._marking):
            if item.progress in chosen:
                back.setdefault(item.progress, []).append(item.message)
        self._ready = deque(item for item in self._ready if item.progress not in chosen)
        self._marking = [item for item in self._marking if item.progress not in chosen]
        for progress, messages in back.items():
            progress.give_back(messages)

    def _lose(self, partitions: Collection[int], reason: str) -> list[tuple[Progress, Any]]:
        tokens = [token for token, (progress, _) in self._loans.items() if progress.partition in partitions]
        loans = [(self._until.pop(token), self._loans.pop(token))[1] for token in tokens]
        if tokens:
            self._setting.lost(tokens, reason)
        return loans

    def _drop(self, partitions: Iterable[int], reason: str) -> None:
        """Partitions are this member's no more."""
        places = set(partitions)
        self._lose(places, reason)
        self._ready = deque(item for item in self._ready if item.progress.partition not in places)
        self._marking = [item for item in self._marking if item.progress.partition not in places]
        for at in places & self._parts.keys():
            gone = self._parts.pop(at)
            if self._setting.identity is None:
                self._starts[at] = gone.frontier.frontier
        self._unsure = {token: one for token, one in self._unsure.items() if one.partition not in places}
        self._held -= places

    def _fail(self, error: UnistreamError) -> None:
        self._error = error
        self._drop(list(self._parts), str(error))
        self._wake()

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
        self._failure = BrokerUnavailableError(f"{self._name}: this member had left", driver="kafka")
        self._drop(list(self._parts), "the member left, since nobody asked for messages")
        self._member.leave()

    async def _look(self) -> None:
        try:
            await self._setting.check()
        except (TopicMissingError, GroupMissingError) as error:
            self._fail(error)
        except BrokerUnavailableError:
            # The member itself notices and tells.
            return

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _delivery(message: Any, token: int, attempt: int, suspect: bool) -> RawDelivery:
    partition, headers, stored = message.partition, message.headers, message.timestamp
    if len(headers) == 2 and headers[0][0] == _ID:
        # Without application headers: by far the most, so worth a short way.
        raw = RawMessage(headers[0][1].decode("ascii", "replace"), message.value or b"", message.key, (), partition)
    else:
        told = ENVELOPE.unwrap((name, value or b"") for name, value in headers)
        raw = RawMessage(told.id, message.value or b"", message.key, told.headers, partition)
    published_at = stored / 1000 if stored is not None and stored >= 0 else None
    return RawDelivery(raw, token, position_of(partition, message.offset), published_at, attempt, suspect, message)


def _answer(waiters: Iterable[asyncio.Future[BaseException | None]], error: BaseException | None) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(error)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
