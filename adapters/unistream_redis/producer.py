"""Publishes batches on one connection, in order: plain XADDs in a row, or one script where a backlog is bounded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

from redis.exceptions import RedisError, ResponseError

from unistream.driver.contract import ProducerDriver
from unistream.driver.types import PublishOutcome, RawMessage, Receipt, TopicSpec
from unistream.errors import (
    BrokerUnavailableError,
    PublishUnknownError,
    TooLargeError,
    TopicFullError,
    TopicMissingError,
    UnistreamError,
)
from unistream_redis.entries import fields_of, size_of
from unistream_redis.errors import code_of, refusal, translated, unavailable
from unistream_redis.keys import TopicKeys
from unistream_redis.link import Link
from unistream_redis.registry import position_of
from unistream_redis.scripts import PUBLISH, RETAIN
from unistream_redis.wire import Argument, Request, pack

__all__ = ["RedisProducer"]

_RETAIN_EVERY = 1.0
_log = logging.getLogger("unistream.driver.redis")


class RedisProducer(ProducerDriver):
    """
    The publishing side of one topic, on a connection of its own.

    Args:
        link: The connection; closed with this producer.
        topic: The topic as it stands.
        most_bytes: The largest message.
    """

    pipeline = 2

    def __init__(self, link: Link, topic: TopicSpec, most_bytes: int) -> None:
        self._link = link
        self._topic = topic
        self._most_bytes = most_bytes
        self._keys = TopicKeys.of(topic)
        self._ordered = self._keys.ordered
        self._streams = [keys.stream for keys in self._keys.streams]
        self._loop = asyncio.get_running_loop()
        self._retains = bool(topic.retention)
        self._turn = asyncio.Lock()
        # Calls that wait for their turn, or for a connection: nothing may pass them.
        self._queueing = 0
        self._failures = 0
        self._failure: BrokerUnavailableError | None = None
        self._retain_at = 0.0

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> Awaitable[list[PublishOutcome]]:
        """See `ProducerDriver.publish`. Written at once where nothing stands in the way, which is nearly always."""
        wire = self._link.current
        if wire is None or self._queueing or any(size_of(message) > self._most_bytes for message in batch):
            self._queueing += 1
            return self._publish_in_turn(batch, timeout)
        return self._answered(batch, wire.request(*self._packed(batch), until=self._loop.time() + timeout), timeout)

    async def _publish_in_turn(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        until = self._loop.time() + timeout
        outcomes: list[PublishOutcome | None] = [self._too_large(message) for message in batch]
        sent = [message for message, outcome in zip(batch, outcomes, strict=True) if outcome is None]
        failures = self._failures
        try:
            # In turn, so that after a failed attempt to connect no later batch overtakes this one's repetition.
            async with self._turn:
                if self._failures != failures and self._failure is not None:
                    raise BrokerUnavailableError(str(self._failure), driver="redis", topic=self._topic.name)
                request = await self._written(sent, until) if sent else None
        finally:
            self._queueing -= 1
        answers = iter([] if request is None else await self._answered(sent, request, timeout))
        return [outcome or next(answers) for outcome in outcomes]

    async def close(self) -> None:
        """See `ProducerDriver.close`."""
        await self._link.close()

    async def _answered(self, batch: Sequence[RawMessage], request: Request, timeout: float) -> list[PublishOutcome]:
        error: Exception
        try:
            replies = await request.future
        except TimeoutError as late:
            error = late
        except RedisError as lost:
            error = lost
        else:
            if not self._ordered and len(replies) == len(batch) and set(map(type, replies)) == {bytes}:
                # Every reply is an entry's id, which is nearly always so.
                return [Receipt(message.id, reply.decode()) for message, reply in zip(batch, replies, strict=True)]
            if any(isinstance(reply, ResponseError) and code_of(reply) == "NOSCRIPT" for reply in replies):
                # Somebody flushed the scripts. A second try here would let later batches overtake; the next connection
                # brings them along.
                await self._link.close()
            return self._answers(batch, replies)
        known = self._answers(batch, request.replies[: len(batch)]) if request.replies else []
        unknown = [self._unknown(error, timeout) for _ in batch[len(known) :]]
        return [*known, *unknown]

    async def _written(self, batch: Sequence[RawMessage], until: float) -> Request:
        try:
            async with asyncio.timeout_at(until):
                wire = await self._link.wire()
            return wire.request(*self._packed(batch), until=until)
        except (UnistreamError, TimeoutError, RedisError) as error:
            if isinstance(error, UnistreamError) and not isinstance(error, BrokerUnavailableError):
                raise
            self._failures += 1
            self._failure = BrokerUnavailableError(
                f"publish to {self._topic.name!r}: {error or 'no connection in time'}",
                driver="redis",
                topic=self._topic.name,
            )
            raise self._failure from error

    def _packed(self, batch: Sequence[RawMessage]) -> tuple[list[bytes], int]:
        if self._topic.max_backlog is not None:
            arguments: list[Argument] = [self._topic.max_backlog, self._topic.overflow]
            for message in batch:
                fields = fields_of(message)
                arguments += (message.partition + 1 if self._ordered else 1, len(fields), *fields)
            keys = [*self._streams, *(keys.lost for keys in self._keys.streams)]
            payload = [pack(("EVALSHA", PUBLISH.sha, len(keys), *keys, *arguments))]
            if self._retains:
                payload += self._retention()
            return payload, len(payload)
        streams = self._streams
        if self._ordered:
            payload = [
                pack(("XADD", streams[message.partition], "NOMKSTREAM", "*", *fields_of(message))) for message in batch
            ]
        else:
            stream = streams[0]
            payload = [pack(("XADD", stream, "NOMKSTREAM", "*", *fields_of(message))) for message in batch]
        if self._retains:
            payload += self._retention()
        return payload, len(payload)

    def _retention(self) -> list[bytes]:
        """The commands that remove what the declared retention lets go, now and then; they ride on a batch."""
        retention = self._topic.retention
        now = self._loop.time()
        if now < self._retain_at:
            return []
        self._retain_at = now + _RETAIN_EVERY
        limits = (
            -1 if retention.max_age is None else int(retention.max_age * 1000),
            -1 if retention.max_messages is None else retention.max_messages,
            int(_RETAIN_EVERY * 1000),
        )
        return [
            pack(("EVALSHA", RETAIN.sha, 3, keys.stream, keys.lost, keys.retained, *limits))
            for keys in self._keys.streams
        ]

    def _answers(self, batch: Sequence[RawMessage], replies: list[Any]) -> list[PublishOutcome]:
        if self._topic.max_backlog is not None:
            reply, *rest = replies
            replies = [*(reply if isinstance(reply, list) else [reply] * len(batch)), *rest]
        for reply in replies[len(batch) :]:
            if isinstance(reply, ResponseError):
                _log.warning("retention of %r did not run: %s", self._topic.name, reply)
        del replies[len(batch) :]
        if replies and all(unavailable(reply) for reply in replies):
            raise translated(replies[0], f"publish to {self._topic.name!r}", self._topic.name)
        return [self._outcome(reply, message) for message, reply in zip(batch, replies, strict=False)]

    def _outcome(self, reply: Any, message: RawMessage) -> PublishOutcome:
        name = self._topic.name
        if isinstance(reply, bytes):
            return Receipt(message.id, position_of(reply, message.partition if self._ordered else None))
        if isinstance(reply, ResponseError):
            return refusal(reply, name)
        if self._topic.max_backlog is not None and reply is None:
            return TopicFullError(
                f"publish to {name!r}: {self._topic.max_backlog} messages wait for the slowest group",
                driver="redis",
                topic=name,
            )
        missing = TopicMissingError(f"publish to {name!r}: there is no such topic", driver="redis", topic=name)
        missing.stored = "no"
        return missing

    def _too_large(self, message: RawMessage) -> PublishOutcome | None:
        size = size_of(message)
        if size <= self._most_bytes:
            return None
        return TooLargeError(
            f"publish to {self._topic.name!r}: {size} bytes, and Redis takes {self._most_bytes} (proto-max-bulk-len)",
            driver="redis",
            topic=self._topic.name,
        )

    def _unknown(self, error: Exception, timeout: float) -> PublishUnknownError:
        why = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else str(error)
        made = PublishUnknownError(
            f"publish to {self._topic.name!r}: {why}; the message may be stored", driver="redis", topic=self._topic.name
        )
        made.__cause__ = error
        return made
