"""A real Redis for the adapter's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.adapters import support
from tests.adapters.support import LIMIT, Proxy, end, ids, message, open_driver, proxy_for, run, take, url_of
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import Event
from unistream_redis import RedisDriver

__all__ = ["LIMIT", "QUIET", "Opened", "end", "ids", "message", "opened", "proxied", "quiet", "run", "take", "url"]

QUIET = 1.3
"""Seconds for which something must not come: longer than a member takes to look for due deliveries."""


def url() -> str:
    """The Redis under test; `python -m tests.brokers run --only redis -- pytest …` sets it."""
    return url_of("UNISTREAM_REDIS_URL", "redis")


class Opened(support.Opened):
    """A driver on the Redis under test, and the client library beside it."""

    def __init__(self, driver: Driver, events: list[Event]) -> None:
        super().__init__(driver, events)
        self.redis: Any = driver.native


@asynccontextmanager
async def opened(address: str | None = None, kind: type[Driver] = RedisDriver) -> AsyncIterator[Opened]:
    """A checked driver; the test's topic is deleted at the end."""
    events: list[Event] = []
    here = Opened(await open_driver(kind, address or url(), events), events)
    try:
        yield here
    finally:
        try:
            await here.driver.delete_topic(here.name)
        finally:
            await here.driver.close()


@asynccontextmanager
async def proxied(options: str = "?dead_peer_after=1&connect_timeout=1") -> AsyncIterator[tuple[Opened, Proxy]]:
    """A checked driver behind a proxy."""
    async with proxy_for(RedisDriver) as proxy, opened(url() + options, proxy.driver) as here:
        try:
            yield here, proxy
        finally:
            proxy.heal()


async def quiet(consumer: ConsumerDriver) -> None:
    """Nothing comes."""
    assert await consumer.receive(100, QUIET) == []
