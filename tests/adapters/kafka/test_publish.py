"""Publishing on a real Kafka: what lies there afterwards, and what the three outcomes mean."""

from __future__ import annotations

import asyncio

import pytest

from tests.adapters.kafka.support import LIMIT, end, ids, message, opened, proxied, receive, run, take
from unistream.driver.contract import ProducerDriver
from unistream.driver.types import RawMessage, Receipt
from unistream.errors import BrokerUnavailableError, PublishUnknownError, TooLargeError, TopicMissingError

pytestmark = pytest.mark.kafka

WEIRD = ((" name\r\n", b"\x00\xff"), ("same", b"1"), ("same", b"2"), ("Same", b""), ("", b"no name"), ("ü", b" x "))


def test_key_headers_and_body_lie_in_kafka_as_they_are() -> None:
    """A bare client sees body, key and headers natively, in order, with duplicates, and reserved headers after them."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic(partitions=2))
            batch = [
                RawMessage("one", b"body\x00\xff", b"key\xfe", WEIRD, 1),
                RawMessage("two", b"", None, (), 1),
                RawMessage("three", b"x", b"", (), 0),
            ]
            assert await producer.publish(batch, LIMIT) == [
                Receipt("one", "1/0"),
                Receipt("two", "1/1"),
                Receipt("three", "0/0"),
            ]
            third, first, second = await here.stored(2)

            assert (first.value, first.key, first.partition) == (b"body\x00\xff", b"key\xfe", 1)
            assert first.headers == [*WEIRD, ("unistream-id", b"one"), ("unistream-v", b"1")]
            assert (second.value, second.key) == (b"", None)
            assert (third.value, third.key, third.partition) == (b"x", b"", 0)
            await producer.close()

    run(test)


def test_what_is_published_arrives_unchanged() -> None:
    """Body, key, headers and id come out as they went in, with the broker's time and the receipt's position."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic()
            consumer = await here.join(await here.group())
            producer = await here.driver.producer(topic)
            batch = [
                RawMessage("a", b"\x00" * 1000, b"\xff", WEIRD, 0),
                RawMessage("b", b"", None, (), 0),
                RawMessage("c", b"", b"", (("only", b""),), 0),
            ]
            receipts = await producer.publish(batch, LIMIT)
            deliveries = await take(consumer, 3)

            assert [delivery.message for delivery in deliveries] == batch
            assert [Receipt(delivery.message.id, delivery.position) for delivery in deliveries] == receipts
            assert all(delivery.published_at and delivery.published_at > 1.6e9 for delivery in deliveries)
            await end(consumer, deliveries)
            await consumer.close()
            await producer.close()

    run(test)


def test_foreign_messages_are_consumable() -> None:
    """Messages of a bare client come with their key and headers and no id; tombstones have an empty body."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.foreign(b"plain")
            await here.foreign(b"rich", key=b"k", headers=[("a", b"1"), ("a", b"2")])
            plain, rich = await take(consumer, 2)

            assert plain.message == RawMessage("", b"plain", None, (), 0)
            assert rich.message == RawMessage("", b"rich", b"k", (("a", b"1"), ("a", b"2")), 0)
            assert (plain.position, rich.position) == ("0/0", "0/1")
            await end(consumer, [plain, rich])
            await consumer.close()

    run(test)


def test_batches_are_stored_in_the_order_of_the_calls() -> None:
    """As many calls as the pipeline allows keep their order in every partition."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic(partitions=2))
            calls = [
                producer.publish([message(10 * call + n, partition=n % 2) for n in range(10)], LIMIT)
                for call in range(producer.pipeline)
            ]
            await asyncio.gather(*calls)
            stored = await here.stored(2)

            for partition in range(2):
                numbers = [int(one.value) for one in stored if one.partition == partition]
                assert numbers == sorted(numbers)
                assert len(numbers) == 5 * producer.pipeline
            await producer.close()

    run(test)


def test_a_message_beyond_the_limit_is_refused_alone() -> None:
    """The largest message is stored, a larger one surely not, and its neighbours are."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            limit = int(here.driver.capabilities.max_message_bytes.limit)
            sizes = (1, limit, 2 * limit, 1)
            outcomes = []
            for size in sizes:
                outcomes += await producer.publish([RawMessage("x", b"v" * size, None, (), 0)], LIMIT)

            assert [type(outcome) for outcome in outcomes] == [Receipt, Receipt, TooLargeError, Receipt]
            assert outcomes[2].stored == "no"  # type: ignore[union-attr]
            assert [len(one.value) for one in await here.stored()] == [1, limit, 1]
            await producer.close()

    run(test)


def test_the_limit_of_the_topic_counts_too() -> None:
    """A topic that takes less than the cluster refuses what is too large for it, and nothing waits behind."""

    async def test() -> None:
        async with opened() as here:
            configs = {"max.message.bytes": "2000"}
            await asyncio.to_thread(
                here.driver.native.create_topics, {here.name: {"num_partitions": 1, "configs": configs}}
            )
            producer = await here.driver.producer(await here.driver.topic(here.name))
            large = RawMessage("l", b"v" * 3000, None, (), 0)
            outcomes = await producer.publish([message(0), large, message(1)], LIMIT)

            assert [type(outcome) for outcome in outcomes] == [Receipt, TooLargeError, Receipt]
            assert [one.value for one in await here.stored()] == [b"0", b"1"]
            await producer.close()

    run(test)


def test_a_topic_deleted_under_a_producer_is_missing() -> None:
    """Publishing to a topic that was deleted meanwhile says so within seconds, and again at the next message."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            await producer.publish([message(0)], LIMIT)
            await here.driver.delete_topic(here.name)
            for _ in range(2):
                with pytest.raises(TopicMissingError):
                    await producer.publish([message(1)], LIMIT)
            await here.topic()
            async with asyncio.timeout(LIMIT):
                while True:
                    try:
                        outcomes = await producer.publish([message(2)], LIMIT)
                    except (BrokerUnavailableError, TopicMissingError):
                        continue
                    break

            assert outcomes == [Receipt("2", "0/0")]
            await producer.close()

    run(test)


def test_a_cut_connection_stores_each_message_once() -> None:
    """Connections cut in the middle are mended by the client: all confirmed, in order, none twice."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            producer = await here.driver.producer(await here.topic())
            for number in range(0, 200, 20):
                publishing = asyncio.create_task(
                    asyncio.wait_for(producer.publish([message(number + n) for n in range(20)], LIMIT), LIMIT)  # type: ignore[arg-type]
                )
                await asyncio.sleep(0)
                proxy.cut()
                assert all(isinstance(outcome, Receipt) for outcome in await publishing)

            assert [int(one.value) for one in await here.stored()] == list(range(200))
            await producer.close()

    run(test)


def test_a_lost_answer_is_unknown_and_stored_once() -> None:
    """When Kafka's answers are swallowed the outcome is unknown; the message is there, once, and later ones work."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            producer = await here.driver.producer(await here.topic())
            await producer.publish([message(0)], LIMIT)
            proxy.deaf = True
            outcomes = await producer.publish([message(1)], 1.0)
            proxy.deaf = False

            assert [type(outcome) for outcome in outcomes] == [PublishUnknownError]
            assert await producer.publish([message(2)], LIMIT) == [Receipt("2", "0/2")]
            assert [int(one.value) for one in await here.stored()] == [0, 1, 2]
            await producer.close()

    run(test)


def test_without_a_connection_nothing_is_handed_over() -> None:
    """While Kafka can't be reached publishing raises, for all calls under way, and nothing of it is stored."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            producer = await here.driver.producer(await here.topic())
            await producer.publish([message(0)], LIMIT)
            proxy.refuse = True
            proxy.cut()
            await proxy.drained()
            with pytest.raises(BrokerUnavailableError):
                await unknowns(producer)
            calls = await asyncio.gather(
                *(producer.publish([message(number)], LIMIT) for number in range(2, 4)), return_exceptions=True
            )

            assert [type(outcome) for outcome in calls] == [BrokerUnavailableError] * 2
            proxy.refuse = False
            (receipt,) = await producer.publish([message(4)], LIMIT)
            assert isinstance(receipt, Receipt)
            assert {int(one.value) for one in await here.stored()} - {1} == {0, 4}
            await producer.close()

    run(test)


async def unknowns(producer: ProducerDriver) -> None:
    """Publish until the client has noticed: what is handed over before is of unknown outcome."""
    while True:
        answer = producer.publish([message(1)], 3.0)
        (outcome,) = answer if isinstance(answer, list) else await answer
        assert isinstance(outcome, PublishUnknownError)


def test_a_cancelled_publish_does_not_disturb_others() -> None:
    """The calls beside a cancelled one get their own receipts."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            calls = [asyncio.ensure_future(producer.publish([message(n)], LIMIT)) for n in range(2)]  # type: ignore[arg-type]
            await asyncio.sleep(0)
            calls[0].cancel()
            await asyncio.wait(calls)
            stored = [int(one.value) for one in await here.stored()]

            assert calls[0].cancelled()
            assert calls[1].result() == [Receipt("1", f"0/{stored.index(1)}")]
            await producer.close()

    run(test)


def test_a_consumer_settles_while_a_producer_is_full() -> None:
    """Outstanding publishes do not hold up a settle of the same driver."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            deliveries = await take(consumer, 1)
            producer = await here.driver.producer(await here.driver.topic(here.name))
            calls = [asyncio.ensure_future(producer.publish([message(n)] * 256, LIMIT)) for n in range(2)]  # type: ignore[arg-type]
            await end(consumer, deliveries)
            await asyncio.wait(calls)
            assert await receive(consumer, 1, LIMIT)
            assert ids(deliveries) == ["0"]
            await consumer.close()
            await producer.close()

    run(test)
