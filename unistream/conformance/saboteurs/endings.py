"""Saboteurs of clocks, beginnings and ends: the time that jumps, the data that is gone, the client that closes."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, ClassVar
from unittest.mock import patch

import unistream
from unistream import _client, config
from unistream._loans import Loans
from unistream.conformance.saboteurs.table import mutation, saboteur
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, ProducerLayer, resolve
from unistream.driver.types import (
    DataLoss,
    Event,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Settlement,
    SettleOutcome,
    Target,
    Token,
    Verb,
)
from unistream.errors import AccessError, BrokerUnavailableError, ConfigError, UnistreamError


@mutation("wall-clock-leases", "DEL-6", "DEL-7", by=("clk.client-jump",))
@contextmanager
def wall_clock_leases() -> Iterator[None]:
    """Measures leases by the wall clock."""
    apart = time.time() - time.monotonic()
    holds = Loans.holds

    def by_the_wall(self: Loans, delivery: unistream.Delivery) -> bool:
        jumped = time.time() - time.monotonic() - apart
        return holds(self, delivery) and self.loop.time() + jumped < delivery._lease.deadline

    with patch.object(Loans, "holds", by_the_wall):
        yield


@saboteur("gap-untold", "END-4", by=("ret.gap-reported",))
class GapUntold(DriverLayer):
    """Says nothing of what its retention removed."""

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        def discreet(event: Event) -> None:
            if not isinstance(event, DataLoss):
                emit(event)

        super().__init__(target, discreet)


_HANDLED: dict[str, asyncio.Event] = defaultdict(asyncio.Event)


class _CallsHandler(ProducerLayer):
    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Wait until what was published is handled."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        for message in batch:
            await _HANDLED[message.id].wait()
        return outcomes


class _TellsHandled(ConsumerLayer):
    tokens: ClassVar[dict[Token, str]] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Note which token is which message."""
        batch = await resolve(self.inner.receive(limit, timeout))
        self.tokens.update((each.token, each.message.id) for each in batch)
        return batch

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Tell the publisher."""
        for each in batch:
            if each.verb is Verb.ACK:
                _HANDLED[self.tokens.get(each.token, "")].set()
        return await resolve(self.inner.settle(batch))


@saboteur("publish-calls-handler", "PUB-1", by=("pub.returns-before-handler",))
class PublishCallsHandler(DriverLayer):
    """Returns from `publish` when a handler has settled the message, as a test double that calls handlers does."""

    producer_layer = _CallsHandler
    consumer_layer = _TellsHandled


@saboteur("idle-death", "END-3", "GRP-1", by=("con.idle-then-message",))
class IdleDeath(ConsumerLayer):
    """Gets nothing any more once nothing came for three seconds."""

    _last = inf

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Look at how long nothing has come."""
        loop = asyncio.get_running_loop()
        self._last = min(self._last, loop.time())
        if loop.time() - self._last >= 3.0:
            await asyncio.sleep(timeout)
            return []
        batch = await resolve(self.inner.receive(limit, timeout))
        if batch:
            self._last = loop.time()
        return batch


@mutation("close-waits-for-handler", "END-1", by=("shu.reentrant",))
@contextmanager
def close_waits_for_handler() -> Iterator[None]:
    """Closes a client when all handlers are through, also the one that closes it."""
    close = unistream.Client.close

    async def patient(self: unistream.Client) -> None:
        consumers = [part for part in self._parts if isinstance(part, unistream.Consumer)]
        if any(one._intake is not None and one._intake.loans.any_held() for one in consumers):
            await asyncio.sleep(100.0)
        await close(self)

    with patch.object(unistream.Client, "close", patient):
        yield


class _SlowToOpen(DriverLayer):
    """Takes a moment to connect."""

    async def open(self) -> None:
        """Wait, then open."""
        await asyncio.sleep(0.01)
        await super().open()


@mutation("close-hangs-while-opening", "END-1", by=("shu.close-while-opening",), layer=_SlowToOpen)
@contextmanager
def close_hangs_while_opening() -> Iterator[None]:
    """Waits for ever when it is closed while it connects."""
    close = unistream.Client.close

    async def stuck(self: unistream.Client) -> None:
        if self._state == "opening":
            await asyncio.sleep(1e6)
        await close(self)

    with patch.object(unistream.Client, "close", stuck):
        yield


@mutation("url-not-enough", "END-6", by=("cfg.swap",))
@contextmanager
def url_not_enough() -> Iterator[None]:
    """Looks for its URL nowhere but in the program."""
    load = config.load

    def blind(target: Any, profile: str | None) -> Any:
        if target is None:
            raise ConfigError("no URL was given")
        return load(target, profile)

    with patch.object(_client, "load", blind):
        yield


@saboteur("refusal-unsaid", "END-5", by=("err.auth",), needs=("password",))
class RefusalUnsaid(DriverLayer):
    """Takes a wrong password for a broker that is out of reach."""

    async def open(self) -> None:
        """Say that nobody is there."""
        try:
            await super().open()
        except AccessError as error:
            raise BrokerUnavailableError(f"{self.target}: not available") from error


@saboteur("password-told", "END-5", by=("err.redacted",), needs=("password",))
class PasswordTold(DriverLayer):
    """Shows the password in an error."""

    async def open(self) -> None:
        """Say with what it was tried."""
        try:
            await super().open()
        except UnistreamError as error:
            raise BrokerUnavailableError(f"{error} (as {self.target.username}:{self.target.password})") from error


@saboteur("address-unsaid", "END-5", by=("err.down",), needs=("socket",))
class AddressUnsaid(DriverLayer):
    """Does not say where nobody listens."""

    async def open(self) -> None:
        """Say as little as possible."""
        try:
            await super().open()
        except BrokerUnavailableError as error:
            raise BrokerUnavailableError("connection refused") from error.__cause__
