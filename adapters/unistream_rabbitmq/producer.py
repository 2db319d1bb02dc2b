"""Publishes batches on one channel in confirm mode, in order; every message persistent and mandatory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from unistream.driver.contract import ProducerDriver
from unistream.driver.types import PublishOutcome, RawMessage, Receipt, TopicSpec
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    NotPublishedError,
    PublishUnknownError,
    TooLargeError,
    TopicFullError,
    TopicMissingError,
    UnistreamError,
)
from unistream_rabbitmq.confirms import Batch, Fate, Publisher
from unistream_rabbitmq.errors import NOT_FOUND, code_of, translated
from unistream_rabbitmq.link import Line
from unistream_rabbitmq.messages import header_bytes, properties_of
from unistream_rabbitmq.names import exchange_of

__all__ = ["RabbitProducer"]

_NO_GROUP_SECONDS = 1.0


class RabbitProducer(ProducerDriver):
    """
    The publishing side of one topic.

    Args:
        line: The connection for publishing, shared by the producers of one client.
        topic: The topic as it stands.
        most_bytes: The largest message that the server takes.
        has_group: Whether the registry knows a group of the topic.
        room: How many messages a bounded topic still takes.
        closed: Told when this producer is closed.
    """

    pipeline = 4

    def __init__(
        self,
        line: Line,
        topic: TopicSpec,
        most_bytes: int,
        has_group: Callable[[str], Awaitable[bool]],
        room: Callable[[TopicSpec], Awaitable[int]],
        closed: Callable[[RabbitProducer], None],
    ) -> None:
        self._line = line
        self._topic = topic
        self._exchange = exchange_of(topic.name)
        self._most_bytes = most_bytes
        self._has_group = has_group
        self._room = room
        self._bounded = topic.max_backlog is not None
        if self._bounded:
            self.pipeline = 1
        self._told_closed = closed
        self._publisher: Publisher | None = None
        self._turn = asyncio.Lock()
        self._failures = 0
        self._failure: UnistreamError | None = None
        self._no_group_until = 0.0

    async def open(self) -> None:
        """Connect and open the channel."""
        self._publisher = await Publisher.open(await self._line.wire())

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """See `ProducerDriver.publish`."""
        if self._bounded and len(batch) > 1:
            return await self._publish_bounded(batch, timeout)
        return await self._publish(batch, timeout)

    async def _publish_bounded(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """
        Publish what there is room for at once, and the rest one by one.

        A quorum queue tells a channel that it is full after it has confirmed: what is under way meanwhile it takes.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        free = await self._room(self._topic)
        answered = await self._publish(batch[:free], until - loop.time()) if free else []
        for message in batch[free:]:
            try:
                answered += await self._publish([message], until - loop.time())
            except UnistreamError as error:
                if not answered:
                    raise
                answered.append(self._not_written(error))
        return answered

    async def _publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        until = asyncio.get_running_loop().time() + timeout
        outcomes: list[PublishOutcome | None] = [None] * len(batch)
        publisher = self._publisher
        if publisher is None or not publisher.usable or self._turn.locked() or publisher.wire.blocked:
            publisher = await self._ready(until)
        sent = self._write(publisher, batch, outcomes)
        if not sent.done.done():
            try:
                async with asyncio.timeout_at(until):
                    await sent.done
            except TimeoutError as late:
                for index in range(len(batch)):
                    sent.decide(index, late)
        alone = publisher.ended_with == 1
        answered: list[PublishOutcome] = []
        for message, outcome, fate in zip(batch, outcomes, sent.fates, strict=True):
            if outcome is not None:
                answered.append(outcome)
            elif fate is Fate.STORED:
                answered.append(Receipt(message.id))
            else:
                answered.append(await self._outcome(message, fate, alone, timeout))
        return answered

    async def close(self) -> None:
        """See `ProducerDriver.close`."""
        publisher, self._publisher = self._publisher, None
        self._told_closed(self)
        if publisher is not None:
            await publisher.close()

    def _write(self, publisher: Publisher, batch: Sequence[RawMessage], outcomes: list[PublishOutcome | None]) -> Batch:
        sent = publisher.batch(len(batch))
        time_ms = int(time.time() * 1000)
        ordered = self._topic.ordering == "key" or self._topic.partitions > 1
        for index, message in enumerate(batch):
            refusal: PublishOutcome | None = self._too_large(message, publisher.wire.connection.params.frame_max)
            if refusal is None:
                key = str(message.partition) if ordered else "0"
                try:
                    publisher.publish(sent, index, self._exchange, key, message.value, properties_of(message, time_ms))
                    continue
                except Exception as error:
                    # pika can't encode it, and has sent nothing.
                    refusal = self._not_written(error)
            outcomes[index] = refusal
            sent.decide(index, Fate.REFUSED)
        publisher.flush()
        return sent

    async def _ready(self, until: float) -> Publisher:
        """The channel, opened anew if need be; in turn, so that no later batch overtakes one that is repeated."""
        failures = self._failures
        async with self._turn:
            if self._failures != failures and self._failure is not None:
                raise type(self._failure)(str(self._failure), driver="amqp", topic=self._topic.name)
            publisher = self._publisher
            try:
                if publisher is None or not publisher.usable:
                    async with asyncio.timeout_at(until):
                        publisher = self._publisher = await Publisher.open(await self._line.wire())
            except Exception as error:
                self._failures += 1
                self._failure = translated(error, f"publish to {self._topic.name!r}", self._topic.name)
                raise self._failure from error
            if publisher.wire.blocked:
                self._failures += 1
                self._failure = BrokerUnavailableError(
                    f"publish to {self._topic.name!r}: RabbitMQ takes no messages just now ({publisher.wire.blocked})",
                    driver="amqp",
                    topic=self._topic.name,
                )
                raise self._failure
            return publisher

    async def _outcome(
        self, message: RawMessage, fate: Fate | BaseException | None, alone: bool, timeout: float
    ) -> PublishOutcome:
        name = self._topic.name
        if fate is Fate.RETURNED:
            return await self._returned(message)
        if fate is Fate.REFUSED:
            if self._topic.max_backlog is not None:
                return TopicFullError(
                    f"publish to {name!r}: a group has {self._topic.max_backlog} messages waiting; "
                    "other groups of the topic may have stored it",
                    stored="unknown",
                    driver="amqp",
                    topic=name,
                )
            return PublishUnknownError(
                f"publish to {name!r}: a queue refused the message; other groups may have stored it",
                driver="amqp",
                topic=name,
            )
        if isinstance(fate, TimeoutError):
            why = f"no answer within {timeout:g} s"
        elif isinstance(fate, BaseException) and code_of(fate) == NOT_FOUND:
            missing = TopicMissingError(f"publish to {name!r}: there is no such topic", driver="amqp", topic=name)
            # The server answers in order: what was written before the refused message may have reached queues.
            missing.stored = "no" if alone else "unknown"
            missing.__cause__ = fate
            return missing
        else:
            why = str(fate)
            if isinstance(fate, BaseException):
                error = translated(fate, f"publish to {name!r}", name)
                if isinstance(error, AccessError):
                    error.stored = "no" if alone else "unknown"
                    return error
        unknown = PublishUnknownError(
            f"publish to {name!r}: {why}; the message may be stored", driver="amqp", topic=name
        )
        unknown.__cause__ = fate if isinstance(fate, BaseException) else None
        return unknown

    async def _returned(self, message: RawMessage) -> PublishOutcome:
        """No queue takes it: success where there is no group (PUB-8), else a group's queue is gone."""
        name = self._topic.name
        now = asyncio.get_running_loop().time()
        if now >= self._no_group_until:
            try:
                if await self._has_group(name):
                    return NotPublishedError(
                        f"publish to {name!r}: no queue takes the message although the topic has a group; "
                        "its queue was deleted, create the group again",
                        driver="amqp",
                        topic=name,
                    )
            except UnistreamError as error:
                made = NotPublishedError(
                    f"publish to {name!r}: no queue takes the message ({error})", driver="amqp", topic=name
                )
                made.__cause__ = error
                return made
            self._no_group_until = now + _NO_GROUP_SECONDS
        return Receipt(message.id)

    def _too_large(self, message: RawMessage, frame_max: int) -> TooLargeError | None:
        name = self._topic.name
        if len(message.value) > self._most_bytes:
            return TooLargeError(
                f"publish to {name!r}: {len(message.value)} bytes, and RabbitMQ takes {self._most_bytes}",
                driver="amqp",
                topic=name,
            )
        if message.headers or message.key:
            size = header_bytes(message)
            if size > frame_max:
                return TooLargeError(
                    f"publish to {name!r}: key and headers take about {size} bytes, and AMQP has room for {frame_max} "
                    "in one frame (RabbitMQ's setting frame_max)",
                    driver="amqp",
                    topic=name,
                )
        return None

    def _not_written(self, error: Exception) -> PublishOutcome:
        made = NotPublishedError(
            f"publish to {self._topic.name!r}: {error or type(error).__name__}", driver="amqp", topic=self._topic.name
        )
        made.__cause__ = error
        return made
