"""A member of a shared or ephemeral group: lends what the broker pushes, and settles on the channel it came on.

A loan belongs to its channel. When the channel ends, for whatever reason, the broker gives the messages to others at
once; the loans are lost here. What comes back that way may have killed its member, so it is never lent beside others:
it is rejected, and the broker moves it to the group's queue of suspects, which every member consumes one message at a
time. So a message that was only prefetched beside a deadly one has one attempt more, once.
The message of an ended lease goes the same way.

What is nacked or given back is published anew with its count in a header, confirmed, and only then acked.

The broker pushes whether this member is asked for messages or not. One that is not asked, while others are there,
rests: it gives back what it has not lent, and stops consuming until it is asked again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import DataLoss, MaybeAwaitable, RawDelivery, Settlement, SettleOutcome, Token, Verb
from unistream.errors import ClosedError
from unistream_rabbitmq.consumer import PATIENCE_SECONDS, Setting, declare_ephemeral
from unistream_rabbitmq.errors import translated
from unistream_rabbitmq.fetched import Arrival, Fetched
from unistream_rabbitmq.link import Channel
from unistream_rabbitmq.relay import Hop
from unistream_rabbitmq.returns import Returns

__all__ = ["SharedConsumer"]

_MOST_PREFETCH = 65535
_RELEASE_SECONDS = 3.0

_log = logging.getLogger("unistream.driver.amqp")


class SharedConsumer(ConsumerDriver):
    """One member; see `Setting`. `join` makes it one."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._loop = asyncio.get_running_loop()
        self._fetched: Fetched | None = None
        self._epoch = 0
        # The consumers by which messages come; none while it rests.
        self._tags: list[str] = []
        self._closed = False
        self._joined_before = False
        self._returns = Returns(setting)
        self._settled_before: set[Token] = set()
        # Joining, resting: one of these at a time, and whole.
        self._step: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._asked = True
        self._clock: asyncio.TimerHandle | None = None
        self._reason = "not joined"

    @property
    def in_flight(self) -> int:
        """Messages of the group that this member holds, lent or fetched ahead."""
        return 0 if self._fetched is None else len(self._fetched.open)

    def of(self, topic: str, group: str) -> bool:
        """Whether it is a member of this group."""
        return (self._setting.topic.name, self._setting.group.name) == (topic, group)

    # Joining

    async def join(self) -> None:
        """Open a channel and consume; a member from then on."""
        setting = self._setting
        channel: Channel | None = None
        try:
            channel = await (await setting.consuming.wire()).channel()
            self._epoch += 1
            fetched = self._fetched = Fetched(channel, self._epoch, self._wake, apart=not setting.group.ephemeral)
            channel.raw.add_on_cancel_callback(lambda _: self._ended(fetched, "the broker ended its consumer"))
            if setting.group.ephemeral:
                await declare_ephemeral(channel, setting)
            else:
                await channel.call(
                    channel.raw.basic_consume, setting.queues.roll, on_message_callback=_nothing, auto_ack=True
                )
            await self._consume(fetched)
            channel.on_end(lambda reason: self._ended(fetched, str(reason)))
        except BaseException as error:
            self._fetched = None
            if channel is not None:
                await asyncio.shield(channel.close())
            if isinstance(error, Exception):
                raise await setting.failed(error) from error
            raise
        if setting.group.ephemeral and self._joined_before:
            setting.emit(DataLoss(setting.topic.name, setting.group.name, None, "the connection was lost meanwhile"))
        elif self._clock is None and not setting.group.ephemeral:
            self._tick()
        self._joined_before = True

    async def _consume(self, fetched: Fetched) -> None:
        setting = self._setting
        queues, raw = setting.queues, fetched.channel.raw
        taken: dict[str, tuple[int, Callable[..., None]]] = {}
        if not setting.group.ephemeral:
            taken[queues.suspects] = (1, fetched.on_suspect)
        for name in (queues.main, queues.again):
            taken[name] = (min(setting.max_in_flight, _MOST_PREFETCH), fetched.on_message)
        tags = []
        for name, (prefetch, told) in taken.items():
            await fetched.channel.call(raw.basic_qos, prefetch_count=prefetch)
            frame = await fetched.channel.call(raw.basic_consume, name, on_message_callback=told)
            tags.append(frame.method.consumer_tag)
        self._tags = tags

    async def _resume(self, fetched: Fetched) -> None:
        """Consume again after a rest."""
        try:
            await self._consume(fetched)
        except Exception as error:
            if not fetched.over:
                await fetched.channel.close()
            raise await self._setting.failed(error) from error

    def _ended(self, fetched: Fetched, reason: str) -> None:
        """A channel is gone: its loans are lost, and the next `receive` joins again."""
        if fetched is not self._fetched:
            return
        self._fetched = None
        self._tags = []
        self._reason = reason
        tokens = fetched.end()
        channel = fetched.channel
        if channel.error is None:
            # Cancelled by the broker: the channel itself still stands, and with it what must be given back.
            closing = self._loop.create_task(channel.close())
            closing.add_done_callback(lambda task: task.cancelled() or task.result())
        if tokens and not self._closed:
            self._setting.lost(tokens, reason)
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # Lending

    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        """See `ConsumerDriver.receive`."""
        self._asked = True
        fetched = self._fetched
        if fetched is not None and fetched.ready and self._step is None and not self._closed:
            return fetched.take(limit)
        return self._receive(limit, timeout)

    async def _receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        until = self._loop.time() + timeout
        while True:
            self._asked = True
            if self._closed:
                raise ClosedError(f"{self._setting.what}: closed", driver="amqp", topic=self._setting.topic.name)
            fetched = self._fetched
            if self._step is not None:
                await asyncio.shield(self._step)
            elif fetched is None:
                await self._whole(self.join())
            elif not self._tags:
                await self._whole(self._resume(fetched))
            else:
                taken = fetched.take(limit)
                if taken or timeout <= 0 or self._loop.time() >= until:
                    return taken
                await self._wait(until)

    async def _wait(self, until: float) -> None:
        self._waiter = self._loop.create_future()
        timer = self._loop.call_at(until, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    async def _whole(self, doing: Coroutine[Any, Any, None]) -> None:
        """Do something that must not be left half done when its caller is cancelled."""
        step = self._step = self._loop.create_task(doing)
        step.add_done_callback(self._did)
        await asyncio.shield(step)

    def _did(self, _: asyncio.Task[None]) -> None:
        self._step = None
        self._wake()

    # Resting

    def _tick(self) -> None:
        fetched = self._fetched
        idle = not self._asked and self._waiter is None and self._step is None
        if idle and fetched is not None and fetched.unlent and not self._setting.relay.blocked:
            self._step = self._loop.create_task(self._rest(fetched))
            self._step.add_done_callback(self._did)
        self._asked = False
        self._clock = self._loop.call_later(PATIENCE_SECONDS, self._tick)

    async def _rest(self, fetched: Fetched) -> None:
        """Let others have what this member was pushed and is not asked for; alone it keeps that, and so its order."""
        try:
            if self._tags and await self._setting.consumers(self._setting.queues.main) < 2:
                return
            if self._asked:
                return
            await self._stop(fetched)
            if not self._asked:
                await self._returns.unlent(fetched, fetched.take_unlent())
        except Exception as error:
            # It stays here until the next look, or until the channel ends.
            _log.info("%s: could not give back what it was not asked for: %s", self._setting.what, error)

    async def _stop(self, fetched: Fetched) -> None:
        tags, self._tags = self._tags, []
        for tag in tags:
            await fetched.channel.cancel(tag)

    # Settling

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        fetched = self._fetched
        held: dict[Token, Arrival] = {} if fetched is None else fetched.held
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
            elif settlement.verb is Verb.EXPIRE and fetched is not None:
                fetched.expire(token[1], held.pop(token))
                self._settled_before.add(token)
            else:
                rest.append((index, settlement))
        if fetched is not None:
            if acks:
                fetched.ack(acks)
            if rest:
                return self._put_back(fetched, outcomes, rest)
        self._settled_before.clear()
        return outcomes

    async def _put_back(
        self, fetched: Fetched, outcomes: list[SettleOutcome], rest: list[tuple[int, Settlement]]
    ) -> list[SettleOutcome]:
        setting, relay, held = self._setting, self._setting.relay, fetched.held
        moving: list[tuple[int, Settlement, Hop]] = []
        for index, settlement in rest:
            token, _, delay = settlement
            arrival = held.get(token)
            if arrival is None:
                outcomes[index] = setting.gone(self._reason)
            elif relay.blocked:
                self._let_go(fetched, token)
                self._returns.hold(fetched, token[1], delay)
            elif not relay.ready(delay):
                self._let_go(fetched, token)
                self._returns.keep(fetched, delay, arrival)
            else:
                moving.append((index, settlement, self._returns.hop(settlement, arrival)))
        try:
            await self._returns.put(fetched, [hop for _, _, hop in moving])
        except Exception as error:
            # What was published may come twice. Nacks are still held unless the channel ended; the caller repeats them.
            for _, settlement, _ in moving:
                if settlement.verb is not Verb.NACK and self._let_go(fetched, settlement.token):
                    self._returns.hold(fetched, settlement.token[1], 0.0)
            if any(settlement.verb is Verb.NACK for _, settlement, _ in moving):
                raise translated(error, setting.what, setting.topic.name) from error
        else:
            tags = []
            for index, settlement, _ in moving:
                if self._let_go(fetched, settlement.token):
                    tags.append(settlement.token[1])
                else:
                    outcomes[index] = setting.gone(self._reason)
            fetched.ack(tags)
        self._settled_before.clear()
        return outcomes

    def _let_go(self, fetched: Fetched, token: Token) -> bool:
        """The loan ends; False if it had ended before."""
        if fetched.held.pop(token, None) is None:
            return False
        self._settled_before.add(token)
        return True

    def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`; a loan stands as long as its channel."""
        held: dict[Token, Arrival] = {} if self._fetched is None else self._fetched.held
        return [None if token in held else self._setting.gone(self._reason) for token in tokens]

    # Leaving

    async def close(self) -> None:
        """See `ConsumerDriver.close`."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        if self._clock is not None:
            self._clock.cancel()
        try:
            async with asyncio.timeout(_RELEASE_SECONDS):
                if self._step is not None:
                    await asyncio.wait([self._step])
                if self._fetched is not None and not self._setting.group.ephemeral:
                    await self._stop(self._fetched)
                    if not self._setting.relay.blocked:
                        await self._returns.unlent(self._fetched, self._fetched.take_unlent())
                        await self._returns.kept()
        except Exception as error:
            # Closing the channel gives everything back all the same, at the cost of an attempt.
            _log.info("%s: leaves without giving back one by one: %s", self._setting.what, error or "no answer in time")
        finally:
            self._returns.cancel()
            if self._step is not None:
                self._step.cancel()
            fetched, self._fetched = self._fetched, None
            if fetched is not None:
                fetched.end()
                await asyncio.shield(self._leave(fetched.channel))
            await self._setting.relay.close()
            self._setting.closed(self)

    async def _leave(self, channel: Channel) -> None:
        if self._setting.group.ephemeral and channel.error is None:
            try:
                await channel.call(channel.raw.queue_delete, self._setting.queues.main)
            except Exception as error:
                _log.info("%s: its queue goes with the connection: %s", self._setting.what, error)
        await channel.close()


def _nothing(*_: Any) -> None:
    """Nobody publishes to the roll."""
