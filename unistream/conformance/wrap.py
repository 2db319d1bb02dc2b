"""Knows how to put a layer between the library and any driver, without either noticing.

A layer delegates everything; what it is for, it overrides. The suite uses layers to fake a lost connection where there
is no socket (`line`), and to break one promise at a time (`saboteurs`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from inspect import isawaitable
from typing import Any, ClassVar, TypeVar, cast

from unistream.capabilities import Capabilities
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
    Settlement,
    SettleOutcome,
    StartAt,
    Target,
    Token,
    TopicSpec,
)

T = TypeVar("T")


async def resolve(answer: MaybeAwaitable[T]) -> T:
    """Return the result of a driver's method, which may have given it at once."""
    return await cast(Awaitable[T], answer) if isawaitable(answer) else answer


_BACKGROUND: set[asyncio.Future[Any]] = set()


def start(answer: MaybeAwaitable[Any]) -> None:
    """Let a driver's method run on without waiting for it."""
    future = asyncio.ensure_future(resolve(answer))
    _BACKGROUND.add(future)
    future.add_done_callback(_BACKGROUND.discard)


class ProducerLayer(ProducerDriver):
    """A producer that delegates everything to `inner`."""

    def __init__(self, inner: ProducerDriver, driver: Driver, topic: TopicSpec) -> None:
        self.inner = inner
        self.driver = driver
        self.topic = topic
        self.pipeline = inner.pipeline
        self.batch_messages = inner.batch_messages
        self.batch_bytes = inner.batch_bytes

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Delegate."""
        return self.inner.publish(batch, timeout)

    async def close(self) -> None:
        """Delegate."""
        await self.inner.close()


class ConsumerLayer(ConsumerDriver):
    """A consumer that delegates everything to `inner`."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        self.inner = inner
        self.driver = driver
        self.group = group
        self.max_in_flight = max_in_flight

    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        """Delegate."""
        return self.inner.receive(limit, timeout)

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Delegate."""
        return self.inner.settle(batch)

    def extend(self, tokens: Sequence[Token], seconds: float) -> MaybeAwaitable[list[SettleOutcome]]:
        """Delegate."""
        return self.inner.extend(tokens, seconds)

    async def close(self) -> None:
        """Delegate."""
        await self.inner.close()


class DriverLayer(Driver):
    """
    A driver that delegates everything to one of `inner_class`, which `stack` sets.

    Attributes:
        beyond: Messages that its consumers ask for beyond what they may hold.
    """

    beyond: ClassVar[int] = 0
    inner_class: ClassVar[type[Driver]]
    producer_layer: ClassVar[type[ProducerLayer]] = ProducerLayer
    consumer_layer: ClassVar[type[ConsumerLayer]] = ConsumerLayer

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        self.inner = self.inner_class(target, emit)

    async def open(self) -> None:
        """Delegate, and take over what the driver claims."""
        await self.inner.open()
        self.capabilities = self.claims(self.inner.capabilities)

    def claims(self, capabilities: Capabilities) -> Capabilities:
        """Return what this layer claims, given what the driver below it claims."""
        return capabilities

    async def close(self) -> None:
        """Delegate."""
        await self.inner.close()

    async def ping(self) -> None:
        """Delegate."""
        await self.inner.ping()

    @property
    def native(self) -> Any:
        """Delegate."""
        return self.inner.native

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Delegate."""
        return await self.inner.create_topic(spec)

    async def delete_topic(self, name: str) -> None:
        """Delegate."""
        await self.inner.delete_topic(name)

    async def topic(self, name: str) -> TopicSpec:
        """Delegate."""
        return await self.inner.topic(name)

    async def topics(self) -> Sequence[TopicSpec]:
        """Delegate."""
        return await self.inner.topics()

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Delegate."""
        return await self.inner.create_group(spec)

    async def delete_group(self, topic: str, name: str) -> None:
        """Delegate."""
        await self.inner.delete_group(topic, name)

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """Delegate."""
        return await self.inner.groups(topic)

    async def lag(self, topic: str, group: str) -> Lag:
        """Delegate."""
        return await self.inner.lag(topic, group)

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """Delegate."""
        return await self.inner.members(topic, group)

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """Delegate."""
        await self.inner.seek(topic, group, to)

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """Delegate, and put a layer over the producer."""
        return self.producer_layer(await self.inner.producer(topic), self, topic)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """Delegate, and put a layer over the consumer."""
        max_in_flight += self.beyond
        inner = await self.inner.consumer(group, topic, max_in_flight=max_in_flight, lost=lost)
        return self.consumer_layer(inner, self, group, max_in_flight)


def stack(driver: type[Driver], *layers: type[DriverLayer], **attributes: Any) -> type[Driver]:
    """Return `driver` with the layers over it, the last one on top; `attributes` become class attributes of each."""
    for layer in layers:
        bound = {
            "inner_class": driver,
            "api": driver.api,
            "schemes": driver.schemes,
            "options": driver.options,
            "lacks": driver.lacks,
            **attributes,
        }
        driver = type(f"{layer.__name__}Over{driver.__name__}", (layer,), bound)
    return driver
