"""What the tests of adapters share: a checked driver on a real broker, and a proxy that can fail in between."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar, Self, TypeVar

from unistream.config import parse_target
from unistream.driver.checked import checked
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import (
    DataLoss,
    Event,
    GroupSpec,
    RawDelivery,
    RawMessage,
    Settlement,
    SettleOutcome,
    Token,
    TopicSpec,
    Verb,
)

Here = TypeVar("Here")

LIMIT = 20.0
"""Seconds that a test waits for something that must come; only a failure takes that long."""

LATE = 3.0
"""Seconds that a busy machine may add to what comes late at most a second by its promise. Nothing may come early."""


def run(test: Callable[[], Coroutine[Any, Any, None]], seconds: float = 90.0) -> None:
    """Run an asynchronous test to its end."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await test()

    asyncio.run(bounded())


class Opened:
    """
    A driver on the broker under test, with what it emitted.

    Attributes:
        prefix: Of the names of topics.
    """

    prefix: ClassVar[str] = "t."

    def __init__(self, driver: Driver, events: list[Event]) -> None:
        self.driver: Any = driver
        self.events = events
        self.name = f"{self.prefix}{secrets.token_hex(6)}"
        self.ended: list[Token] = []

    @classmethod
    @asynccontextmanager
    async def on(cls, kind: type[Driver], address: str) -> AsyncIterator[Self]:
        """A checked driver of this kind; the test's topic is deleted at the end."""
        driver_class = checked(kind)
        events: list[Event] = []
        driver = driver_class(parse_target(address, driver_class), events.append)
        await driver.open()
        here = cls(driver, events)
        try:
            yield here
        finally:
            try:
                await driver.delete_topic(here.name)
            finally:
                await driver.close()

    @property
    def gaps(self) -> list[DataLoss]:
        """The losses reported so far."""
        return [event for event in self.events if isinstance(event, DataLoss)]

    @property
    def lost(self) -> int:
        """Messages reported lost so far."""
        return sum(event.count or 0 for event in self.gaps)

    async def topic(self, **settings: Any) -> TopicSpec:
        """The test's topic."""
        made: TopicSpec = await self.driver.create_topic(TopicSpec(self.name, **settings))
        return made

    async def group(self, name: str = "g", **settings: Any) -> GroupSpec:
        """A group of the test's topic."""
        made: GroupSpec = await self.driver.create_group(GroupSpec(self.name, name, **settings))
        return made

    async def join(self, group: GroupSpec, max_in_flight: int = 100) -> Any:
        """A member of a group; loans of it that ended unasked are noted in `ended`."""

        def lost(tokens: Any, why: str) -> None:
            self.ended.extend(tokens)

        topic = await self.driver.topic(self.name)
        return await self.driver.consumer(group, topic, max_in_flight=max_in_flight, lost=lost)

    async def produce(self) -> Any:
        """A producer of the test's topic."""
        return await self.driver.producer(await self.driver.topic(self.name))

    async def publish(self, count: int, *, first: int = 0, key: bytes | None = None, partition: int = 0) -> None:
        """Publish messages whose ids are their numbers."""
        producer = await self.produce()
        batch = [message(number, key=key, partition=partition) for number in range(first, first + count)]
        for start in range(0, count, producer.batch_messages):
            outcomes = await producer.publish(batch[start : start + producer.batch_messages], LIMIT)
            failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert not failed, failed
        await producer.close()


def message(number: int, *, key: bytes | None = None, partition: int = 0) -> RawMessage:
    """A message whose id and body are a number."""
    return RawMessage(str(number), str(number).encode(), key, (), partition)


async def receive(consumer: ConsumerDriver, limit: int, timeout: float) -> list[RawDelivery]:
    """Receive, whether the answer comes at once or later."""
    answer = consumer.receive(limit, timeout)
    return answer if isinstance(answer, list) else await answer


async def take(consumer: ConsumerDriver, count: int, limit: int = 100) -> list[RawDelivery]:
    """Receive until `count` deliveries came."""
    deliveries: list[RawDelivery] = []
    async with asyncio.timeout(LIMIT):
        while len(deliveries) < count:
            # Short, since a lease counts from the call.
            deliveries += await receive(consumer, min(limit, count - len(deliveries)), 0.1)
    return deliveries


async def settle(
    consumer: ConsumerDriver, deliveries: list[RawDelivery], verb: Verb = Verb.ACK, delay: float = 0
) -> list[SettleOutcome]:
    """Settle deliveries alike, whether the answer comes at once or later."""
    answer = consumer.settle([Settlement(delivery.token, verb, delay) for delivery in deliveries])
    return answer if isinstance(answer, list) else await answer


async def end(consumer: ConsumerDriver, deliveries: list[RawDelivery], verb: Verb = Verb.ACK, delay: float = 0) -> None:
    """Settle deliveries alike; none may be refused."""
    assert await settle(consumer, deliveries, verb, delay) == [None] * len(deliveries)


def ids(deliveries: list[RawDelivery]) -> list[str]:
    """The ids of the messages delivered."""
    return [delivery.message.id for delivery in deliveries]


class Proxy:
    """
    Stands between a driver and its broker: cuts connections, freezes them, or swallows the broker's replies.

    Attributes:
        deaf: Replies are swallowed.
        replies_left: After so many reads of replies it becomes deaf; `None`: never.
        refuse: New connections are ended at once.
        address: Where it listens.
        upstream: Where the broker is.
    """

    def __init__(self, kind: type[Driver]) -> None:
        self.deaf = False
        self.replies_left: int | None = None
        self.refuse = False
        self.address = ("", 0)
        self.upstream = ("", 0)
        self.driver = self._through_here(kind)
        self._stopped = False
        self._open = asyncio.Event()
        self._open.set()
        self._pipes: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def _through_here(self, kind: type[Driver]) -> type[Driver]:
        """The driver's class, with every connection going through here."""

        def dial(driver: Driver, host: str, port: int) -> tuple[str, int]:
            self.upstream = (host, port)
            return self.address

        return type("Proxied", (kind,), {"dial": dial})

    def cut(self) -> None:
        """Close every connection at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def drained(self) -> None:
        """Wait until the connections that were cut are gone on both sides."""
        if self._pipes:
            await asyncio.wait(self._pipes)

    def freeze(self) -> None:
        """Let no byte through, in either direction; connections stay open."""
        self._open.clear()

    def heal(self) -> None:
        """Let bytes, replies and new connections through again."""
        self._open.set()
        self.replies_left = None
        self.deaf = self.refuse = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pipe one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        if self.refuse:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        if self._stopped:
            writer.transport.abort()
            up_writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        pipes = [
            asyncio.create_task(self._pipe(reader, up_writer, False)),
            asyncio.create_task(self._pipe(up_reader, writer, True)),
        ]
        self._pipes.update(pipes)
        await asyncio.wait(pipes)
        self._pipes.difference_update(pipes)
        self._writers -= {writer, up_writer}

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replies: bool) -> None:
        try:
            while data := await reader.read(65536):
                await self._open.wait()
                if replies and self.replies_left is not None:
                    self.deaf = self.deaf or not self.replies_left
                    self.replies_left -= 1
                if not (replies and self.deaf):
                    writer.write(data)
                    await writer.drain()
        except OSError:
            writer.transport.abort()
        writer.close()

    async def stop(self) -> None:
        """End all pipes."""
        self._stopped = self.refuse = True
        self.cut()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, *self._serving, return_exceptions=True)


@asynccontextmanager
async def proxy_for(kind: type[Driver]) -> AsyncIterator[Proxy]:
    """A proxy that listens."""
    proxy = Proxy(kind)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = server.sockets[0].getsockname()[:2]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.stop()
        await server.wait_closed()


Opener = Callable[[str, type[Driver]], AbstractAsyncContextManager[Here]]


@asynccontextmanager
async def behind_proxy(kind: type[Driver], address: str, opened: Opener[Here]) -> AsyncIterator[tuple[Here, Proxy]]:
    """What `opened` gives for a driver that goes through a proxy; healed before it is closed."""
    async with proxy_for(kind) as proxy, opened(address, proxy.driver) as here:
        try:
            yield here, proxy
        finally:
            proxy.heal()
