"""A driver at the contract whose every answer a test decides; it checks that the library keeps its side."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import unistream
from unistream import capabilities as can
from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.types import (
    Event,
    GroupSpec,
    Lag,
    MaybeAwaitable,
    Member,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Receipt,
    Settlement,
    SettleOutcome,
    StartAt,
    Target,
    Token,
    TopicSpec,
    Verb,
)
from unistream.errors import TopicMissingError, UnistreamError

CAPABILITIES: dict[str, Any] = {
    "driver": "scripted",
    "product": "a scripted driver",
    "durability": can.Durability(),
    "ordering": can.OrderingByKey(),
    "start": can.Start(at=frozenset({"latest", "earliest", "time", "position"})),
    "seek": can.Seek(),
    "nack_delay": can.NackDelay(),
    "lease": can.Lease(),
    "fencing": can.Fencing(),
    "attempts": can.Attempts(),
    "ack_confirm": can.AckConfirm(),
    "dedupe": can.Dedupe(level=can.Level.NONE),
    "retention": can.RetentionLimits(),
    "max_backlog": can.MaxBacklog(),
    "max_message_bytes": can.MaxMessageBytes(limit=1000),
    "lag": can.LagReport(),
}


@dataclass
class Call:
    """One call of `publish` that waits for its answer."""

    batch: Sequence[RawMessage]
    timeout: float
    answered: asyncio.Future[list[PublishOutcome]]

    @property
    def values(self) -> list[bytes]:
        """The bodies."""
        return [message.value for message in self.batch]

    def answer(self, *outcomes: Any) -> None:
        """Give these outcomes; none: confirm all."""
        if not self.answered.done():
            default = [Receipt(message.id, message.value.decode()) for message in self.batch]
            self.answered.set_result(list(outcomes) or default)  # type: ignore[arg-type]

    def fail(self, error: BaseException) -> None:
        """Raise instead."""
        if not self.answered.done():
            self.answered.set_exception(error)


@dataclass
class Script:
    """What the driver does, and what it saw. Functions that are set decide; without them calls wait or succeed."""

    pipeline: int = 1
    batch_messages: int = 256
    batch_bytes: int = 1024 * 1024
    capabilities: dict[str, Any] = field(default_factory=dict)
    topic: TopicSpec = field(default_factory=lambda: TopicSpec("t"))
    missing: set[str] = field(default_factory=set)
    publish: Callable[[Sequence[RawMessage], float], Any] | None = None
    receive: Callable[[int, float], Any] | None = None
    settle: Callable[[Sequence[Settlement]], Any] | None = None
    extend: Callable[[Sequence[Token], float], Any] | None = None
    ping: Callable[[], None] | None = None
    on_open: Callable[[], Awaitable[None]] | None = None
    on_close: Callable[[], None] | None = None
    on_producer: Callable[[], Awaitable[None]] | None = None
    on_consumer: Callable[[], Awaitable[None]] | None = None
    calls: list[Call] = field(default_factory=list)
    receives: list[tuple[int, float]] = field(default_factory=list)
    settled: list[Settlement] = field(default_factory=list)
    extended: list[tuple[Token, float]] = field(default_factory=list)
    backlog: deque[RawDelivery] = field(default_factory=deque)
    open: list[object] = field(default_factory=list)
    closed: int = 0
    lost: Callable[[Collection[Token], str], None] | None = None
    emit: Callable[[Event], None] | None = None
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    serial: int = 0

    def lend(self, *values: bytes, attempt: int = 1, suspect: bool = False, key: bytes | None = None) -> None:
        """Have messages ready to be lent."""
        for value in values:
            self.serial += 1
            message = RawMessage(f"id-{value.decode()}", value, key, (), 0)
            self.backlog.append(RawDelivery(message, self.serial, str(self.serial), 1.0, attempt, suspect))
        self.stirred.set()

    @property
    def verbs(self) -> list[tuple[Token, Verb]]:
        """What was settled, how."""
        return [(settlement.token, settlement.verb) for settlement in self.settled]

    def driver(self) -> type[Driver]:
        """The class to give to `connect`."""
        return type("Scripted", (ScriptedDriver,), {"script": self})


async def spin(rounds: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(rounds):
        await asyncio.sleep(0)


@asynccontextmanager
async def connected(script: Script) -> AsyncIterator[unistream.Client]:
    """A client on the script; afterwards everything that it opened is closed."""
    async with unistream.connect("scripted://", driver=script.driver()) as client:
        yield client
    assert script.open == []
    assert script.closed == 1


class ScriptedDriver(Driver):
    """Opens what the script has."""

    schemes: ClassVar[tuple[str, ...]] = ("scripted",)
    script: ClassVar[Script]

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        self.script.emit = emit

    def _alive(self) -> None:
        assert not self.script.closed, "a call after close"

    async def open(self) -> None:
        """See `Driver`."""
        if self.script.on_open is not None:
            await self.script.on_open()
        self.capabilities = can.Capabilities(**{**CAPABILITIES, **self.script.capabilities})

    async def close(self) -> None:
        """See `Driver`."""
        assert self.script.open == [], "producers and consumers are closed before their driver"
        self.script.closed += 1
        if self.script.on_close is not None:
            self.script.on_close()

    async def ping(self) -> None:
        """See `Driver`."""
        self._alive()
        if self.script.ping is not None:
            self.script.ping()

    @property
    def native(self) -> Any:
        """See `Driver`."""
        return self.script

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """See `Driver`."""
        self._alive()
        self.script.missing.discard(spec.name)
        return spec

    async def delete_topic(self, name: str) -> None:
        """See `Driver`."""

    async def topic(self, name: str) -> TopicSpec:
        """See `Driver`."""
        self._alive()
        if name in self.script.missing:
            raise TopicMissingError(f"no topic {name}", topic=name)
        spec = self.script.topic
        return TopicSpec(name, spec.partitions, spec.ordering)

    async def topics(self) -> Sequence[TopicSpec]:
        """See `Driver`."""
        return [self.script.topic]

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """See `Driver`."""
        self._alive()
        return spec

    async def delete_group(self, topic: str, name: str) -> None:
        """See `Driver`."""

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """See `Driver`."""
        return []

    async def lag(self, topic: str, group: str) -> Lag:
        """See `Driver`."""
        return Lag(len(self.script.backlog), True)

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """See `Driver`."""
        return []

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """See `Driver`."""

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """See `Driver`."""
        self._alive()
        if self.script.on_producer is not None:
            await self.script.on_producer()
        return ScriptedProducer(self.script)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """See `Driver`."""
        self._alive()
        if self.script.on_consumer is not None:
            await self.script.on_consumer()
        self.script.lost = lost
        return ScriptedConsumer(self.script)


class ScriptedProducer(ProducerDriver):
    """Asks the script, or waits for the test to answer."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.pipeline = script.pipeline
        self.batch_messages = script.batch_messages
        self.batch_bytes = script.batch_bytes
        self.under_way = 0
        script.open.append(self)

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """See `ProducerDriver`."""
        assert self in self.script.open, "publish after close"
        assert timeout > 0
        assert 1 <= len(batch) <= self.batch_messages
        assert len(batch) == 1 or sum(len(message.value) for message in batch) <= self.batch_bytes
        if self.script.publish is not None:
            return self.script.publish(batch, timeout)  # type: ignore[no-any-return]
        assert self.under_way < self.pipeline, "more calls than the pipeline takes"
        self.under_way += 1
        call = Call(list(batch), timeout, asyncio.get_running_loop().create_future())
        self.script.calls.append(call)
        return self._wait(call)

    async def _wait(self, call: Call) -> list[PublishOutcome]:
        try:
            return await call.answered
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        """See `ProducerDriver`."""
        assert not self.under_way, "close while a call is under way"
        if self in self.script.open:
            self.script.open.remove(self)


class ScriptedConsumer(ConsumerDriver):
    """Lends the script's backlog, at once where there is something."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.receiving = False
        script.open.append(self)

    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        """See `ConsumerDriver`."""
        assert self in self.script.open, "receive after close"
        assert limit >= 1
        assert not self.receiving, "one receive at a time"
        self.script.receives.append((limit, timeout))
        if self.script.receive is not None:
            return self.script.receive(limit, timeout)  # type: ignore[no-any-return]
        return self._take(limit) or self._wait(limit, timeout)

    def _take(self, limit: int) -> list[RawDelivery]:
        backlog = self.script.backlog
        taken: list[RawDelivery] = []
        while backlog and len(taken) < limit:
            if backlog[0].suspect and taken:
                break
            taken.append(backlog.popleft())
            if taken[-1].suspect:
                break
        return taken

    async def _wait(self, limit: int, timeout: float) -> list[RawDelivery]:
        self.receiving = True
        try:
            self.script.stirred.clear()
            async with asyncio.timeout(timeout):
                await self.script.stirred.wait()
        except TimeoutError:
            return []
        finally:
            self.receiving = False
        return self._take(limit)

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """See `ConsumerDriver`."""
        assert self in self.script.open, "settle after close"
        if self.script.settle is not None:
            return self.script.settle(batch)  # type: ignore[no-any-return]
        self.script.settled += batch
        return [None] * len(batch)

    def extend(self, tokens: Sequence[Token], seconds: float) -> MaybeAwaitable[list[SettleOutcome]]:
        """See `ConsumerDriver`."""
        assert self in self.script.open, "extend after close"
        assert seconds > 0
        if self.script.extend is not None:
            return self.script.extend(tokens, seconds)  # type: ignore[no-any-return]
        self.script.extended += [(token, seconds) for token in tokens]
        return [None] * len(tokens)

    async def close(self) -> None:
        """See `ConsumerDriver`."""
        if self in self.script.open:
            self.script.open.remove(self)


async def raising(error: BaseException) -> Any:
    """An awaitable answer that is an error."""
    raise error


def refused(call: Callable[[], object]) -> UnistreamError:
    """The error that a call raises."""
    try:
        call()
    except UnistreamError as error:
        return error
    raise AssertionError("nothing was raised")
