"""A real Redis for the adapter's tests."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from tests.adapters import support
from tests.adapters.support import LIMIT, Proxy, behind_proxy, end, ids, message, run, take
from tests.urls import url_of
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import Event
from unistream_redis import RedisDriver

__all__ = ["LIMIT", "QUIET", "Opened", "end", "ids", "message", "opened", "proxied", "quiet", "run", "take", "url"]

QUIET = 1.3
"""Seconds for which something must not come: longer than a member takes to look for due deliveries."""


def url() -> str:
    """The Redis under test; `python -m tests.brokers run --only redis -- pytest …` sets it."""
    return url_of("UNISTREAM_REDIS_URL")


class Opened(support.Opened):
    """A driver on the Redis under test, and the client library beside it."""

    def __init__(self, driver: Driver, events: list[Event]) -> None:
        super().__init__(driver, events)
        self.redis: Any = driver.native


def opened(address: str | None = None, kind: type[Driver] = RedisDriver) -> AbstractAsyncContextManager[Opened]:
    """A checked driver; the test's topic is deleted at the end."""
    return Opened.on(kind, address or url())


def proxied(
    options: str = "?dead_peer_after=1&connect_timeout=1",
) -> AbstractAsyncContextManager[tuple[Opened, Proxy]]:
    """A checked driver behind a proxy."""
    return behind_proxy(RedisDriver, url() + options, opened)


async def quiet(consumer: ConsumerDriver) -> None:
    """Nothing comes."""
    assert await consumer.receive(100, QUIET) == []
