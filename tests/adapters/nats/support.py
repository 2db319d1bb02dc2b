"""A real NATS for the adapter's tests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats
from nats.aio.client import Client

from tests.adapters import support
from tests.adapters.support import LIMIT, Proxy, end, ids, message, open_driver, proxy_for, run, take, url_of
from unistream.driver.contract import Driver
from unistream.driver.types import Event
from unistream_nats import NatsDriver
from unistream_nats.consumer import NatsConsumer

__all__ = ["LIMIT", "QUIET", "Opened", "end", "ids", "message", "opened", "proxied", "quiet", "run", "take", "url"]

QUIET = 0.8
"""Seconds for which something must not come: longer than one pull."""


def url() -> str:
    """The NATS under test; `python -m tests.brokers run --only nats -- pytest …` sets it."""
    return url_of("UNISTREAM_NATS_URL", "nats")


class Opened(support.Opened):
    """A driver on the NATS under test, and the client library beside it."""

    def __init__(self, driver: Driver, events: list[Event], client: Client) -> None:
        super().__init__(driver, events)
        self.client = client
        self.stream = "us_" + self.name.replace(".", "~")

    def subject(self, partition: int = 0) -> str:
        """The subject of a partition of the test's topic."""
        return f"us.{self.name.replace('.', '~')}.{partition}"

    async def api(self, verb: str, **asked: Any) -> dict[str, Any]:
        """Ask JetStream by the client library."""
        reply = await self.client.request(f"$JS.API.{verb}", json.dumps(asked).encode() if asked else b"", timeout=5)
        told: dict[str, Any] = json.loads(reply.data)
        assert "error" not in told, told
        return told

    async def state(self) -> dict[str, Any]:
        """What the topic's stream holds."""
        told: dict[str, Any] = (await self.api(f"STREAM.INFO.{self.stream}"))["state"]
        return told

    async def bodies(self) -> list[bytes]:
        """What lies in the topic's stream, seen from outside."""
        state = await self.state()
        found = []
        for sequence in range(max(1, state["first_seq"]), state["last_seq"] + 1):
            found.append((await self.client.jetstream().get_msg(self.stream, sequence)).data or b"")
        return found


@asynccontextmanager
async def opened(address: str | None = None, kind: type[Driver] = NatsDriver) -> AsyncIterator[Opened]:
    """A checked driver; the test's topic is deleted at the end."""
    events: list[Event] = []
    driver = await open_driver(kind, address or url(), events)
    client = await nats.connect(url())
    here = Opened(driver, events, client)
    try:
        yield here
    finally:
        await driver.delete_topic(here.name)
        await driver.close()
        await client.close()


@asynccontextmanager
async def proxied(options: str = "?dead_peer_after=1&connect_timeout=1") -> AsyncIterator[tuple[Opened, Proxy]]:
    """A checked driver behind a proxy."""
    async with proxy_for(NatsDriver) as proxy, opened(url() + options, proxy.driver) as here:
        try:
            yield here, proxy
        finally:
            proxy.heal()


async def quiet(consumer: NatsConsumer) -> None:
    """Nothing comes."""
    assert await consumer.receive(100, QUIET) == []
