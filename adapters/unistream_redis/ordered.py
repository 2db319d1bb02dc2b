"""A member of an ordered group: owns some partitions, and lends one message of a key at a time, in order."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from redis.exceptions import RedisError, ResponseError

from unistream.driver.types import RawDelivery, Settlement, Token, Verb
from unistream.errors import BrokerUnavailableError, ClosedError, GroupMissingError, TopicMissingError
from unistream_redis.consumer import Setting
from unistream_redis.entries import message_of
from unistream_redis.partition import Item, Partition
from unistream_redis.probe import POLL
from unistream_redis.turns import TurnTakingConsumer
from unistream_redis.wire import Argument, Request, pack

__all__ = ["OrderedConsumer"]


class OrderedConsumer(TurnTakingConsumer):
    """
    One member of an ordered group.

    It reads ahead of what it lends: an entry whose key is out waits for its turn, by id and key only.
    """

    def __init__(self, setting: Setting, lost: Callable[[Collection[Token], str], None]) -> None:
        super().__init__(setting, lost)
        self._step: asyncio.Task[None] | None = None
        self._waiting: Request | None = None
        self._waiting_for: frozenset[int] = frozenset()
        self._turn = 0
        self._greed = 1
        self._receiving = False
        self._received_at = self._loop.time()

    # Receiving

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """See `ConsumerDriver.receive`."""
        self._receiving = True
        try:
            if self._resigned:
                await self._return()
            return await self._receive(limit, timeout)
        finally:
            self._receiving = False
            self._received_at = self._loop.time()

    async def _receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        began = self._loop.time()
        until = began + timeout
        looked = False
        while True:
            if self._closed:
                raise ClosedError("the consumer is closed", driver="redis", topic=self._topic.name)
            if self._gone is not None:
                raise self._gone
            self._drop_overdue()
            if self._held:
                if self._held_since >= began:
                    return self._take(limit)
                await self._lend_anew()
                continue
            now = self._loop.time()
            soonest = self._wake_due(now)
            if self._step is None:
                if any(partition.ready for partition in self._owned.values()):
                    self._begin(self._lend_ready(limit))
                elif not looked and any(partition.readable for partition in self._owned.values()):
                    looked = True
                    self._begin(self._fetch(limit))
            if self._step is not None:
                await self._finish_step()
                if self._greed > 1:
                    looked = False  # all that came has to wait for its turn, and more may be there
            elif now >= until:
                return []
            elif await self._wait(min(until, soonest) - now):
                looked = False

    def _wake_due(self, now: float) -> float:
        """Make ready what is due; returns when the next is."""
        soonest = now + POLL
        expiring = now >= self._next_expiry
        if expiring:
            self._next_expiry = math.inf
        for partition in self._owned.values():
            partition.wake(now)
            if expiring:
                for item in partition.expired(now):
                    self._end(partition, item)
                    item.suspect = True
                    partition.put_back(item)
                self._next_expiry = min([self._next_expiry, *(item.until for item in partition.lent.values())])
            due = partition.next_due
            if due is not None:
                soonest = min(soonest, due)
        return min(soonest, self._next_expiry)

    def _begin(self, step: Coroutine[Any, Any, None]) -> None:
        """Start what must not be torn apart when `receive` is cancelled."""
        self._held_since = self._loop.time()
        self._step = asyncio.create_task(step)

    async def _finish_step(self) -> None:
        step = self._step
        assert step is not None
        try:
            await asyncio.shield(step)
        except RedisError as error:
            failure = await self._missing(error, "receive")
            raise failure from error
        finally:
            if step.done() and self._step is step:
                self._step = None

    async def _fetch(self, limit: int) -> None:
        """Read new entries; lend those whose key is free, keep the others in order."""
        partitions = [one for one in self._owned.values() if one.readable]
        if not partitions:
            return
        await self._recover([one for one in partitions if one.doubtful])
        self._turn = (self._turn + 1) % len(partitions)
        partitions = partitions[self._turn :] + partitions[: self._turn]
        try:
            answers = await self._act("read", [(one, ()) for one in partitions], min(limit * self._greed, 256))
        except RedisError:
            for partition in partitions:
                partition.doubtful = True
            raise
        came = sum(len(answer or ()) for answer in answers)
        room = limit
        aside: list[tuple[Partition, tuple[Argument, ...]]] = []
        for partition, answer in zip(partitions, answers, strict=True):
            kept: list[bytes] = []
            if self._owned.get(partition.index) is not partition:
                continue  # lost while the answer was on its way
            for entry in answer or ():
                partition.last = entry[0]
                message = message_of(entry[1], partition.index)
                item = Item(entry[0], message.key, 0)
                turn = partition.offer(item)
                if turn and room > 0 and not partition.leaving:
                    room -= 1
                    self._hold(partition, item, entry, 1)
                else:
                    kept.append(entry[0])
                    if turn:
                        partition.queue(item)
            if kept:
                aside.append((partition, tuple(kept)))
        self._greed = min(self._greed * 2, 256) if came and room == limit else 1
        if aside:
            await self._act("hold", aside)

    async def _recover(self, partitions: Sequence[Partition]) -> None:
        """Find what a read whose answer was lost had brought: it is pending, and comes after all that is known."""
        if not partitions:
            return
        answers = await self._act("load", [(one, (b"(" + one.last,)) for one in partitions])
        aside: list[tuple[Partition, tuple[Argument, ...]]] = []
        for partition, answer in zip(partitions, answers, strict=True):
            if answer is None or self._owned.get(partition.index) is not partition:
                continue
            last, *entries = answer
            for entry, _, _, key in entries:
                item = Item(entry, key, 0)
                if partition.offer(item):
                    partition.queue(item)
            partition.last = last
            partition.doubtful = False
            aside.append((partition, tuple(entry for entry, _, _, _ in entries)))
        if aside:
            await self._act("hold", aside)

    async def _lend_ready(self, limit: int) -> None:
        """Lend entries that were read before and have their turn now."""
        chosen: list[tuple[Partition, list[Item]]] = []
        for partition in self._owned.values():
            if limit <= 0 or not partition.ready or (chosen and partition.suspicious):
                continue
            items = partition.next_ready(limit)
            chosen.append((partition, items))
            limit -= len(items)
            if items[-1].suspect:
                break
        try:
            answers = await self._act(
                "lend",
                [
                    (partition, tuple(part for item in items for part in (item.entry, item.count + 1)))
                    for partition, items in chosen
                ],
            )
        except BaseException:
            for partition, items in chosen:
                for item in reversed(items):
                    partition.put_back(item)
            raise
        for (partition, items), answer in zip(chosen, answers, strict=True):
            if self._owned.get(partition.index) is not partition:
                continue  # lost while the answer was on its way
            for item, entry in zip(items, answer, strict=True):
                if entry is None:
                    partition.done(item)  # its payload was removed
                else:
                    self._hold(partition, item, entry, item.count + 1)

    async def _wait(self, seconds: float) -> bool:
        """Wait until something may have changed; True if there may be new entries."""
        readable = frozenset(one.index for one in self._owned.values() if one.readable)
        self._signal.clear()
        signal = asyncio.create_task(self._signal.wait())
        things: list[asyncio.Future[Any]] = [signal]
        try:
            if self._waiting is not None and self._waiting_for != readable:
                self._unblock()
            if self._waiting is None and readable and seconds >= 0.001:
                wire = await self._reader.wire()
                command: list[Argument] = ["XREAD", "COUNT", 1, "BLOCK", int(seconds * 1000), "STREAMS"]
                command += (self._streams[at].stream for at in readable)
                command += (self._owned[at].last for at in readable)
                self._waiting = wire.request([pack(tuple(command))], 1, seconds)
                self._waiting_for = readable
            if self._waiting is not None:
                things.append(self._waiting.future)
            done, _ = await asyncio.wait(things, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        except RedisError as error:
            raise await self._missing(error, "receive") from error
        finally:
            signal.cancel()
        request = self._waiting
        if request is None or request.future not in done:
            return bool(done)
        self._waiting = None
        try:
            (reply,) = request.future.result()
        except RedisError as error:
            raise await self._missing(error, "receive") from error
        if isinstance(reply, ResponseError):
            raise await self._missing(reply, "receive") from reply
        return reply is not None

    def _wake(self) -> None:
        self._signal.set()

    def _unblock(self) -> None:
        wire = self._commands.current
        if self._waiting is not None and not self._waiting.future.done() and wire is not None:
            wire.request([pack(("CLIENT", "UNBLOCK", self._reader.client_id))], 1)

    async def close(self) -> None:
        """See `ConsumerDriver.close`."""
        if self._closed:
            return
        self._closed = True
        if self._beat is not None:
            self._beat.cancel()
        self._signal.set()
        if self._step is not None:
            try:
                async with asyncio.timeout(1.0):
                    await asyncio.gather(self._step, return_exceptions=True)
            except TimeoutError:
                # What it read is pending for the next owner.
                self._owned.clear()
        await self._reader.close()
        try:
            await self._leave()
        except (BrokerUnavailableError, GroupMissingError, TopicMissingError):
            # Unreachable, or nothing to leave: the partitions are free when their leases end.
            self._owned.clear()

    async def _leave(self) -> None:
        untaken = list(self._held)
        self._held.clear()
        if self._group.ephemeral:
            await self._leave_nothing()
            return
        try:
            if untaken:
                await self.settle([Settlement(delivery.token, Verb.RELEASE) for delivery in untaken])
            free = [(partition, ()) for partition in self._owned.values() if not partition.lent]
            if free:
                await self._act("leave", free)
            await self._commands.call("ZREM", self._keys.members(self._group.name), self._name)
        except RedisError as error:
            raise await self._missing(error, "leave") from error

    def _busy(self) -> bool:
        return self._step is not None

    def _deserted(self) -> bool:
        now = self._loop.time()
        if self._receiving or self._step is not None or now - self._received_at < self._group.lease:
            return False
        return any(partition.expired(now) for partition in self._owned.values())
