"""Publishes batches through a KafkaProducer: given to it straight away, or by its owner thread where that may wait.

The client's own deadline is off. In kafka-python 3.0.12 a batch that was sent once and then passes
`delivery_timeout_ms` resets the producer id to a state that nothing leaves: no later future is ever resolved
(`Sender._send_producer_data`, `TransactionManager.reset_producer_id`). Without the deadline the idempotent producer
keeps every batch, sends it again under the same sequence number, and the broker stores it once. What has no answer in
the caller's time is reported as unknown; the client still holds it, so what it holds is bounded.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, cast

from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaConnectionError, KafkaError
from kafka.record.default_records import DefaultRecordBatchBuilder

from unistream.driver.contract import ProducerDriver
from unistream.driver.envelope import Envelope
from unistream.driver.owner_thread import OwnerThread
from unistream.driver.types import PublishOutcome, RawMessage, Receipt, TopicSpec
from unistream.errors import (
    BrokerUnavailableError,
    NotPublishedError,
    PublishUnknownError,
    TopicMissingError,
    UnistreamError,
)
from unistream_kafka.client import Place, connect, connected, discard, losses
from unistream_kafka.errors import refusal, translate, translated
from unistream_kafka.topics import position_of

__all__ = ["ENVELOPE", "OVERHEAD_BYTES", "KafkaProducerDriver"]

ENVELOPE = Envelope(key=True, time=True)

_size = DefaultRecordBatchBuilder.estimate_size_in_bytes

_FOREVER_MS = 2**31 - 1
_MOST_STRAIGHT = 512
"""A larger batch is given to the client by the owner thread: the event loop would stand still for too long."""
_MOST_HELD = 20_000
_MOST_HELD_BYTES = 64 * 1024 * 1024
_BATCH_BYTES = 512 * 1024
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 0.2
_RETRY_SECONDS = 0.1
_MOST_RETRY_SECONDS = 1.0
OVERHEAD_BYTES = 8192
"""What a message takes beside its value, key and headers, at most: the batch around it, and our headers, also those of
a dead letter."""


class _Batch:
    """One call of `publish` on its way: counts the answers, in whatever thread they come, and reports once."""

    __slots__ = ("_left", "_lock", "_report", "answers", "begun", "bytes", "messages")

    def __init__(self, messages: Sequence[RawMessage], report: Callable[[], object]) -> None:
        self.messages = messages
        self.bytes = 0
        # The client's future of a message, or the error of one that it did not take.
        self.answers: list[Any] = [None] * len(messages)
        self._left = 0
        self._lock = threading.Lock()
        self._report = report
        self.begun = False

    def begin(self) -> bool:
        """Claim the batch, for sending it or for giving it up; False if that was done before."""
        with self._lock:
            begun, self.begun = self.begun, True
        return not begun

    def follow(self, futures: Collection[Any]) -> None:
        """Report when these are decided, each the last one of ours in a batch of the client, and the rest with them."""
        self._left = len(futures)
        if not futures:
            self._report()
        for future in futures:
            future._add_cb_eb(self._answered, self._answered)

    def _answered(self, _: object) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        # What is over in the client's batch is over in order, unless the client has split the batch meanwhile.
        left = [answer for answer in self.answers if not isinstance(answer, UnistreamError) and not answer.is_done]
        if left:
            self.follow(left)
        else:
            self._report()


class KafkaProducerDriver(ProducerDriver):
    """
    The publishing side of one topic, on a KafkaProducer of its own.

    Args:
        place: The cluster.
        topic: The topic as it stands.
        stored: Kafka's name of it.
        most_bytes: The largest batch that the topic takes.
        look: Looks for the topic; raises `TopicMissingError` if it is gone.
    """

    pipeline = 2

    def __init__(
        self, place: Place, topic: TopicSpec, stored: str, most_bytes: int, look: Callable[[str], Awaitable[object]]
    ) -> None:
        self._place = place
        self._topic = topic
        self._name = topic.name
        self._stored = stored
        self._most_bytes = most_bytes
        self._look = look
        self._owner = OwnerThread(f"unistream-kafka-producer-{topic.name}")
        # The owner thread's; the loop only reads them.
        self._client: KafkaProducer | None = None
        self._failures = 0
        self._failure = ""
        # The loop's: how many batches wait for the owner thread, and how many failures it has heard of.
        self._posted = 0
        self._told = 0
        # Handed to the client and not decided, counted in its own threads too.
        self._held = 0
        self._held_bytes = 0
        self._held_lock = threading.Lock()
        # Connections lost by the client when it last held nothing undecided.
        self._losses = 0

    async def open(self) -> None:
        """Connect."""
        try:
            with translate(f"producer of {self._name!r}", self._name):
                await self._owner.call(self._ready)
        except BaseException:
            await asyncio.shield(self.close())
            raise

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """See `ProducerDriver.publish`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        if self._client is None:
            # Asking an admin client is quicker than a new producer, which waits for a topic that is not there.
            await self._look(self._name)
        decided: asyncio.Future[BaseException | None] = loop.create_future()
        put = self._owner.crossing.put
        under_way = _Batch(batch, lambda: put(_finish, decided, None))
        failures = self._told

        def hand_over() -> None:
            try:
                self._hand_over(under_way, failures)
            except Exception as error:
                put(_finish, decided, error)
            finally:
                put(self._taken, self._failures)

        client = self._client
        if len(batch) <= _MOST_STRAIGHT and not self._posted and client is not None and self._takes(client):
            under_way.begin()
            self._send(client, under_way)
        else:
            self._posted += 1
            self._owner.post(hand_over)
        # Answered before the caller stops waiting: after that the outcome would count as unknown.
        early = until - min(_ANSWER_SECONDS, timeout / 4)
        try:
            while not decided.done() and (now := loop.time()) < until:
                left = (until if under_way.begun else early) - now
                if left <= 0 and under_way.begin():
                    late = f"publish to {self._name!r}: not handed over within {timeout:g} s"
                    return [NotPublishedError(late, driver="kafka", topic=self._name, retryable=True) for _ in batch]
                await asyncio.wait([decided], timeout=max(0.0, min(_LOOK_SECONDS, left)))
                if not decided.done() and not self._listed():
                    await self._gone()
        except asyncio.CancelledError:
            under_way.begin()  # what was not handed over is not
            raise
        error = decided.result() if decided.done() else None
        if isinstance(error, LookupError):
            await self._look(self._name)
            raise BrokerUnavailableError(str(error), driver="kafka", topic=self._name) from error
        if error is not None:
            raise error
        return [
            self._outcome(message, answer, timeout) for message, answer in zip(batch, under_way.answers, strict=True)
        ]

    def _taken(self, failures: int) -> None:
        self._posted -= 1
        self._told = failures

    def _takes(self, client: KafkaProducer) -> bool:
        """Whether the client takes messages without waiting for anything."""
        return (
            connected(client._sender._client)
            and self._held < _MOST_HELD
            and self._held_bytes < _MOST_HELD_BYTES
            and not client._transaction_manager.has_fatal_error()
            and client._metadata.partitions_for_topic(self._stored) is not None
        )

    async def _gone(self) -> None:
        """The client knows no such topic any more; if it is deleted, give up what is under way to it."""
        try:
            await self._look(self._name)
        except TopicMissingError as error:
            # Kafka answers in order: with nothing on its way and no connection lost since, every attempt was refused.
            # Else something of it may have been stored, and read, before the topic was deleted.
            error.stored = "no" if await self._owner.call(self._settled) else "unknown"
            await self._owner.call(self._drop)
            raise
        except BrokerUnavailableError:
            return

    def _outcome(self, message: RawMessage, answer: Any, timeout: float) -> PublishOutcome:
        if isinstance(answer, UnistreamError):
            return cast(PublishOutcome, answer)
        if answer is None or not answer.is_done:
            return PublishUnknownError(
                f"publish to {self._name!r}: no answer within {timeout:g} s; the message may be stored",
                driver="kafka",
                topic=self._name,
            )
        if answer.exception is not None:
            return refusal(answer.exception, self._name)
        return Receipt(message.id, position_of(message.partition, answer.value.offset))

    async def close(self) -> None:
        """See `ProducerDriver.close`."""
        self._owner.post(self._drop)
        await self._owner.close()

    # In the owner thread

    def _listed(self) -> bool:
        client = self._client
        return client is None or client._metadata.partitions_for_topic(self._stored) is not None

    def _hand_over(self, batch: _Batch, failures: int) -> None:
        """
        Give the client every message of a batch.

        Raises:
            BrokerUnavailableError: Nothing was given: the cluster is out of reach, or an earlier batch failed so and
                comes again first.
            LookupError: Nothing was given: the client does not know the topic.
        """
        if self._failures != failures:
            raise BrokerUnavailableError(self._failure, driver="kafka", topic=self._name)
        try:
            client = self._ready()
            if self._held >= _MOST_HELD or self._held_bytes >= _MOST_HELD_BYTES:
                raise BrokerUnavailableError(
                    f"{self._held} messages without an answer are on their way already", driver="kafka"
                )
            if client._metadata.partitions_for_topic(self._stored) is None:
                self._drop()
                raise LookupError(f"publish to {self._name!r}: Kafka does not list the topic just now")
        except LookupError:
            self._failures += 1
            self._failure = f"publish to {self._name!r}: Kafka does not list the topic just now"
            raise
        except Exception as error:
            self._failures += 1
            made = translated(error, f"publish to {self._name!r}", self._name)
            self._failure = str(made)
            raise made from error
        if batch.begin():
            self._send(client, batch)

    def _send(self, client: KafkaProducer, batch: _Batch) -> None:
        wrap, append, answers = ENVELOPE.wrap, client._accumulator.append, batch.answers
        batch.bytes = sum(len(message.value) for message in batch.messages)
        with self._held_lock:
            if not self._held:
                self._losses = losses(client._sender._client)
            self._held += len(answers)
            self._held_bytes += batch.bytes
        report = batch._report

        def let_go() -> None:
            with self._held_lock:
                self._held -= len(answers)
                self._held_bytes -= batch.bytes
            report()

        batch._report = let_go
        # The client's batch -> the last message in it: one callback each, instead of one for every message.
        last: dict[Any, Any] = {}
        known = client._metadata.partitions_for_topic(self._stored) or ()
        places = {partition: TopicPartition(self._stored, partition) for partition in known}
        for at, message in enumerate(batch.messages):
            headers = wrap(message, 0)
            _, value, key, _, partition, *_ = message
            try:
                # As the client's own `send`, which does all of it anew for every message, and wakes its thread for
                # every batch that one begins.
                client._ensure_valid_record_size(_size(key, value, headers))
                if partition not in places:
                    raise ValueError(f"Kafka lists no partition {partition} just now")
                answer, *_ = append(places[partition], None, key, value, headers)
            except (KafkaError, ValueError, AssertionError) as error:
                # Raised before the message is put into a batch of the client.
                made = refusal(error, self._name)
                if made.stored != "no":
                    made = NotPublishedError(str(made), driver="kafka", topic=self._name, retryable=True)
                    made.__cause__ = error
                answers[at] = made
            else:
                answers[at] = last[answer._produce_future] = answer
        client._sender.wakeup()
        batch.follow(last.values())

    def _ready(self) -> KafkaProducer:
        """The client, connected; one attempt to connect if it is not."""
        client = self._client
        if client is not None and client._transaction_manager.has_fatal_error():
            # It refuses everything from then on.
            self._drop()
            client = None
        if client is None:
            patience = int(self._place.connect_timeout * 1000)
            client = connect(
                KafkaProducer,
                self._place,
                producer=True,
                acks="all",
                enable_idempotence=True,
                delivery_timeout_ms=_FOREVER_MS,
                # The broker refuses a batch as a whole, so none but a single message may come near the limit.
                batch_size=min(_BATCH_BYTES, self._most_bytes // 2),
                max_block_ms=patience,
                max_request_size=self._most_bytes,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
            try:
                client.partitions_for(self._stored)
            except KafkaError:
                discard(client)
                raise
            self._client = client
        if not connected(client._sender._client):
            self._reach(client)
        return client

    def _reach(self, client: KafkaProducer) -> None:
        """Connect to one of the nodes that lead the topic; the client's sender does the rest."""
        manager = client._sender._client._manager
        until = time.monotonic() + self._place.connect_timeout
        nodes = [broker.node_id for broker in manager.cluster.brokers()]
        error: BaseException = KafkaConnectionError("no connection in time")
        pause = _RETRY_SECONDS
        while time.monotonic() < until:
            for node in nodes:
                ended = threading.Event()
                future = manager.call_soon(_connection, manager, node)
                future.add_both(lambda _, ended=ended: ended.set())
                client._sender.wakeup()
                ended.wait(until - time.monotonic())
                if future.succeeded():
                    return
                error = future.exception or error
            time.sleep(max(0.0, min(pause, until - time.monotonic())))
            pause = min(2 * pause, _MOST_RETRY_SECONDS)
        raise error

    def _settled(self) -> bool:
        client = self._client
        return (
            client is not None
            and not any(client._sender._in_flight_batches.values())
            and losses(client._sender._client) == self._losses
        )

    def _drop(self) -> None:
        """Close the client; what it holds undecided is given up."""
        client, self._client = self._client, None
        if client is not None:
            discard(client)


async def _connection(manager: Any, node: Any) -> None:
    await manager.get_connection(node)


def _finish(future: asyncio.Future[BaseException | None], error: BaseException | None) -> None:
    if not future.done():
        future.set_result(error)
