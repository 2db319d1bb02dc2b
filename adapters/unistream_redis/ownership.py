"""How members of an ordered group share its partitions out, and what a partition that changes hands brings along."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

from redis.exceptions import RedisError

from unistream.driver.types import Token
from unistream.errors import GroupMissingError, TopicMissingError, UnistreamError
from unistream_redis.consumer import RedisConsumer, Setting, alive_for
from unistream_redis.partition import Item, Partition
from unistream_redis.scripts import BALANCE, ORDERED
from unistream_redis.wire import Argument

__all__ = ["OwningConsumer"]

_TRIM_EVERY = 1000  # milliseconds
_STANDS_STILL = 0.5
"""Seconds for which a partition that is to leave lends nothing, waiting for what is lent; then it goes on for a while,
since a slow handler of one message must not hold up all others of its partition."""
_GOES_ON = 2.0
_LENDING = ("read", "lend", "renew")
"""Steps with which the ownership lasts at least as long as what they lend."""
_SHORT_REST = 0.25
"""Seconds between two looks for a free partition while this member has less than its share."""


class OwningConsumer(RedisConsumer):
    """
    The owning half of a member of an ordered group.

    Each member knows its share from the list of members, takes free partitions up to it, and gives away what is beyond
    it once nothing of it is lent. Every step on a partition is a script that first checks that this member still owns
    it.
    """

    def __init__(self, setting: Setting, lost: Callable[[Collection[Token], str], None]) -> None:
        super().__init__(setting)
        self._tell_lost = lost
        self._owned: dict[int, Partition] = {}
        self._signal = asyncio.Event()
        self._balancing = asyncio.Lock()
        self._gone: UnistreamError | None = None
        self._resigned = False
        self._short = False

    def _rest(self) -> float:
        return min(_SHORT_REST, super()._rest()) if self._short else super()._rest()

    async def _enter(self) -> None:
        await self._reader.wire()
        await self._balance()

    async def _live(self) -> None:
        try:
            if self._resigned:
                return
            if self._deserted():
                await self._resign()
            else:
                await self._balance()
        except RedisError as error:
            failure = await self._missing(error, "take part")
            if self._group.ephemeral and isinstance(failure, GroupMissingError):
                for partition in list(self._owned.values()):
                    self._drop(partition, "the ephemeral group was removed")
                await self._revive()
                return
            if isinstance(failure, (TopicMissingError, GroupMissingError)):
                self._gone = failure
                self._signal.set()
            raise failure from error
        finally:
            self._drop_overdue()

    async def _balance(self) -> None:
        """Give a sign of life, renew, take, give away."""
        async with self._balancing:
            started = self._loop.time()
            group = self._group
            retention = self._topic.retention
            keys = [self._keys.members(group.name)]
            for stream in self._streams:
                keys += (
                    stream.stream,
                    stream.owner(group.name),
                    stream.epoch(group.name),
                    stream.lost,
                    stream.sweep(group.name),
                )
            arguments: list[Argument] = [
                group.name,
                self._name,
                self._lease_ms,
                int(alive_for(group) * 1000),
                _TRIM_EVERY,
                -1 if retention.max_age is None else int(retention.max_age * 1000),
                -1 if retention.max_messages is None else retention.max_messages,
                0 if retention else 1,
                1 if self._setting.server.acked_trim else 0,
            ]
            asked = dict(self._owned)
            arguments += (asked[at].fence if at in asked else b"" for at in range(len(self._streams)))
            share, gone, _, lost, taken = await self._commands.run(BALANCE, keys, arguments)
            if self._closed:
                return
            if gone:
                self._report(
                    gone if gone > 0 else None,
                    "removed before the group settled them: by retention, overflow or a foreign program",
                )
            for index in lost:
                self._drop(asked[index], "its partition went to another member")
            for partition in asked.values():
                if partition.index not in lost:
                    partition.valid_until = max(partition.valid_until, started + group.lease)
            for index, fence in zip(taken[::2], taken[1::2], strict=True):
                self._owned[index] = Partition(index, fence, started + group.lease)
            await self._load([one for one in self._owned.values() if not one.loaded])
            self._give_away(share)
            await self._hand_over()
            self._short = len(self._owned) < share

    async def _load(self, partitions: Sequence[Partition]) -> None:
        """Take over what the owners before left: what they lent without a word is a suspect."""
        if not partitions:
            return
        answers = await self._act("load", [(partition, ("-",)) for partition in partitions])
        seconds, microseconds = await self._commands.call("TIME")
        now_ms = int(seconds) * 1000 + int(microseconds) / 1000
        now = self._loop.time()
        for partition, answer in zip(partitions, answers, strict=True):
            if answer is None:
                continue
            last, *entries = answer
            partition.last = last
            for entry, count, due, key in entries:
                item = Item(entry, key, count, suspect=count > 0 and due is None)
                wait = 0.0 if due is None else (float(due) - now_ms) / 1000
                at = now + wait if wait > 0 else 0.0
                if partition.offer(item, at):
                    partition.queue(item, at)
            partition.loaded = True
        self._signal.set()

    def _give_away(self, share: int) -> None:
        """Mark what is beyond the share, what is easiest to give away first."""
        now = self._loop.time()
        easiest = sorted(self._owned.values(), key=lambda one: (not one.surplus, len(one.lent)))
        beyond = len(self._owned) - share
        for at, partition in enumerate(easiest):
            partition.surplus = at < beyond
            if not partition.surplus:
                partition.leaving = False
            elif not partition.leaving and partition.stay_until <= now:
                partition.leaving = True
                self._loop.call_later(_STANDS_STILL, self._go_on, partition)

    def _go_on(self, partition: Partition) -> None:
        """Lend from a partition again that did not get rid of what is lent in time; it is asked to leave later."""
        if self._owned.get(partition.index) is partition and partition.leaving and partition.lent:
            partition.leaving = False
            partition.stay_until = self._loop.time() + _GOES_ON
            self._signal.set()

    async def _hand_over(self) -> None:
        """Give away what is to be given away and of which nothing is lent."""
        free = [one for one in self._owned.values() if one.surplus and not one.lent and not self._busy()]
        if not free:
            return
        for partition in free:
            del self._owned[partition.index]
        await self._act("leave", [(partition, ()) for partition in free])

    def _drop_overdue(self) -> None:
        now = self._loop.time()
        for partition in list(self._owned.values()):
            if now >= partition.valid_until:
                self._drop(partition, "the ownership of its partition could not be renewed in time")

    async def _resign(self) -> None:
        """
        Give everything away although it is lent: its time is up, and nobody is left here to lend it again.

        What was lent and not settled has no due time, so the next owner takes it for what it is, a suspect.
        """
        self._resigned = True
        parts = [(partition, ()) for partition in self._owned.values()]
        for partition, _ in parts:
            self._drop(partition, "its time is up, and nobody receives here any more")
        if parts:
            await self._act("leave", parts)
        await self._commands.call("ZREM", self._keys.members(self._group.name), self._name)

    async def _return(self) -> None:
        """Take part again."""
        self._resigned = False
        try:
            await self._balance()
        except RedisError as error:
            raise await self._missing(error, "take part") from error

    @abstractmethod
    def _deserted(self) -> bool:
        """Whether loans ended without a word while nobody called `receive` for a whole lease."""

    @abstractmethod
    def _busy(self) -> bool:
        """Whether a step is under way that may lend something yet."""

    @abstractmethod
    def _drop(self, partition: Partition, reason: str) -> None:
        """The ownership ended: so did all loans of the partition."""

    async def _act(
        self,
        action: str,
        parts: Sequence[tuple[Partition, Sequence[Argument]]],
        *first: Argument,
        seconds: float | None = None,
    ) -> list[Any]:
        """
        Run one fenced step on partitions.

        Args:
            action: What the script is to do.
            parts: The partitions, each with its arguments.
            first: Arguments for all of them.
            seconds: How long what is lent or renewed by it is lent; `None`: a lease.

        Returns:
            One answer per partition; `None` for one that this member owns no more, which is dropped.
        """
        started = self._loop.time()
        name = self._group.name
        seconds = self._group.lease if seconds is None else seconds
        keys: list[str] = []
        arguments: list[Argument] = [name, action, int(seconds * 1000), *first]
        for partition, rest in parts:
            stream = self._streams[partition.index]
            keys += (stream.stream, stream.owner(name), stream.due(name), stream.lost)
            arguments.append(partition.fence)
            if action != "read":
                arguments += (len(rest), *rest)
        answers: list[Any] = await self._commands.run(ORDERED, keys, arguments)
        for (partition, _), answer in zip(parts, answers, strict=True):
            if answer is None and action != "leave":
                self._drop(partition, "its partition went to another member")
            elif action in _LENDING:
                partition.valid_until = max(partition.valid_until, started + seconds)
        return answers
