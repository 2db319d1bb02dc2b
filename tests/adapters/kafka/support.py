"""A real Kafka for the adapter's tests."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from tests.adapters import support
from tests.adapters.support import (
    LIMIT,
    Proxy,
    behind_proxy,
    end,
    ids,
    message,
    receive,
    run,
    settle,
    take,
)
from tests.urls import url_of
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import Event, GroupSpec, RawDelivery
from unistream_kafka import KafkaDriver

__all__ = [
    "LIMIT",
    "QUIET",
    "Opened",
    "Proxy",
    "end",
    "ids",
    "message",
    "opened",
    "proxied",
    "quiet",
    "receive",
    "run",
    "settle",
    "take",
    "url",
]

QUIET = 0.8
"""Seconds for which something must not come: longer than one fetch waits at the broker."""


def url() -> str:
    """The Kafka under test; `python -m tests.brokers run --only kafka -- pytest …` sets it."""
    return url_of("UNISTREAM_KAFKA_URL")


class Opened(support.Opened):
    """A driver on the Kafka under test, and the client library beside it."""

    prefix = "t-"

    def __init__(self, driver: Driver, events: list[Event]) -> None:
        super().__init__(driver, events)
        self.address = "{}:{}".format(*driver.target.hosts[0])

    async def stored(self, partitions: int = 1) -> list[Any]:
        """What lies in the test's topic, seen from outside, as ConsumerRecords."""
        return await asyncio.to_thread(self._stored, partitions)

    async def lent_of_each(self) -> tuple[GroupSpec, ConsumerDriver, list[RawDelivery]]:
        """A group over two partitions, its only member, and the message of each partition that it holds."""
        await self.topic(partitions=2)
        group = await self.group()
        one = await self.join(group)
        for partition in range(2):
            await self.publish(1, first=partition, partition=partition)
        return group, one, await take(one, 2)

    def _stored(self, partitions: int) -> list[Any]:
        reader = KafkaConsumer(bootstrap_servers=self.address, enable_auto_commit=False, auto_offset_reset="earliest")
        places = [TopicPartition(self.name, at) for at in range(partitions)]
        reader.assign(places)
        ends = reader.end_offsets(places)
        found: list[Any] = []
        while any(reader.position(at) < end for at, end in ends.items()):
            found += [one for batch in reader.poll(timeout_ms=1000).values() for one in batch]
        reader.close()
        return found

    async def foreign(self, *bodies: bytes, key: bytes | None = None, headers: Any = None) -> None:
        """Publish by the client library."""

        def send() -> None:
            producer = KafkaProducer(bootstrap_servers=self.address, acks="all")
            for body in bodies:
                producer.send(self.name, body, key=key, headers=headers).get(LIMIT)
            producer.close()

        await asyncio.to_thread(send)


def opened(address: str | None = None, kind: type[Driver] = KafkaDriver) -> AbstractAsyncContextManager[Opened]:
    """A checked driver; the test's topic is deleted at the end."""
    return Opened.on(kind, address or url())


def proxied(
    options: str = "?dead_peer_after=2&connect_timeout=2&session_timeout=3",
) -> AbstractAsyncContextManager[tuple[Opened, Proxy]]:
    """A checked driver behind a proxy."""
    return behind_proxy(KafkaDriver, url() + options, opened)


async def quiet(consumer: ConsumerDriver) -> None:
    """Nothing comes."""
    assert await receive(consumer, 100, QUIET) == []
