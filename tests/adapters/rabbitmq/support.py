"""A real RabbitMQ for the adapter's tests, a checked driver on it, and a proxy that can fail in between."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pika
import pytest
from pika import BasicProperties

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
from unistream_rabbitmq import RabbitDriver

VARIABLE = "UNISTREAM_RABBITMQ_URL"
LIMIT = 20.0
"""Seconds that a test waits for something that must come; only a failure takes that long."""
LATE = 3.0
"""Seconds that a machine with other work to do may add to a limit. What must not happen early is never given any."""
QUIET = 0.8
"""Seconds for which something must not come: the broker pushes at once."""


def url() -> str:
    """The RabbitMQ under test; `python -m tests.brokers run --only rabbitmq -- pytest …` sets it."""
    try:
        return os.environ[VARIABLE]
    except KeyError:
        pytest.fail(f"{VARIABLE} is not set; run this with python -m tests.brokers run --only rabbitmq -- pytest …")


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an asynchronous test to its end."""

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(bounded())


class Opened:
    """A driver on the RabbitMQ under test, with what it emitted, and the client library beside it."""

    def __init__(self, driver: Driver, events: list[Event]) -> None:
        self.driver = driver
        self.events = events
        self.name = f"t-{secrets.token_hex(6)}"
        self.ended: list[Token] = []

    @property
    def gaps(self) -> list[DataLoss]:
        """The losses reported so far."""
        return [event for event in self.events if isinstance(event, DataLoss)]

    async def topic(self, **settings: Any) -> TopicSpec:
        """The test's topic."""
        return await self.driver.create_topic(TopicSpec(self.name, **settings))

    async def group(self, name: str = "g", **settings: Any) -> GroupSpec:
        """A group of the test's topic."""
        return await self.driver.create_group(GroupSpec(self.name, name, **settings))

    async def join(self, group: GroupSpec, max_in_flight: int = 100) -> ConsumerDriver:
        """A member of a group."""
        topic = await self.driver.topic(self.name)

        def lost(tokens: Any, why: str) -> None:
            self.ended.extend(tokens)

        return await self.driver.consumer(group, topic, max_in_flight=max_in_flight, lost=lost)

    async def publish(self, count: int, *, first: int = 0, key: bytes | None = None, partition: int = 0) -> None:
        """Publish messages whose ids are their numbers."""
        producer = await self.driver.producer(await self.driver.topic(self.name))
        batch = [message(number, key=key, partition=partition) for number in range(first, first + count)]
        for start in range(0, count, producer.batch_messages):
            outcomes = await producer.publish(batch[start : start + producer.batch_messages], LIMIT)
            failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert not failed, failed
        await producer.close()

    async def foreign(self, *bodies: bytes, properties: BasicProperties | None = None, key: str = "") -> None:
        """Publish by the client library, into the topic's exchange."""
        await self.bare(
            lambda channel: [channel.basic_publish(f"us.{self.name}", key, body, properties) for body in bodies]
        )

    async def bare(self, use: Callable[[Any], Any]) -> Any:
        """Do something with a channel of the client library's own, in a thread."""

        def act() -> Any:
            with pika.BlockingConnection(pika.URLParameters(url())) as connection:
                channel = connection.channel()
                channel.confirm_delivery()
                return use(channel)

        return await asyncio.to_thread(act)


def message(number: int, *, key: bytes | None = None, partition: int = 0) -> RawMessage:
    """A message whose id and body are a number."""
    return RawMessage(str(number), str(number).encode(), key, (), partition)


@asynccontextmanager
async def opened(address: str | None = None, kind: type[RabbitDriver] = RabbitDriver) -> AsyncIterator[Opened]:
    """A checked driver; the test's topic is deleted at the end."""
    driver_class = checked(kind)
    events: list[Event] = []
    address = address or url()
    # Tests create many groups; only one that kills the server must wait until a new group survives it.
    if "creation_settles" not in address:
        address += ("&" if "?" in address else "?") + "creation_settles=0"
    driver = driver_class(parse_target(address, driver_class), events.append)
    await driver.open()
    here = Opened(driver, events)
    try:
        yield here
    finally:
        await driver.delete_topic(here.name)
        await driver.close()


async def receive(consumer: ConsumerDriver, limit: int, timeout: float) -> list[RawDelivery]:
    """Receive, whether the answer comes at once or later."""
    answer = consumer.receive(limit, timeout)
    return answer if isinstance(answer, list) else await answer


async def settle(consumer: ConsumerDriver, deliveries: list[RawDelivery], verb: Verb = Verb.ACK) -> list[SettleOutcome]:
    """Settle deliveries alike, whether the answer comes at once or later."""
    answer = consumer.settle([Settlement(delivery.token, verb) for delivery in deliveries])
    return answer if isinstance(answer, list) else await answer


async def take(consumer: ConsumerDriver, count: int, limit: int = 100) -> list[RawDelivery]:
    """Receive until `count` deliveries came."""
    deliveries: list[RawDelivery] = []
    async with asyncio.timeout(LIMIT):
        while len(deliveries) < count:
            deliveries += await receive(consumer, min(limit, count - len(deliveries)), 1.0)
    return deliveries


async def end(consumer: ConsumerDriver, deliveries: list[RawDelivery], verb: Verb = Verb.ACK, delay: float = 0) -> None:
    """Settle deliveries alike; none may be refused."""
    answer = consumer.settle([Settlement(delivery.token, verb, delay) for delivery in deliveries])
    outcomes = answer if isinstance(answer, list) else await answer
    assert outcomes == [None] * len(deliveries)


async def quiet(consumer: ConsumerDriver) -> None:
    """Nothing comes."""
    assert await receive(consumer, 100, QUIET) == []


def ids(deliveries: list[RawDelivery]) -> list[str]:
    """The ids of the messages delivered."""
    return [delivery.message.id for delivery in deliveries]


class Proxy:
    """Stands between a driver and RabbitMQ: cuts connections, freezes them, or swallows the server's replies."""

    def __init__(self) -> None:
        self.upstream = ("", 0)
        self.address = ("", 0)
        self.deaf = False
        self.refuse = False
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pipes: set[asyncio.Task[None]] = set()

    def driver(self) -> type[RabbitDriver]:
        """The driver's class, with every connection going through here."""
        proxy = self

        class Proxied(RabbitDriver):
            def dial(self, host: str, port: int) -> tuple[str, int]:
                proxy.upstream = (host, port)
                return proxy.address

        return Proxied

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

    def thaw(self) -> None:
        """Let bytes through again."""
        self._open.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pipe one connection."""
        if self.refuse:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection(*self.upstream)
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
                if not (replies and self.deaf):
                    writer.write(data)
                    await writer.drain()
        except OSError:
            writer.transport.abort()
        writer.close()

    async def stop(self) -> None:
        """End all pipes."""
        self.refuse = True
        self.cut()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)


@asynccontextmanager
async def proxied(
    options: str = "?heartbeat=2&connect_timeout=2",
) -> AsyncIterator[tuple[Opened, Proxy]]:
    """A checked driver behind a proxy."""
    proxy = Proxy()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = server.sockets[0].getsockname()[:2]
    try:
        async with opened(url() + options, proxy.driver()) as here:
            try:
                yield here, proxy
            finally:
                proxy.thaw()
                proxy.deaf = proxy.refuse = False
    finally:
        server.close()
        await proxy.stop()
        await server.wait_closed()
