"""A member of a shared or ephemeral group: lends what the broker pushes, and settles on the channel it came on.

A loan belongs to its channel. When the channel ends, for whatever reason, the broker gives the messages to others at
once; the loans are lost here. What comes back that way may have killed its member, so it is never lent beside others:
it is moved, confirmed, into the group's queue of suspects, which every member consumes one message at a time. So a
message that was only prefetched beside a deadly one has one attempt more, once.

Everything else that comes back (a nack, a message given back) is published anew with its count in a header, confirmed,
and only then acked.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from math import inf
from typing import Any

from pika import BasicProperties

from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import (
    DataLoss,
    MaybeAwaitable,
    RawDelivery,
    RawMessage,
    Settlement,
    SettleOutcome,
    Token,
    Verb,
)
from unistream.errors import ClosedError
from unistream_rabbitmq.consumer import Setting, declare_ephemeral
from unistream_rabbitmq.errors import translated
from unistream_rabbitmq.link import Channel
from unistream_rabbitmq.messages import arrived, put_back
from unistream_rabbitmq.relay import Hop

__all__ = ["SharedConsumer"]

_MOST_PREFETCH = 65535
_RELEASE_SECONDS = 3.0

_log = logging.getLogger("unistream.driver.amqp")


class _Arrival:
    """
    A message that the broker pushed and that is not settled; `spent` lendings count before this one.

    Of the times that it was lost, `most` count: who finds a lost message in the main queue does not lend it from there,
    so at most one lending is behind it, however often it was lost.
    """

    __slots__ = ("body", "message", "properties", "published_at", "spent", "suspect", "tag")

    def __init__(self, method: Any, properties: BasicProperties, body: bytes, most: float) -> None:
        said = arrived(method, properties, body)
        self.tag: int = method.delivery_tag
        self.message: RawMessage = said.message
        self.published_at = said.published_at
        self.spent = said.spent + int(min(said.lost, most))
        self.suspect = said.lost > 0
        self.properties = properties
        self.body = body

    def hop(self, queue: str, delay: float, spent: int) -> Hop:
        return Hop(queue, delay, self.body, put_back(self.properties, spent, self.message.partition))


class SharedConsumer(ConsumerDriver):
    """One member; see `Setting`. `join` makes it one."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._epoch = 0
        self._tags: list[str] = []
        self._closed = False
        self._joined_before = False
        # Every unsettled delivery tag of this channel, in order; of these, those that are lent.
        self._open: dict[int, None] = {}
        self._held: dict[Token, _Arrival] = {}
        self._settled_before: set[Token] = set()
        # Not lent yet: ordinary messages, suspects, and those that must go to the queue of suspects first.
        self._buffer: deque[_Arrival] = deque()
        self._suspects: deque[_Arrival] = deque()
        self._strays: deque[_Arrival] = deque()
        self._suspect_was_last = False
        self._moving: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._reason = "not joined"

    @property
    def in_flight(self) -> int:
        """Messages of the group that this member holds, lent or fetched ahead."""
        return len(self._open)

    def of(self, topic: str, group: str) -> bool:
        """Whether it is a member of this group."""
        return (self._setting.topic.name, self._setting.group.name) == (topic, group)

    # Joining

    async def join(self) -> None:
        """Open a channel and consume; a member from then on."""
        setting = self._setting
        channel: Channel | None = None
        try:
            wire = await setting.consuming.wire()
            channel = await wire.channel()
            self._epoch += 1
            epoch = self._epoch
            self._tags = []
            self._channel = channel
            channel.raw.add_on_cancel_callback(lambda _: self._ended(epoch, "the broker ended its consumer"))
            queue, suspects = setting.queues.main, setting.queues.suspects
            if setting.group.ephemeral:
                await declare_ephemeral(channel, setting)
            prefetch = min(setting.max_in_flight, _MOST_PREFETCH)
            for name in dict.fromkeys((queue, setting.queues.again)):
                await self._consume(channel, name, prefetch, self._on_message)
            if not setting.group.ephemeral:
                await self._consume(channel, suspects, 1, self._on_suspect)
            channel.on_end(lambda reason: self._ended(epoch, str(reason)))
        except Exception as error:
            self._channel = None
            if channel is not None:
                await channel.close()
            raise await setting.failed(error) from error
        except BaseException:
            self._channel = None
            if channel is not None:
                await asyncio.shield(channel.close())
            raise
        if setting.group.ephemeral and self._joined_before:
            setting.emit(DataLoss(setting.topic.name, setting.group.name, None, "the connection was lost meanwhile"))
        self._joined_before = True

    async def _consume(self, channel: Channel, queue: str, prefetch: int, taken: Any) -> None:
        await channel.call(channel.raw.basic_qos, prefetch_count=prefetch)
        frame = await channel.call(channel.raw.basic_consume, queue, on_message_callback=taken)
        self._tags.append(frame.method.consumer_tag)

    def _ended(self, epoch: int, reason: str) -> None:
        """The channel of this epoch is gone: its loans are lost, and the next `receive` joins again."""
        if epoch != self._epoch or self._channel is None:
            return
        channel, self._channel = self._channel, None
        self._reason = reason
        tokens = list(self._held)
        self._held.clear()
        self._open.clear()
        for waiting in (self._buffer, self._suspects, self._strays):
            waiting.clear()
        if channel.error is None:
            # Cancelled by the broker: the channel itself still stands, and with it what must be given back.
            closing = self._loop.create_task(channel.close())
            closing.add_done_callback(lambda task: task.cancelled() or task.result())
        if tokens and not self._closed:
            self._setting.lost(tokens, reason)
        self._wake()

    def _on_message(self, _: Any, method: Any, properties: BasicProperties, body: bytes) -> None:
        arrival = _Arrival(method, properties, body, 1)
        self._open[arrival.tag] = None
        if arrival.suspect:
            self._strays.append(arrival)
        else:
            self._buffer.append(arrival)
        if self._waiter is not None:
            self._wake()

    def _on_suspect(self, _: Any, method: Any, properties: BasicProperties, body: bytes) -> None:
        arrival = _Arrival(method, properties, body, inf)
        arrival.suspect = True
        self._open[arrival.tag] = None
        self._suspects.append(arrival)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Lending

    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        """See `ConsumerDriver.receive`."""
        if self._buffer and not self._strays and not self._closed:
            return self._take(limit)
        return self._receive(limit, timeout)

    async def _receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        until = self._loop.time() + timeout
        while True:
            if self._closed:
                raise ClosedError(f"{self._setting.what}: closed", driver="amqp", topic=self._setting.topic.name)
            if self._channel is None:
                await self.join()
            if self._strays:
                if self._moving is None:
                    self._moving = self._loop.create_task(self._quarantine())
                # Shielded: what was published and not acked yet would be there twice.
                await asyncio.shield(self._moving)
            taken = self._take(limit)
            if taken or timeout <= 0:
                return taken
            self._waiter = self._loop.create_future()
            try:
                async with asyncio.timeout_at(until):
                    await self._waiter
            except TimeoutError:
                return self._take(limit)
            finally:
                self._waiter = None

    def _take(self, limit: int) -> list[RawDelivery]:
        if self._suspects and not (self._suspect_was_last and self._buffer):
            # In turn with the others, so that a pile of suspects does not stop the group.
            self._suspect_was_last = True
            return [self._lend(self._suspects.popleft())]
        self._suspect_was_last = False
        buffer = self._buffer
        return [self._lend(buffer.popleft()) for _ in range(min(limit, len(buffer)))]

    def _lend(self, arrival: _Arrival) -> RawDelivery:
        token = (self._epoch, arrival.tag)
        self._held[token] = arrival
        return RawDelivery(
            arrival.message,
            token,
            None,
            arrival.published_at,
            arrival.spent + 1,
            arrival.suspect,
            arrival.properties,
        )

    async def _quarantine(self) -> None:
        """Move what came back from a lost member to the queue of suspects."""
        strays = list(self._strays)
        channel = self._channel
        try:
            await self._move(strays, channel)
        finally:
            self._moving = None

    async def _move(self, strays: Sequence[_Arrival], channel: Channel | None) -> None:
        setting = self._setting
        if not setting.group.ephemeral and not setting.relay.blocked:
            # One lending at most may be behind it: members that find it like this never lend it.
            hops = [stray.hop(setting.queues.suspects, 0.0, stray.spent) for stray in strays]
            try:
                await setting.relay.put(hops)
            except Exception as error:
                raise translated(error, setting.what, setting.topic.name) from error
            if channel is self._channel:
                self._ack([stray.tag for stray in strays])
        else:
            # While the broker takes no messages they are lent from here, alone like any suspect.
            self._suspects.extend(strays)
        if channel is self._channel:
            for _ in strays:
                self._strays.popleft()

    # Settling

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        held = self._held
        acks: list[int] = []
        rest: list[tuple[int, Settlement]] = []
        for index, settlement in enumerate(batch):
            token = settlement.token
            if token not in held:
                if token not in self._settled_before:
                    outcomes[index] = self._setting.gone(self._reason or "its lease has ended")
            elif settlement.verb is Verb.ACK:
                del held[token]
                acks.append(token[1])
                self._settled_before.add(token)
            elif settlement.verb is Verb.EXPIRE:
                del held[token]
                self._requeue(token)
                self._settled_before.add(token)
            else:
                rest.append((index, settlement))
        if acks:
            self._ack(acks)
        if rest:
            return self._put_back(outcomes, rest)
        self._settled_before.clear()
        return outcomes

    async def _put_back(self, outcomes: list[SettleOutcome], rest: list[tuple[int, Settlement]]) -> list[SettleOutcome]:
        setting = self._setting
        moving: list[tuple[int, Settlement, _Arrival]] = []
        for index, settlement in rest:
            arrival = self._held.get(settlement.token)
            if arrival is None:
                outcomes[index] = setting.gone(self._reason)
            else:
                moving.append((index, settlement, arrival))
        if setting.relay.blocked:
            for _, settlement, _ in moving:
                self._hold(settlement)
        else:
            try:
                await setting.relay.put([self._hop(settlement, arrival) for _, settlement, arrival in moving])
            except Exception as error:
                # What was published may come twice; what is still held is repeated by the caller.
                if not all(settlement.verb is Verb.RELEASE for _, settlement, _ in moving):
                    raise translated(error, setting.what, setting.topic.name) from error
                for _, settlement, _ in moving:
                    self._hold(settlement)
            else:
                tags = []
                for index, settlement, _ in moving:
                    if self._held.pop(settlement.token, None) is None:
                        outcomes[index] = setting.gone(self._reason)
                    else:
                        tags.append(settlement.token[1])
                        self._settled_before.add(settlement.token)
                self._ack(tags)
        self._settled_before.clear()
        return outcomes

    def _hop(self, settlement: Settlement, arrival: _Arrival) -> Hop:
        queues = self._setting.queues
        if settlement.verb is Verb.NACK:
            return arrival.hop(queues.again, settlement.delay, arrival.spent + 1)
        return arrival.hop(queues.suspects if arrival.suspect else queues.again, 0.0, arrival.spent)

    def _hold(self, settlement: Settlement) -> None:
        """While the broker takes no messages: keep it until its time, then requeue it, which costs an attempt."""
        if self._held.pop(settlement.token, None) is None:
            return
        self._settled_before.add(settlement.token)
        if settlement.delay > 0:
            self._loop.call_later(settlement.delay, self._requeue, settlement.token)
        else:
            self._requeue(settlement.token)

    def _requeue(self, token: Token) -> None:
        epoch, tag = token
        if epoch == self._epoch and self._channel is not None and tag in self._open:
            del self._open[tag]
            self._channel.raw.basic_nack(tag, requeue=True)

    def _ack(self, tags: Iterable[int]) -> None:
        """Ack: everything up to the first unsettled tag in one frame, the rest one by one."""
        if self._channel is None:
            return
        acked = set(tags)
        open_ = self._open
        raw = self._channel.raw
        highest = 0
        while open_:
            first = next(iter(open_))
            if first not in acked:
                break
            acked.discard(first)
            del open_[first]
            highest = first
        if highest:
            raw.basic_ack(highest, multiple=True)
        for tag in sorted(acked):
            del open_[tag]
            raw.basic_ack(tag)

    def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`; a loan stands as long as its channel."""
        held = self._held
        return [None if token in held else self._setting.gone(self._reason) for token in tokens]

    # Leaving

    async def close(self) -> None:
        """See `ConsumerDriver.close`."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        channel = self._channel
        try:
            if self._moving is not None:
                await asyncio.wait([self._moving], timeout=_RELEASE_SECONDS)
            if channel is not None and not self._setting.group.ephemeral:
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await self._give_back(channel)
        except Exception as error:
            # Closing the channel gives everything back all the same, at the cost of an attempt.
            _log.info("%s: leaves without giving back one by one: %s", self._setting.what, error or "no answer in time")
        finally:
            self._channel = None
            self._held.clear()
            if channel is not None:
                await asyncio.shield(self._leave(channel))
            await self._setting.relay.close()
            self._setting.closed(self)

    async def _give_back(self, channel: Channel) -> None:
        """Stop taking, and put what was never lent back as if it had never left."""
        for tag in self._tags:
            await channel.cancel(tag)
        setting = self._setting
        left: Collection[_Arrival] = [*self._buffer, *self._suspects, *self._strays]
        if left and not setting.relay.blocked and channel is self._channel:
            queues = setting.queues
            await setting.relay.put(
                [
                    arrival.hop(queues.suspects if arrival.suspect else queues.again, 0.0, arrival.spent)
                    for arrival in left
                ]
            )
            self._ack([arrival.tag for arrival in left])

    async def _leave(self, channel: Channel) -> None:
        if self._setting.group.ephemeral and channel.error is None:
            try:
                await channel.call(channel.raw.queue_delete, self._setting.queues.main)
            except Exception as error:
                _log.info("%s: its queue goes with the connection: %s", self._setting.what, error)
        await channel.close()
