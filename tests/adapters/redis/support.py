"""A real Redis for the adapter's tests, a checked driver on it, and a proxy that can fail in between."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

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
    TopicSpec,
    Verb,
)
from unistream_redis import RedisDriver

VARIABLE = "UNISTREAM_REDIS_URL"
LIMIT = 20.0
"""Seconds that a test waits for something that must come; only a failure takes that long."""
QUIET = 1.3
"""Seconds for which something must not come: longer than a member takes to look for due deliveries."""


def url() -> str:
    """The Redis under test; `python -m tests.brokers run --only redis -- pytest …` sets it."""
    try:
        return os.environ[VARIABLE]
    except KeyError:
        pytest.fail(f"{VARIABLE} is not set; run this with python -m tests.brokers run --only redis -- pytest …")


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an asynchronous test to its end."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


class Opened:
    """A driver on the Redis under test, with what it emitted."""

    def __init__(self, driver: Driver, events: list[Event]) -> None:
        self.driver = driver
        self.events = events
        self.name = f"t-{secrets.token_hex(6)}"
        self.redis = driver.native

    @property
    def lost(self) -> int:
        """Messages reported lost so far."""
        return sum(event.count or 0 for event in self.events if isinstance(event, DataLoss))

    async def topic(self, **settings: Any) -> TopicSpec:
        """The test's topic."""
        return await self.driver.create_topic(TopicSpec(self.name, **settings))

    async def group(self, name: str = "g", **settings: Any) -> GroupSpec:
        """A group of the test's topic."""
        return await self.driver.create_group(GroupSpec(self.name, name, **settings))

    async def join(self, group: GroupSpec, max_in_flight: int = 100) -> ConsumerDriver:
        """A member of a group."""
        topic = await self.driver.topic(self.name)
        return await self.driver.consumer(group, topic, max_in_flight=max_in_flight, lost=lambda tokens, why: None)

    async def publish(self, count: int, *, first: int = 0, key: bytes | None = None, partition: int = 0) -> None:
        """Publish messages whose ids are their numbers."""
        producer = await self.driver.producer(await self.driver.topic(self.name))
        batch = [message(number, key=key, partition=partition) for number in range(first, first + count)]
        for start in range(0, count, producer.batch_messages):
            outcomes = await producer.publish(batch[start : start + producer.batch_messages], LIMIT)
            failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert not failed, failed
        await producer.close()


def message(number: int, *, key: bytes | None = None, partition: int = 0) -> RawMessage:
    """A message whose id and body are a number."""
    return RawMessage(str(number), str(number).encode(), key, (), partition)


@asynccontextmanager
async def opened(address: str | None = None, kind: type[RedisDriver] = RedisDriver) -> AsyncIterator[Opened]:
    """A checked driver; the test's topic is deleted at the end."""
    driver_class = checked(kind)
    events: list[Event] = []
    driver = driver_class(parse_target(address or url(), driver_class), events.append)
    await driver.open()
    here = Opened(driver, events)
    try:
        yield here
    finally:
        try:
            await driver.delete_topic(here.name)
        finally:
            await driver.close()


async def take(consumer: ConsumerDriver, count: int, limit: int = 100) -> list[RawDelivery]:
    """Receive until `count` deliveries came."""
    deliveries: list[RawDelivery] = []
    async with asyncio.timeout(LIMIT):
        while len(deliveries) < count:
            deliveries += await consumer.receive(min(limit, count - len(deliveries)), 1.0)
    return deliveries


async def end(consumer: ConsumerDriver, deliveries: list[RawDelivery], verb: Verb = Verb.ACK, delay: float = 0) -> None:
    """Settle deliveries alike; none may be refused."""
    outcomes = await consumer.settle([Settlement(delivery.token, verb, delay) for delivery in deliveries])
    assert outcomes == [None] * len(deliveries)


async def quiet(consumer: ConsumerDriver) -> None:
    """Nothing comes."""
    assert await consumer.receive(100, QUIET) == []


def ids(deliveries: list[RawDelivery]) -> list[str]:
    """The ids of the messages delivered."""
    return [delivery.message.id for delivery in deliveries]


class Proxy:
    """Stands between a driver and Redis: cuts connections, freezes them, or swallows the server's replies."""

    def __init__(self) -> None:
        self._pipes: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.deaf = False
        self.replies_left: int | None = None
        self.address = ("", 0)
        self.upstream = ("", 0)
        self.refuse = False
        self.stopped = False

    def driver(self) -> type[RedisDriver]:
        """The driver's class, with every connection going through here."""
        proxy = self

        class Proxied(RedisDriver):
            def dial(self, host: str, port: int) -> tuple[str, int]:
                proxy.upstream = (host, port)
                return proxy.address

        return Proxied

    def cut(self) -> None:
        """Close every connection at once."""
        for writer in self._writers:
            writer.transport.abort()

    def freeze(self) -> None:
        """Let no byte through, in either direction; connections stay open."""
        self._open.clear()

    def thaw(self) -> None:
        """Let bytes through again."""
        self._open.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pipe one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        if self.refuse:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        if self.stopped:
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
        self.stopped = True
        self.cut()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, *self._serving, return_exceptions=True)


@asynccontextmanager
async def proxied(options: str = "?dead_peer_after=1&connect_timeout=1") -> AsyncIterator[tuple[Opened, Proxy]]:
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
                proxy.replies_left = None
                proxy.deaf = proxy.refuse = False
    finally:
        server.close()
        await proxy.stop()
        await server.wait_closed()
