"""What every member has in common: its name, its heartbeat, the loans it holds, and how they end."""

from __future__ import annotations

import asyncio
import secrets
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from redis.exceptions import RedisError, ResponseError

from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import DataLoss, Event, GroupSpec, RawDelivery, SettleOutcome, Token, TopicSpec
from unistream.errors import (
    BrokerUnavailableError,
    GroupMissingError,
    LeaseLostError,
    SettleError,
    TopicMissingError,
    UnistreamError,
)
from unistream_redis.ephemeral import BEAT_EVERY, beat, delete_groups, sweep
from unistream_redis.errors import code_of, translated
from unistream_redis.keys import StreamKeys, TopicKeys
from unistream_redis.link import Link, Place
from unistream_redis.probe import MOST_SWEEP, Server
from unistream_redis.scripts import CREATE_GROUP

__all__ = ["Loan", "RedisConsumer", "Setting", "alive_for", "beat_every"]


def beat_every(group: GroupSpec) -> float:
    """Seconds between two signs of life of a member."""
    return min(group.lease / 4, MOST_SWEEP)


def alive_for(group: GroupSpec) -> float:
    """Seconds without a sign of life after which a member counts as dead."""
    return max(4 * beat_every(group), 2.0)


class Loan(NamedTuple):
    """The token of one loan: the stream it came from, the entry, and a number that never comes again."""

    stream: int
    entry: bytes
    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a member works, and for whom."""

    place: Place
    commands: Link
    server: Server
    group: GroupSpec
    topic: TopicSpec
    emit: Callable[[Event], None]


class RedisConsumer(ConsumerDriver):
    """One member of one group, on a connection of its own for what blocks."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._group = setting.group
        self._topic = setting.topic
        self._commands = setting.commands
        self._keys = TopicKeys.of(setting.topic)
        self._streams: Sequence[StreamKeys] = self._keys.streams
        self._name = f"m-{secrets.token_hex(12)}"
        self._reader = Link(setting.place, f"{setting.place.label} consumer of {setting.topic.name}", setting.emit)
        self._loop = asyncio.get_running_loop()
        self._serial = 0
        self._lease_ms = int(self._group.lease * 1000)
        self._closed = False
        self._beat: asyncio.Task[None] | None = None
        # What Redis lent and nobody has taken yet, and when the oldest request was made that lent any of it.
        self._held: deque[RawDelivery] = deque()
        self._held_since = 0.0
        # Loans whose settle got no answer, and until when it may be asked for again.
        self._doubtful: dict[Loan, float] = {}

    async def join(self) -> None:
        """Become a member."""
        try:
            await self._enter()
        except RedisError as error:
            await self._reader.close()
            raise await self._missing(error, "join") from error
        except BaseException:
            await self._reader.close()
            raise
        self._beat = asyncio.create_task(self._beating())

    @abstractmethod
    async def _enter(self) -> None:
        """Take part from now on."""

    def _take(self, limit: int) -> list[RawDelivery]:
        held = self._held
        if held[0].suspect:
            return [held.popleft()]
        taken: list[RawDelivery] = []
        while held and len(taken) < limit and not held[0].suspect:
            taken.append(held.popleft())
        return taken

    @abstractmethod
    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`."""

    async def _lend_anew(self) -> None:
        """Let what an earlier call left be lent from now on: a lease counts from the call that hands it out."""
        now = self._loop.time()
        tokens = [delivery.token for delivery in self._held]
        outcomes = await self.extend(tokens, self._group.lease)
        refused = {token for token, outcome in zip(tokens, outcomes, strict=True) if outcome is not None}
        self._held = deque(delivery for delivery in self._held if delivery.token not in refused)
        self._held_since = now

    def _lost_loan(self, loan: Loan) -> LeaseLostError:
        return LeaseLostError(
            f"entry {loan.entry.decode()} of topic {self._topic.name!r} is no longer lent to this member",
            driver="redis",
            topic=self._topic.name,
        )

    def _doubt_settles(self, loans: Collection[Loan]) -> None:
        """Settles of these loans got no answer: they may have been done, and may be asked for again."""
        now = self._loop.time()
        for loan in [one for one, until in self._doubtful.items() if until <= now]:
            # Nobody asks again after the lease.
            del self._doubtful[loan]
            self._forget(loan)
        self._doubtful.update(dict.fromkeys(loans, now + self._group.lease))

    @abstractmethod
    def _forget(self, loan: Loan) -> None:
        """The loan has ended, whoever ended it."""

    def _unknown_settle(self, loan: Loan) -> SettleError:
        return SettleError(
            f"entry {loan.entry.decode()} of topic {self._topic.name!r}: Redis did not answer its settle before this "
            "member lost it; it may be settled, or comes again",
            driver="redis",
            topic=self._topic.name,
        )

    def _report(self, count: int | None, detail: str) -> None:
        self._setting.emit(DataLoss(self._topic.name, self._group.name, count, detail))

    async def _missing(self, error: RedisError, what: str) -> UnistreamError:
        """The error of ours for one of theirs; where the group is gone, find out whether the topic is, too."""
        topic = self._topic.name
        if isinstance(error, ResponseError) and code_of(error) in ("NOGROUP", "UNBLOCKED"):
            streams = [keys.stream for keys in self._streams]
            try:
                there = await self._commands.call("EXISTS", *streams)
            except RedisError as lost:
                return translated(lost, what, topic)
            if there < len(streams):
                return TopicMissingError(f"topic {topic!r} was deleted", driver="redis", topic=topic)
            return GroupMissingError(
                f"group {self._group.name!r} of topic {topic!r} was deleted", driver="redis", topic=topic
            )
        return translated(error, f"{what} in group {self._group.name!r} of topic {topic!r}", topic)

    async def _beating(self) -> None:
        """Keep the membership while nobody calls `receive`."""
        rested = 0.0
        while True:
            rest = self._rest()
            await asyncio.sleep(rest)
            rested += rest
            try:
                await self._live()
                if rested >= BEAT_EVERY:
                    rested = 0.0
                    await self._tend_ephemeral()
            except (BrokerUnavailableError, TopicMissingError, GroupMissingError):
                # Nothing depends on this one beat, and the next `receive` meets the same error and raises it.
                continue

    def _rest(self) -> float:
        """Seconds until the next sign of life."""
        return beat_every(self._group)

    @abstractmethod
    async def _live(self) -> None:
        """Give one sign of life, if none was given lately."""

    @abstractmethod
    def _wake(self) -> None:
        """Make a waiting `receive` look for what is due."""

    async def _tend_ephemeral(self) -> None:
        try:
            if self._group.ephemeral:
                await beat(self._commands, self._keys, self._group.name)
            await sweep(self._commands, self._keys)
        except RedisError as error:
            raise await self._missing(error, "take part") from error

    async def _revive(self) -> None:
        """Start an ephemeral group anew that was swept away while its consumer was out of reach."""
        streams = [keys.stream for keys in self._streams]
        try:
            await self._commands.run(
                CREATE_GROUP,
                [self._keys.groups, self._keys.ephemeral, *streams],
                [self._group.name, "", *("$" for _ in streams)],
            )
        except RedisError as error:
            raise await self._missing(error, "receive") from error
        self._report(None, "the ephemeral group was removed while its consumer was away")

    async def _leave_nothing(self) -> None:
        try:
            await delete_groups(self._commands, self._keys, [self._group.name])
        except RedisError as error:
            raise await self._missing(error, "leave") from error
