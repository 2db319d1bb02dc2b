"""Publishes batches on one connection, in order: all requests of a batch in one write, their replies matched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

from unistream.driver.contract import ProducerDriver
from unistream.driver.types import PublishOutcome, RawMessage, Receipt, TopicSpec
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    NotPublishedError,
    PublishUnknownError,
    TooLargeError,
    TopicMissingError,
    UnistreamError,
)
from unistream_nats.entries import MOST_HEADERS, OVERHEAD, payload_size, written
from unistream_nats.errors import ApiError, refusal, translate
from unistream_nats.link import Link
from unistream_nats.names import FREE, stream_name, subject_of
from unistream_nats.wire import Gone, Wire

__all__ = ["NatsProducer"]


class _Batch:
    """
    The replies to one batch.

    Attributes:
        first: The number of the first reply.
        future: Done when every reply is there, or none will come any more.
        outcomes: Those that came.
        homeless: Places of messages that no stream took.
        error: Why no more replies come.
        refused: Whether some have no right, and get no reply.
    """

    __slots__ = (
        "_ids",
        "_subjects",
        "_topic",
        "_wanted",
        "error",
        "first",
        "future",
        "homeless",
        "outcomes",
        "refused",
    )

    def __init__(self, topic: str, subjects: Sequence[str], ids: Sequence[str], future: asyncio.Future[None]) -> None:
        self._topic = topic
        self._ids = ids
        self._subjects = subjects
        self._wanted = len(subjects)
        self.first = 0
        self.future = future
        self.outcomes: list[PublishOutcome | None] = [None] * len(subjects)
        self.homeless: list[int] = []
        self.error: Exception | None = None
        self.refused = False

    def answer(self, number: int, head: bytes, body: bytes) -> None:
        """See `Waiter`."""
        at = number - self.first
        if head:
            self.homeless.append(at)
        else:
            told = json.loads(body)
            if "error" in told:
                self.outcomes[at] = refusal(ApiError(told["error"]), self._topic)
            else:
                self.outcomes[at] = Receipt(self._ids[at], str(told["seq"]), told.get("duplicate", False))
        self._count()

    def fail(self, error: Exception) -> None:
        """See `Waiter`."""
        self.error = error
        if not self.future.done():
            self.future.set_result(None)

    def refuse(self, subject: str, error: Exception) -> None:
        """See `Waiter`."""
        for at, mine in enumerate(self._subjects):
            if mine == subject and self.outcomes[at] is None:
                refused = AccessError(f"publish to {self._topic!r}: {error}", driver="nats", topic=self._topic)
                refused.stored = "no"
                self.outcomes[at] = refused
                self.refused = True
                self._count()

    def _count(self) -> None:
        self._wanted -= 1
        if not self._wanted and not self.future.done():
            self.future.set_result(None)


class NatsProducer(ProducerDriver):
    """
    The publishing side of one topic.

    Args:
        link: The connection for publishing; shared by all producers of the driver.
        topic: The topic as it stands.
        closed: Called once when it is closed.
    """

    pipeline = 2

    def __init__(self, link: Link, topic: TopicSpec, closed: Callable[[NatsProducer], None]) -> None:
        self._link = link
        self._topic = topic
        self._closed = closed
        self._ordered = topic.ordering == "key"
        self._subjects = [subject_of(topic.name, partition) for partition in range(topic.partitions)]
        self._turn = asyncio.Lock()
        self._failures = 0
        self._failure: BrokerUnavailableError | None = None

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """See `ProducerDriver.publish`."""
        failures = self._failures
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        # In turn, so that after a failed attempt to connect no later batch overtakes this one's repetition.
        async with self._turn:
            if self._failures != failures and self._failure is not None:
                raise BrokerUnavailableError(str(self._failure), driver="nats", topic=self._topic.name)
            try:
                async with asyncio.timeout_at(until):
                    wire = await self._link.wire()
                sent, outcomes, places = self._write(wire, batch)
            except (BrokerUnavailableError, TimeoutError, Gone) as error:
                self._failures += 1
                self._failure = BrokerUnavailableError(
                    f"publish to {self._topic.name!r}: {error or 'no connection in time'}",
                    driver="nats",
                    topic=self._topic.name,
                )
                raise self._failure from error
        if sent is None:
            return [outcome for outcome in outcomes if outcome is not None]
        try:
            async with asyncio.timeout_at(until):
                await sent.future
        except TimeoutError as late:
            sent.error = late
        finally:
            if not sent.future.done() or sent.error is not None or sent.refused:
                wire.forget(sent.first, len(places))
        if sent.homeless:
            await self._house(sent)
        for at, outcome in zip(places, sent.outcomes, strict=True):
            outcomes[at] = outcome or self._unknown(sent.error, timeout)
        return [outcome for outcome in outcomes if outcome is not None]

    async def close(self) -> None:
        """See `ProducerDriver.close`."""
        self._closed(self)

    def _write(
        self, wire: Wire, batch: Sequence[RawMessage]
    ) -> tuple[_Batch | None, list[PublishOutcome | None], list[int]]:
        """Write what fits; the outcomes known already, and the places of what was written."""
        most = int(wire.info["max_payload"])
        outcomes: list[PublishOutcome | None] = [None] * len(batch)
        places: list[int] = []
        subjects: list[str] = []
        parts: list[tuple[bytes, bytes]] = []
        for at, message in enumerate(batch):
            head, body = written(message)
            size = len(head) + len(body)
            if size > most or len(head) > MOST_HEADERS or payload_size(message) > most - OVERHEAD:
                outcomes[at] = self._too_large(message, len(head), most)
                continue
            places.append(at)
            parts.append((head, body))
            subject = self._subjects[message.partition]
            subjects.append(f"{subject}.{FREE}" if self._ordered and message.key is None else subject)
        if not places:
            return None, outcomes, places
        ids = [batch[at].id for at in places]
        sent = _Batch(self._topic.name, subjects, ids, asyncio.get_running_loop().create_future())
        number = first = wire.expect(sent, len(places))
        sent.first = first
        inbox = wire.inbox
        data: list[bytes] = []
        for subject, (head, value) in zip(subjects, parts, strict=True):
            size = len(head)
            data += (f"HPUB {subject} {inbox}{number} {size} {size + len(value)}\r\n".encode(), head, value, b"\r\n")
            number += 1
        try:
            wire.write(data)
        except Gone:
            wire.forget(first, len(places))
            raise
        return sent, outcomes, places

    async def _house(self, sent: _Batch) -> None:
        """No stream took some messages: surely not stored. Find out whether there is one at all."""
        name = self._topic.name
        try:
            with translate(f"publish to {name!r}", name):
                await self._link.api(f"STREAM.INFO.{stream_name(name)}")
        except TopicMissingError as missing:
            missing.stored = "no"
            why: PublishOutcome = missing
        except UnistreamError as error:
            why = self._refused(str(error))
        else:
            why = self._refused("the stream did not answer, it may be about to start")
        for at in sent.homeless:
            sent.outcomes[at] = why

    def _refused(self, why: str) -> NotPublishedError:
        name = self._topic.name
        return NotPublishedError(f"publish to {name!r}: {why}", driver="nats", topic=name, retryable=True)

    def _too_large(self, message: RawMessage, head: int, most: int) -> TooLargeError:
        return TooLargeError(
            f"publish to {self._topic.name!r}: {len(message.value)} bytes, and {head} bytes of key and headers as "
            f"they are written; this server takes {most} for all (max_payload), of which {OVERHEAD} are set aside, and "
            f"{MOST_HEADERS} for the key",
            driver="nats",
            topic=self._topic.name,
        )

    def _unknown(self, error: Exception | None, timeout: float) -> PublishUnknownError:
        why = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else str(error)
        made = PublishUnknownError(
            f"publish to {self._topic.name!r}: {why}; the message may be stored", driver="nats", topic=self._topic.name
        )
        made.__cause__ = error
        return made
