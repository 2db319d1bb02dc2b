"""What every member has in common: its name, its heartbeat, the loans it holds, and how they end."""

from __future__ import annotations

import asyncio
import secrets
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from redis.exceptions import RedisError, ResponseError

from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import DataLoss, Event, GroupSpec, Settlement, SettleOutcome, Token, TopicSpec, Verb
from unistream.errors import (
    BrokerUnavailableError,
    GroupMissingError,
    LeaseLostError,
    TopicMissingError,
    UnistreamError,
)
from unistream_redis.errors import code_of, translated
from unistream_redis.keys import StreamKeys, TopicKeys
from unistream_redis.link import Link, Place
from unistream_redis.probe import MOST_SWEEP, POLL, Server
from unistream_redis.scripts import EXTEND, JOIN, SETTLE
from unistream_redis.wire import Argument

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
        self._loans: dict[Loan, int] = {}
        self._doubtful: set[Loan] = set()
        self._serial = 0
        self._lease_ms = int(self._group.lease * 1000)
        self._closed = False
        self._beat: asyncio.Task[None] | None = None

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

    async def _enter(self) -> None:
        await self._reader.wire()
        keys = [
            self._keys.members(self._group.name),
            *(key for keys in self._streams for key in (keys.stream, keys.lost)),
        ]
        await self._commands.run(JOIN, keys, [self._group.name, self._name])

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        loans = self._loans
        acks: dict[int, list[int]] = {}
        others: dict[int, list[int]] = {}
        for at, (loan, verb, _) in enumerate(batch):
            if loan not in loans:
                outcomes[at] = self._lost_loan(loan)
            elif verb is Verb.ACK:
                acks.setdefault(loan.stream, []).append(at)
            else:
                others.setdefault(loan.stream, []).append(at)
        for stream in {**acks, **others}:
            await self._settle(stream, batch, acks.get(stream, []), others.get(stream, []), outcomes)
        return outcomes

    async def _settle(
        self,
        stream: int,
        batch: Sequence[Settlement],
        acks: list[int],
        others: list[int],
        outcomes: list[SettleOutcome],
    ) -> None:
        loans = self._loans
        size = len(acks) + len(others)
        look = "range" if size > 4 and 4 * size >= len(loans) else "each"
        arguments: list[Argument] = [self._group.name, self._name, look, len(acks)]
        for at in acks:
            loan = batch[at].token
            arguments.append(loan.entry)
            arguments.append(loans[loan])
        soonest = POLL
        for at in others:
            loan, verb, delay = batch[at]
            count = loans[loan]
            keep = max(0, count - 1) if verb is Verb.RELEASE else -1
            wait = delay if verb is Verb.NACK else 0.0
            soonest = min(soonest, wait)
            arguments += (loan.entry, count, keep, round(wait * 1000))
        keys = self._streams[stream]
        name = self._group.name
        order = acks + others
        try:
            refused = await self._commands.run(
                SETTLE, [keys.stream, keys.due(name), keys.held(name), keys.lost], arguments
            )
        except BaseException as error:
            self._doubtful.update(batch[at].token for at in order)
            if not isinstance(error, RedisError):
                raise
            raise await self._missing(error, "settle") from error
        for index, why in zip(refused[::2], refused[1::2], strict=True):
            at = order[index]
            loan, verb, _ = batch[at]
            # An earlier settle of the same loan, whose answer was lost, may have done it already.
            done = loan in self._doubtful and why == (0 if verb is Verb.ACK else 1)
            if not done:
                outcomes[at] = self._lost_loan(loan)
        for at in order:
            loans.pop(batch[at].token, None)
        if self._doubtful:
            self._doubtful.difference_update(batch[at].token for at in order)
        if others and soonest < POLL:
            self._loop.call_later(soonest, self._wake)

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`."""
        outcomes: list[SettleOutcome] = [None] * len(tokens)
        streams: dict[int, list[int]] = {}
        for at, loan in enumerate(tokens):
            if loan in self._loans:
                streams.setdefault(loan.stream, []).append(at)
            else:
                outcomes[at] = self._lost_loan(loan)
        wanted = round(seconds * 1000)
        idle, beyond = max(0, self._lease_ms - wanted), max(0, wanted - self._lease_ms)
        for stream, places in streams.items():
            keys = self._streams[stream]
            arguments: list[Argument] = [self._group.name, self._name, idle, beyond, self._lease_ms]
            for at in places:
                arguments += (tokens[at].entry, self._loans[tokens[at]])
            try:
                refused = await self._commands.run(
                    EXTEND, [keys.stream, keys.held(self._group.name), keys.lost], arguments
                )
            except RedisError as error:
                raise await self._missing(error, "extend") from error
            for index in refused:
                outcomes[places[index]] = self._lost_loan(tokens[places[index]])
                del self._loans[tokens[places[index]]]
        return outcomes

    def _lend(self, stream: int, entry: bytes, count: int) -> Loan:
        self._serial += 1
        loan = Loan(stream, entry, self._serial)
        self._loans[loan] = count
        return loan

    def _lost_loan(self, loan: Loan) -> LeaseLostError:
        return LeaseLostError(
            f"entry {loan.entry.decode()} of topic {self._topic.name!r} is no longer lent to this member",
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
        while True:
            await asyncio.sleep(beat_every(self._group))
            try:
                await self._live()
            except (BrokerUnavailableError, TopicMissingError, GroupMissingError):
                # Nothing depends on this one beat, and the next `receive` meets the same error and raises it.
                continue

    @abstractmethod
    async def _live(self) -> None:
        """Give one sign of life, if none was given lately."""

    @abstractmethod
    def _wake(self) -> None:
        """Make a waiting `receive` look for what is due."""
