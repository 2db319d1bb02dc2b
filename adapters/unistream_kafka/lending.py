"""How a member lends: every lending is committed before it happens, and acks ride on the same commits.

fresh -> marking -> (commit) -> ready -> loan. The commit that writes a lending down is also what proves that this
member still owns the partition. So attempts survive a crash, and a member that was put out lends nothing more. One
commit is under way at a time; what comes meanwhile goes with the next. Touched by the event loop alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kafka.errors import CommitFailedError, RebalanceInProgressError

from unistream.driver.owner_thread import Crossing
from unistream.driver.types import (
    Event,
    GroupSpec,
    Token,
)
from unistream.errors import (
    BrokerUnavailableError,
    GroupMissingError,
    LeaseLostError,
    TopicMissingError,
    UnistreamError,
)
from unistream_kafka.client import Place
from unistream_kafka.errors import translated
from unistream_kafka.member import Member
from unistream_kafka.progress import Progress
from unistream_kafka.waiter import Waiter, answer

__all__ = ["Flight", "Item", "Lending", "Setting", "finish"]

COMMIT_GAP = 0.02
"""Seconds between two commits that nothing but acks asks for."""
RETRY_SECONDS = 0.1
DRAIN_SECONDS = 1.5
"""How long a partition that goes to another member waits for its loans to be settled."""
MOST_UNSETTLED = 2000
MOST_WAITING = 1000
"""The same in ordered groups, where messages also wait behind others of their key."""
MOST_SPAN = 100_000
LEAST_FETCH = 32
MOST_FETCH = 1000

_new = tuple.__new__


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """
    Where a member works, and for whom.

    Attributes:
        stored: Kafka's name of the topic.
        identity: Kafka's name of the group; `None`: ephemeral.
        starts: Where partitions begin for which Kafka holds no cursor.
        session: Seconds without a heartbeat after which the broker puts a member out.
        text_bytes: The most that Kafka stores with a cursor.
        check: Looks whether topic and group are still there; raises `TopicMissingError` or `GroupMissingError`.
        lost: To be told of loans that ended.
    """

    place: Place
    group: GroupSpec
    stored: str
    identity: str | None
    starts: Sequence[int]
    max_in_flight: int
    session: float
    text_bytes: int
    check: Callable[[], Awaitable[object]]
    emit: Callable[[Event], None]
    lost: Callable[[Collection[Token], str], None]


class Item(NamedTuple):
    """A message that is being lent."""

    progress: Progress
    message: Any
    attempt: int
    suspect: bool


class Flight(NamedTuple):
    """A commit under way: what it allows to hand out, and who waits for it."""

    items: list[Item]
    waiters: list[Waiter]
    partitions: list[Progress]


class Lending:
    """The messages at hand of one member, and the commits that let them out; `Told` and the driver build on it."""

    _member: Member
    _failure: BaseException | None

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
        # Settled without an answer: where, whether it was ever sent, and until when anybody may ask again.
        self._unsure: dict[int, tuple[Progress, bool, float]] = {}
        # Of an ephemeral group that must begin again: where it stood.
        self._starts = list(setting.starts)
        self._serial = 0
        self._marking: list[Item] = []
        self._ready: deque[Item] = deque()
        self._demand = 0
        self._took_at = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._flight: Flight | None = None
        self._landed: asyncio.Future[None] | None = None
        self._waiters: list[Waiter] = []
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

    # Lending

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
                    self._marking.append(Item(progress, message, progress.lend(message), True))
                return
        under_way = len(self._flight.items) if self._flight is not None else 0
        room = self._demand - len(self._ready) - len(self._marking) - under_way
        for progress in parts:
            fresh = progress.fresh
            while fresh and room > 0:
                message = fresh.popleft()
                self._marking.append(_new(Item, (progress, message, progress.lend(message), False)))
                room -= 1

    def _fetch(self) -> None:
        if self._fetching:
            # What was asked for may be behind a partition that is open again.
            if self._member.blocked:
                self._member.block(self._blocked())
            return
        waiting = len(self._ready) + len(self._marking)
        waiting += sum(len(progress.fresh) + len(progress.suspects) for progress in self._parts.values())
        if waiting * 2 <= self._buffer:
            self._member.block(self._blocked())
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
        items = self._owned(self._marking)
        flight = self._flight = Flight(items, self._waiters, chosen)
        self._marking, self._waiters = [], []
        if offsets:
            self._member.commit(offsets, lambda error: self._committed(flight, error))
        else:
            self._committed(flight, None)

    def _owned(self, items: list[Item]) -> list[Item]:
        mine = set(self._parts.values())
        return [item for item in items if item.progress in mine]

    def _committed(self, flight: Flight, error: BaseException | None) -> None:
        if self._flight is not flight:
            return
        self._flight = None
        items = self._owned(flight.items)
        if self._held:
            # What was written down as lent of a partition that is to go meanwhile is not handed out: its settle would
            # not be stored any more.
            kept = [item for item in items if item.progress.partition in self._held]
            items = [item for item in items if item.progress.partition not in self._held]
            for item in reversed(kept):
                item.progress.give_back([item.message])
        if error is None:
            self._ready.extend(items)
            answer(flight.waiters, None)
        else:
            for progress in flight.partitions:
                progress.dirty = True
            self._marking = items + self._marking
            self._refused(flight, error)
        if self._landed is not None:
            finish(self._landed)
            self._landed = None
        self._pump()

    def _refused(self, flight: Flight, error: BaseException) -> None:
        inner = error.args[0] if isinstance(error, CommitFailedError) and error.args else error
        if isinstance(inner, RebalanceInProgressError):
            # The membership stands; the commit goes again when the rebalance is over.
            mine = set(self._parts.values())
            for waiter in flight.waiters:
                waiter.miss(set(waiter.settled.values()) - mine)
            self._waiters = flight.waiters + self._waiters
            self._later()
        elif isinstance(error, CommitFailedError):
            # The client may believe that it still owns partitions, and would not be given them again: begin anew.
            answer(flight.waiters, self._lost_loan())
            self._part("another generation of the group has begun")
        else:
            made = translated(error, f"commit for {self._name}", self._setting.group.topic)
            if isinstance(made, BrokerUnavailableError):
                self._later()
            elif isinstance(made, TopicMissingError):
                self._spawn(self._look())
                self._later()
            else:
                self._fail(made)
            answer(flight.waiters, made if isinstance(made, BrokerUnavailableError) else self._lost_loan())

    def _later(self) -> None:
        self._retry_at = self._loop.time() + RETRY_SECONDS

    async def _last_commit(self, partitions: list[Progress]) -> None:
        """Store what is known of partitions that this member gives up; within a few seconds or not at all."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                if self._flight is not None:
                    if self._landed is None:
                        self._landed = self._loop.create_future()
                    await asyncio.wait([self._landed])
                # Only now: what the commit under way wrote down as lent is not handed out either.
                self._put_back(partitions)
                if self._setting.identity is not None:
                    # Other partitions go on, so a commit may be under way at any time: the one after it holds all.
                    waiter = Waiter(self._loop, {})
                    self._waiters.append(waiter)
                    if self._flight is None:
                        self._commit()
                    await waiter.decided
        except TimeoutError:
            # The next owner goes on from the commit before: messages may come again.
            return

    # Ending

    def _end(self, token: int) -> tuple[Progress, Any] | None:
        self._until.pop(token, None)
        return self._loans.pop(token, None)

    def _expire(self, progress: Progress, message: Any) -> None:
        progress.expire(message)
        self._stale_since = self._loop.time()

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
        gone = [self._parts.pop(at) for at in places & self._parts.keys()]
        for waiter in self._waiters:
            waiter.miss(gone)
        if self._setting.identity is None:
            for progress in gone:
                self._starts[progress.partition] = progress.frontier.frontier
        self._held -= places

    def _part(self, reason: str) -> None:
        """Give up the membership; the next `receive` joins again."""
        self._failure = BrokerUnavailableError(f"{self._name}: {reason}", driver="kafka")
        self._drop(list(self._parts), reason)
        waiters, self._waiters = self._waiters, []
        answer(waiters, self._lost_loan())
        self._member.leave()
        self._wake()

    def _fail(self, error: UnistreamError) -> None:
        self._error = error
        self._drop(list(self._parts), str(error))
        self._wake()

    def _lost_loan(self) -> LeaseLostError:
        return LeaseLostError(
            f"a message of {self._name} is no longer lent to this member",
            driver="kafka",
            topic=self._setting.group.topic,
        )

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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


def finish(future: asyncio.Future[None]) -> None:
    """Resolve a future that is a mere signal."""
    if not future.done():
        future.set_result(None)
