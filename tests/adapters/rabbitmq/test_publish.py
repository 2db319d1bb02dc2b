"""Publishing on a real RabbitMQ: what lies there afterwards, and what the three outcomes mean."""

from __future__ import annotations

import asyncio
import time

import pytest
from pika import BasicProperties

from tests.adapters.rabbitmq.support import LATE, LIMIT, end, message, opened, proxied, run, take
from unistream.driver.types import RawMessage, Receipt
from unistream.errors import (
    BrokerUnavailableError,
    NotPublishedError,
    PublishUnknownError,
    TooLargeError,
    TopicFullError,
    TopicMissingError,
)

pytestmark = pytest.mark.rabbitmq

WEIRD = ((" name\r\n", b"\x00\xff"), ("same", b"1"), ("same", b"2"), ("Same", b""), ("", b"no name"), ("ü", b" x "))


def test_what_is_published_arrives_unchanged() -> None:
    """Body, key, headers and id come out as they went in, with the publisher's time; routing headers too."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic()
            consumer = await here.join(await here.group())
            producer = await here.driver.producer(topic)
            batch = [
                RawMessage("a", b"\x00" * 200_000, b"\xff", WEIRD, 0),
                RawMessage("b", b"", None, (), 0),
                RawMessage("c", b"", b"", (("only", b""),), 0),
                RawMessage("d", b"x", None, (("CC", b"1"), ("x-death", b"2")), 0),
            ]
            assert await producer.publish(batch, LIMIT) == [Receipt(one.id) for one in batch]
            deliveries = await take(consumer, 4)

            assert [delivery.message for delivery in deliveries] == batch
            assert all(abs((delivery.published_at or 0) - time.time()) < 60 for delivery in deliveries)
            await end(consumer, deliveries)
            await consumer.close()
            await producer.close()

    run(test)


def test_a_bare_client_reads_what_was_published() -> None:
    """Body, headers, id and key lie natively in a queue that a bare client binds; the message is persistent."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            queue = f"{here.name}-bare"
            await here.bare(
                lambda channel: (channel.queue_declare(queue), channel.queue_bind(queue, f"us.{here.name}"))
            )
            await producer.publish([RawMessage("i", b"body", b"\xffkey", (("a", b"1"),), 0)], LIMIT)
            method, properties, body = await here.bare(lambda channel: channel.basic_get(queue, auto_ack=True))
            await here.bare(lambda channel: channel.queue_delete(queue))

            assert body == b"body"
            assert (properties.message_id, properties.delivery_mode) == ("i", 2)
            assert (properties.headers["a"], properties.headers["unistream-key"]) == (b"1", b"\xffkey")
            assert method.exchange == f"us.{here.name}"
            await producer.close()

    run(test)


def test_foreign_messages_are_consumable() -> None:
    """Messages of a bare client come with headers of any type as bytes, and with message_id as id."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            headers = {"text": "é", "raw": b"\xff", "number": 7, "yes": True, "none": None, "list": [1, "a"]}
            await here.foreign(b"plain")
            await here.foreign(b"rich", properties=BasicProperties(headers=headers, message_id="m", timestamp=1000))
            await here.foreign(b"keyed", properties=BasicProperties(headers={"unistream-key": b"k\xff", "a": b"1"}))
            plain, rich, keyed = await take(consumer, 3)

            assert plain.message == RawMessage("", b"plain", None, (), 0)
            assert (rich.message.id, rich.message.value, rich.published_at) == ("m", b"rich", 1000.0)
            assert dict(rich.message.headers) == {
                "text": "é".encode(),
                "raw": b"\xff",
                "number": b"7",
                "yes": b"true",
                "none": b"",
                "list": b'[1, "a"]',
            }
            assert keyed.message == RawMessage("", b"keyed", b"k\xff", (("a", b"1"),), 0)
            await end(consumer, [plain, rich, keyed])
            await consumer.close()

    run(test)


def test_foreign_messages_keep_their_order_in_an_ordered_group() -> None:
    """A bare client picks the partition by routing key; what has a key there waits for the one before of its key."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2, ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            keyed = BasicProperties(headers={"unistream-key": b"k"})
            await here.foreign(b"0", b"1", properties=keyed, key="1")
            await here.foreign(b"beside", key="1")
            first = await take(consumer, 2)
            assert [(one.message.value, one.message.key, one.message.partition) for one in first] == [
                (b"0", b"k", 1),
                (b"beside", None, 1),
            ]
            await end(consumer, first)
            (second,) = await take(consumer, 1)
            assert (second.message.value, second.message.key) == (b"1", b"k")
            await end(consumer, [second])
            await consumer.close()

    run(test)


def test_a_topic_without_a_group_takes_messages_and_one_with_a_lost_queue_does_not() -> None:
    """Nobody was promised a message of a topic without group; a group's deleted queue makes it NotPublishedError."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            assert await producer.publish([message(0), message(1)], LIMIT) == [Receipt("0"), Receipt("1")]
            await here.group()
            assert await producer.publish([message(2)], LIMIT) == [Receipt("2")]
            await here.bare(lambda channel: channel.queue_delete(f"us.{here.name}.g"))
            async with asyncio.timeout(LIMIT):  # what was known of groups counts for a second
                refused: object = Receipt("")
                while isinstance(refused, Receipt):
                    (refused,) = await producer.publish([message(3)], LIMIT)

            assert type(refused) is NotPublishedError
            await producer.close()

    run(test)


def test_a_deleted_topic_is_missing_and_works_when_made_again() -> None:
    """Publishing to a topic deleted meanwhile is TopicMissingError, surely not stored; made again it works."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            await here.driver.delete_topic(here.name)
            for number in range(2):
                (refused,) = await producer.publish([message(number)], LIMIT)
                assert isinstance(refused, TopicMissingError)
                assert refused.stored == "no"
            await here.topic()

            assert await producer.publish([message(2)], LIMIT) == [Receipt("2")]
            await producer.close()
            with pytest.raises(TopicMissingError):
                await here.driver.producer(await here.driver.topic("never-made"))

    run(test)


def test_a_full_group_refuses_and_takes_again() -> None:
    """Beyond max_backlog publishing is TopicFullError, of unknown storage; what was confirmed is there, no more."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(max_backlog=5)
            consumer_group = await here.group()
            producer = await here.driver.producer(topic)
            outcomes = [(await producer.publish([message(n)], LIMIT))[0] for n in range(12)]
            stored = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Receipt)]
            refused = [outcome for outcome in outcomes if isinstance(outcome, TopicFullError)]

            assert 5 <= len(stored) <= 7
            assert len(stored) + len(refused) == 12
            assert {outcome.stored for outcome in refused} == {"unknown"}
            consumer = await here.join(consumer_group)
            deliveries = await take(consumer, len(stored))
            assert [int(delivery.message.id) for delivery in deliveries] == stored
            await end(consumer, deliveries)
            assert await producer.publish([message(99)], LIMIT) == [Receipt("99")]
            await consumer.close()
            await producer.close()

    run(test)


def test_what_is_too_large_is_refused_alone_and_the_connection_stands() -> None:
    """A body above the server's limit, or headers above a frame, are refused here; their neighbours are stored."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            limit = int(here.driver.capabilities.max_message_bytes.limit)
            large = RawMessage("l", bytes(limit + 1), None, (), 0)
            wide = RawMessage("w", b"", None, (("a", bytes(131072)),), 0)
            fits = RawMessage("f", b"", b"k" * 60_000, (("a", bytes(60_000)),), 0)
            kept = await producer.publish([message(0), wide, fits, message(1)], LIMIT)
            refused = await producer.publish([large], LIMIT)

            assert [type(outcome) for outcome in kept] == [Receipt, TooLargeError, Receipt, Receipt]
            assert [type(outcome) for outcome in refused] == [TooLargeError]
            await producer.close()

    run(test)


def test_batches_are_stored_in_the_order_of_the_calls() -> None:
    """As many calls as the pipeline allows keep their order."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic()
            consumer = await here.join(await here.group())
            producer = await here.driver.producer(topic)
            calls = [
                producer.publish([message(10 * call + n) for n in range(10)], LIMIT)
                for call in range(producer.pipeline)
            ]
            await asyncio.gather(*calls)
            deliveries = await take(consumer, 10 * producer.pipeline)

            assert [int(delivery.message.id) for delivery in deliveries] == list(range(10 * producer.pipeline))
            await end(consumer, deliveries)
            await consumer.close()
            await producer.close()

    run(test)


def test_a_lost_answer_is_unknown_and_a_refused_connection_is_not_handed_over() -> None:
    """Swallowed confirms are PublishUnknownError, and stored; without a connection a batch raises as a whole."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            topic = await here.topic()
            group = await here.group()
            producer = await here.driver.producer(topic)
            await producer.publish([message(0)], LIMIT)
            proxy.deaf = True
            (unknown,) = await producer.publish([message(1)], 1.0)
            assert type(unknown) is PublishUnknownError
            proxy.refuse = True
            publishing = asyncio.ensure_future(producer.publish([message(2)], LIMIT))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            proxy.cut()
            (lost,) = await publishing
            assert type(lost) is PublishUnknownError
            with pytest.raises(BrokerUnavailableError):
                await producer.publish([message(3)], LIMIT)
            proxy.deaf = proxy.refuse = False
            assert await producer.publish([message(4)], LIMIT) == [Receipt("4")]
            consumer = await here.join(group)
            numbers = [int(one.message.id) for one in await take(consumer, 3)]

            assert {0, 1, 4} <= set(numbers) <= {0, 1, 2, 4}
            await consumer.close()
            await producer.close()

    run(test)


def test_a_frozen_connection_is_noticed() -> None:
    """A black hole ends the connection within dead_peer_after, and the waiting message is of unknown outcome."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            producer = await here.driver.producer(await here.topic())
            proxy.freeze()
            started = time.monotonic()
            (unknown,) = await producer.publish([message(0)], LIMIT)

            assert type(unknown) is PublishUnknownError
            assert time.monotonic() - started < here.driver.capabilities.lease.dead_peer_after + LATE
            proxy.heal()
            async with asyncio.timeout(LIMIT):
                while True:
                    try:
                        assert await producer.publish([message(1)], LIMIT) == [Receipt("1")]
                        break
                    except BrokerUnavailableError:
                        await asyncio.sleep(0.05)  # as the portable layer backs off
            await producer.close()

    run(test)
