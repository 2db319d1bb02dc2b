"""A real NATS for the adapter's tests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import nats
from nats.aio.client import Client

from tests.adapters import support
from tests.adapters.support import LIMIT, Proxy, behind_proxy, end, ids, message, run, take
from tests.urls import url_of
from unistream.driver.contract import Driver
from unistream.driver.types import Event
from unistream_nats import NatsDriver
from unistream_nats.consumer import NatsConsumer

__all__ = ["LIMIT", "QUIET", "Opened", "end", "ids", "message", "opened", "proxied", "quiet", "run", "take", "url"]

QUIET = 0.8
"""Seconds for which something must not come: longer than one pull."""


def url() -> str:
    """The NATS under test; `python -m tests.brokers run --only nats -- pytest …` sets it."""
    return url_of("UNISTREAM_NATS_URL")


class Opened(support.Opened):
    """A driver on the NATS under test, and the client library beside it."""

    client: Client

    def __init__(self, driver: Driver, events: list[Event]) -> None:
        super().__init__(driver, events)
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
    """A checked driver, and a client beside it; the test's topic is deleted at the end."""
    async with Opened.on(kind, address or url()) as here:
        here.client = await nats.connect(url())
        try:
            yield here
        finally:
            await here.client.close()


def proxied(
    options: str = "?dead_peer_after=1&connect_timeout=1",
) -> AbstractAsyncContextManager[tuple[Opened, Proxy]]:
    """A checked driver behind a proxy."""
    return behind_proxy(NatsDriver, url() + options, opened)


async def quiet(consumer: NatsConsumer) -> None:
    """Nothing comes."""
    assert await consumer.receive(100, QUIET) == []
