"""A real RabbitMQ for the adapter's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pika
from pika import BasicProperties

from tests.adapters import support
from tests.adapters.support import (
    LATE,
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
from unistream_rabbitmq import RabbitDriver

__all__ = [
    "LATE",
    "LIMIT",
    "QUIET",
    "Opened",
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
"""Seconds for which something must not come: the broker pushes at once."""


def url() -> str:
    """The RabbitMQ under test; `python -m tests.brokers run --only rabbitmq -- pytest …` sets it."""
    return url_of("UNISTREAM_RABBITMQ_URL")


class Opened(support.Opened):
    """A driver on the RabbitMQ under test, and the client library beside it."""

    prefix = "t-"

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


def opened(address: str | None = None, kind: type[Driver] = RabbitDriver) -> AbstractAsyncContextManager[Opened]:
    """A checked driver; the test's topic is deleted at the end."""
    address = address or url()
    # Tests create many groups; only one that kills the server must wait until a new group survives it.
    if "creation_settles" not in address:
        address += ("&" if "?" in address else "?") + "creation_settles=0"
    return Opened.on(kind, address)


def proxied(options: str = "?heartbeat=2&connect_timeout=2") -> AbstractAsyncContextManager[tuple[Opened, Proxy]]:
    """A checked driver behind a proxy."""
    return behind_proxy(RabbitDriver, url() + options, opened)


async def quiet(consumer: ConsumerDriver) -> None:
    """Nothing comes."""
    assert await receive(consumer, 100, QUIET) == []
