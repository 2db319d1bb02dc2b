"""Locks at the broker: one on each topic, for as long as its queues are made or deleted, and one on the registry.

A lock is an exclusive queue, which the broker grants to one connection and takes back when that ends. Whoever changes
something has a connection of its own for it, with short heartbeats: a holder that dies lets go at once, and one that is
frozen or cut off within seconds, whatever heartbeat the client was given. The registry's lock is held only to read it
and to append what changed; whoever makes queues, which takes long, holds that of the topic.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from pika.exceptions import AMQPError, ChannelClosed

from unistream.errors import BrokerUnavailableError
from unistream_rabbitmq.confirms import Publisher
from unistream_rabbitmq.errors import RESOURCE_LOCKED, code_of
from unistream_rabbitmq.link import Channel, Place, Wire
from unistream_rabbitmq.names import LINE, LOCK, lock_of

__all__ = ["Holder", "Locks"]

_HEARTBEAT = 3
"""Seconds; the server drops a silent connection after two to three of them."""
_WAIT_SECONDS = 20.0
_LINE_SECONDS = 10.0
_LINE = {"x-single-active-consumer": True, "x-max-length": 1}
_RETRY_SECONDS = 0.01
_MOST_RETRY_SECONDS = 0.1
_log = logging.getLogger("unistream.driver.amqp")


class Holder:
    """
    A connection that holds locks, and ends with them.

    Args:
        wire: The connection.
        timeout: Seconds for one answer.
    """

    def __init__(self, wire: Wire, timeout: float) -> None:
        self.wire = wire
        self._timeout = timeout
        self._asking: Channel | None = None
        self._writing: Publisher | None = None

    async def publisher(self) -> Publisher:
        """What is written by it is written only as long as the locks are held."""
        if self._writing is None:
            self._writing = await Publisher.open(self.wire)
        return self._writing

    @asynccontextmanager
    async def holding(self, name: str, line: str) -> AsyncIterator[None]:
        """
        Hold a lock for which many may wait: who finds it taken stands in line.

        Raises:
            BrokerUnavailableError: Somebody else holds it for too long.
        """
        waiting: Channel | None = None
        try:
            if not await self._took(name):
                waiting = await self._stand_in(line)
                await self.take(name)
            try:
                yield
            finally:
                await asyncio.shield(self._let_go(name))
        finally:
            if waiting is not None:
                await asyncio.shield(waiting.close())

    async def _stand_in(self, line: str) -> Channel:
        """
        Come to the head of a line, and give the channel to close for the next to come.

        One after another is the line's active consumer and gets its only message. It keeps order among those who wait
        and nothing more: whoever can't stand in it, or stands too long, goes on without.
        """
        channel = await self.wire.channel()
        first: asyncio.Future[None] = self.wire.loop.create_future()

        def come(*_: object) -> None:
            if not first.done():
                first.set_result(None)

        channel.on_end(come)
        raw = channel.raw
        raw.add_on_cancel_callback(come)
        try:
            async with asyncio.timeout(_LINE_SECONDS):
                await channel.call(raw.queue_declare, line, durable=True, auto_delete=True, arguments=_LINE)
                raw.basic_publish("", line, b"")
                await channel.call(raw.basic_consume, line, on_message_callback=come)
                await first
        except (ChannelClosed, TimeoutError) as error:
            _log.debug("goes on without standing in line: %r", error)
        return channel

    async def take(self, name: str) -> None:
        """
        Wait for a lock.

        Raises:
            BrokerUnavailableError: Somebody else holds it for too long.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + _WAIT_SECONDS
        pause = _RETRY_SECONDS
        while not await self._took(name):
            if loop.time() > until:
                raise BrokerUnavailableError(
                    f"another client holds the lock {name!r} for {_WAIT_SECONDS:g} s", driver="amqp"
                )
            await asyncio.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 1.5, _MOST_RETRY_SECONDS)

    async def _took(self, name: str) -> bool:
        try:
            async with asyncio.timeout(self._timeout):
                channel = await self._channel()
                await channel.call(channel.raw.queue_declare, name, exclusive=True)
        except ChannelClosed as error:
            if code_of(error) != RESOURCE_LOCKED:
                raise
            return False
        return True

    async def _let_go(self, name: str) -> None:
        """Give a lock up, if need be with the connection."""
        try:
            async with asyncio.timeout(self._timeout):
                channel = await self._channel()
                await channel.call(channel.raw.queue_delete, name)
        except (AMQPError, TimeoutError) as error:
            _log.info("the lock %r is given up with its connection: %r", name, error)
            self.wire.abort("its lock was not given up in time")

    async def _channel(self) -> Channel:
        if self._asking is None or self._asking.error is not None:
            self._asking = await self.wire.channel()
        return self._asking


class Locks:
    """
    Takes locks.

    Args:
        place: Where the server is.
    """

    def __init__(self, place: Place) -> None:
        self._place = replace(place, heartbeat=min(place.heartbeat, _HEARTBEAT))
        # Those of one client don't have to ask the broker which of them is next.
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def holder(self) -> AsyncIterator[Holder]:
        """Give a connection to hold locks."""
        wire = await Wire.open(self._place, "unistream lock")
        try:
            yield Holder(wire, self._place.connect_timeout)
        finally:
            await asyncio.shield(wire.close())

    @asynccontextmanager
    async def on_topic(self, topic: str) -> AsyncIterator[Holder]:
        """
        Hold the lock of a topic: nobody else changes it, or its groups.

        Raises:
            BrokerUnavailableError: Somebody else holds it for too long.
        """
        async with self.holder() as holder:
            await holder.take(lock_of(topic))
            yield holder

    @asynccontextmanager
    async def on_registry(self, holder: Holder) -> AsyncIterator[None]:
        """
        Hold the lock of the registry too.

        Raises:
            BrokerUnavailableError: Somebody else holds it for too long.
        """
        async with self._turn, holder.holding(LOCK, LINE):
            yield
