"""Saboteurs of the moment in which a connection breaks, or a process dies: harmless while all goes well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import count

from unistream.conformance.saboteurs.table import saboteur
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, ProducerLayer, resolve, start
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import (
    Disconnected,
    Event,
    GroupSpec,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Receipt,
    Settlement,
    SettleOutcome,
    Target,
)
from unistream.errors import BrokerUnavailableError, LeaseLostError, NotPublishedError, PublishUnknownError

HASTE = 0.3
"""Seconds between a yes that is said too early and the deed."""
SLOTH = 3.0
"""The same where a broker must be killed in between, by a command that has to start first."""
SHORT = 0.15
"""A time limit that a good wire always keeps."""

WIRE = ("socket",)


# Producers


@saboteur(
    "ok-before-confirm",
    "PUB-1",
    "DEL-3",
    by=("net.cut-mid-publish", "dlq.atomic", "dur.kill9", "sim.net-faults", "sim.broker-faults"),
    needs=WIRE,
)
class OkBeforeConfirm(ProducerLayer):
    """Says that a message is stored before it is sent."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Confirm, then send."""
        kept = list(batch)

        async def send() -> None:
            await asyncio.sleep(HASTE)
            try:
                await resolve(self.inner.publish(kept, timeout))
            except BrokerUnavailableError:
                kept.clear()  # lost, and nobody is told

        start(send())
        return [Receipt(message.id) for message in kept]


@saboteur("lie-unknown", "PUB-2", by=("net.reply-lost", "pub.failed-is-absent"), needs=WIRE)
class LieUnknown(ProducerLayer):
    """Calls a message whose answer was lost surely not stored."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Turn doubt into denial."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        return [NotPublishedError(str(each)) if isinstance(each, PublishUnknownError) else each for each in outcomes]


_copies = count(1)


@saboteur("blind-retry", "PUB-3", by=("net.reply-lost-retry",), needs=(*WIRE, "dedupe"))
class BlindRetry(ProducerLayer):
    """Gives every try of a message another name to the broker's deduplication."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Rename."""
        named = [each._replace(dedupe=f"{each.id}-{next(_copies)}") for each in batch]
        return await resolve(self.inner.publish(named, timeout))


class _OnceBitten(ProducerLayer):
    """Behaves until its connection has failed once."""

    bitten = False

    async def send(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Publish, and notice a failed connection."""
        try:
            outcomes = await resolve(self.inner.publish(batch, timeout))
        except BrokerUnavailableError:
            self.bitten = True
            raise
        self.bitten = self.bitten or any(isinstance(each, PublishUnknownError) for each in outcomes)
        return outcomes


@saboteur("no-reconnect-producer", "END-3", by=("net.refused-publish", "dur.producer-rides-through"), needs=WIRE)
class NoReconnectProducer(_OnceBitten):
    """Never publishes again after its connection was lost."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Give up."""
        if self.bitten:
            raise BrokerUnavailableError("the connection was lost")
        return await self.send(batch, timeout)


@saboteur("reorder-after-cut", "PUB-4", "ORD-5", "ORD-2", by=("net.order-pipelined",), needs=WIRE)
class ReorderAfterCut(_OnceBitten):
    """Stores batches back to front once its connection was lost."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Reverse the batch, and its outcomes."""
        return (await self.send(batch[::-1], timeout))[::-1] if self.bitten else await self.send(batch, timeout)


@saboteur("short-timeouts", "END-3", by=("net.latency", "net.one-byte-segments", "net.thin-pipe"), needs=WIRE)
class ShortTimeouts(ProducerLayer):
    """Gives the broker no more than a moment, whatever the wire."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Give up early."""
        try:
            async with asyncio.timeout(SHORT):
                return await resolve(self.inner.publish(batch, timeout))
        except TimeoutError:
            return [PublishUnknownError("no answer in time") for _ in batch]


# Connecting


@saboteur("patient-connect", "END-2", by=("net.connect-blackhole",), needs=WIRE)
class PatientConnect(DriverLayer):
    """Waits five times as long as `connect_timeout` for a silent broker."""

    async def open(self) -> None:
        """Try five times."""
        for turn in range(5):
            try:
                return await super().open()
            except BrokerUnavailableError:
                if turn == 4:
                    raise
        return None


@saboteur("hides-cause", "END-5", by=("net.start-before-broker",), needs=WIRE)
class HidesCause(DriverLayer):
    """Says that it could not connect, and keeps the reason to itself."""

    async def open(self) -> None:
        """Forget the cause."""
        try:
            await super().open()
        except BrokerUnavailableError:
            failed = True
        else:
            failed = False
        if failed:
            raise BrokerUnavailableError("could not connect")


# Consumers


class Noticing(DriverLayer):
    """Counts the connections that it hears were lost."""

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        self.lost = 0

        def heard(event: Event) -> None:
            self.lost += isinstance(event, Disconnected)
            emit(event)

        super().__init__(target, heard)


class Bitten(ConsumerLayer):
    """Behaves until its connection has failed."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._forgiven = 0

    @property
    def bitten(self) -> bool:
        """Whether a connection was lost since `forgive`."""
        assert isinstance(self.driver, Noticing)
        return self.driver.lost > self._forgiven

    def forgive(self) -> None:
        """Behave again until the next one."""
        assert isinstance(self.driver, Noticing)
        self._forgiven = self.driver.lost


@saboteur(
    "no-reconnect-consumer",
    "END-3",
    "GRP-4",
    by=(
        *("net.half-open", "net.flap", "net.ack-path-lost", "ovl.slow-consumer-cutoff"),
        *("dur.consumer-rides-through", "dur.pause"),
    ),
    needs=WIRE,
    driver=Noticing,
)
class NoReconnectConsumer(Bitten):
    """Stays a member without work once its connection was lost."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Wait for nothing."""
        if self.bitten:
            await asyncio.sleep(timeout)
            return []
        return await resolve(self.inner.receive(limit, timeout))


@saboteur("busy-reconnect", "END-3", by=("net.reconnect-backoff",), needs=WIRE)
class BusyReconnect(ConsumerLayer):
    """Knocks again at once, as often as it can."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Try without a pause."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout
        while True:
            try:
                return await resolve(self.inner.receive(limit, timeout))
            except BrokerUnavailableError:
                if loop.time() >= ends:
                    raise
                await asyncio.sleep(0.01)


@saboteur("truncate-on-cut", "GRP-1", by=("net.cut-mid-delivery",), needs=WIRE, driver=Noticing)
class TruncateOnCut(Bitten):
    """Hands on half of the first large body after its connection was lost."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Cut a body in half."""
        batch = await resolve(self.inner.receive(limit, timeout))
        if self.bitten and batch and len(batch[0].message.value) > 10_000:
            self.forgive()
            message = batch[0].message
            batch[0] = batch[0]._replace(message=message._replace(value=message.value[: len(message.value) // 2]))
        return batch


@saboteur("confirm-on-cut", "DEL-1", "GRP-1", by=("net.cut-mid-ack",), needs=WIRE)
class ConfirmOnCut(ConsumerLayer):
    """Takes a connection that breaks during an ack for a yes."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Say yes."""
        try:
            return await resolve(self.inner.settle(batch))
        except BrokerUnavailableError:
            return [None for _ in batch]


@saboteur(
    "confirm-early", "DEL-1", "DEL-7", by=("ack.during-outage", "ack.confirmed-survives-kill", "dur.acks-survive")
)
class ConfirmEarly(ConsumerLayer):
    """Says that the broker holds an ack before it is sent."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Say yes, then send."""
        kept = list(batch)

        async def send() -> None:
            await asyncio.sleep(SLOTH)
            try:
                await resolve(self.inner.settle(kept))
            except BrokerUnavailableError:
                kept.clear()  # lost, and nobody is told

        start(send())
        return [None for _ in kept]


@saboteur("forget-loans", "DEL-7", by=("ack.after-reconnect",), needs=WIRE, driver=Noticing)
class ForgetLoans(Bitten):
    """Forgets what it holds when its connection is lost, although the broker does not."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._known: set[object] = set()

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Remember what is lent, until a connection fails."""
        batch = await resolve(self.inner.receive(limit, timeout))
        self._forget()
        self._known |= {each.token for each in batch}
        return batch

    def _forget(self) -> None:
        if self.bitten:
            self._known.clear()
            self.forgive()

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Refuse what was forgotten."""
        self._forget()
        known = [each for each in batch if each.token in self._known]
        answers = iter(await resolve(self.inner.settle(known)) if known else [])
        return [
            next(answers) if each.token in self._known else LeaseLostError("the connection was lost") for each in batch
        ]


@saboteur("silent-gap", "GRP-5", by=("net.ephemeral-gap",), needs=WIRE, driver=Noticing)
class SilentGap(Bitten):
    """Skips what an ephemeral group missed while its connection was down, and tells nobody."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Throw away the first batches after a lost connection, for a moment."""
        if not self.bitten or not self.group.ephemeral:
            return await resolve(self.inner.receive(limit, timeout))
        loop = asyncio.get_running_loop()
        ends = loop.time() + HASTE
        while loop.time() < ends:
            await resolve(self.inner.receive(limit, HASTE / 3))
        self.forgive()
        return []


# The harness itself


class RoundTheWire(DriverLayer):
    """Goes straight to the broker whatever `dial` says: every case with a wire must notice that it shows nothing."""

    async def open(self) -> None:
        """Dial as if there were no proxy."""
        straight: object = _straight
        self.inner.dial = straight  # type: ignore[assignment, method-assign]
        await super().open()


class NullConnect(DriverLayer):
    """Never connects: with such a driver nothing may be judged."""

    async def open(self) -> None:
        """Fail."""
        raise BrokerUnavailableError("nobody is there")


def _straight(host: str, port: int) -> tuple[str, int]:
    return host, port
