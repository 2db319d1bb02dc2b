"""Publishing to a real Redis: confirms, refusals, unknown outcomes, bounded backlogs, retention."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.adapters.redis.support import LIMIT, Opened, end, ids, message, opened, proxied, quiet, run, take
from unistream.driver.contract import ProducerDriver
from unistream.driver.types import PublishOutcome, Receipt, Retention, Verb
from unistream.errors import (
    BrokerUnavailableError,
    NotPublishedError,
    PublishUnknownError,
    TooLargeError,
    TopicFullError,
    TopicMissingError,
    UnsupportedError,
)

pytestmark = pytest.mark.redis


async def publish(producer: ProducerDriver, first: int, count: int, timeout: float = LIMIT) -> list[PublishOutcome]:
    """Publish one batch of numbered messages."""
    return await producer.publish([message(number) for number in range(first, first + count)], timeout)


async def bodies(here: Opened) -> list[bytes]:
    """What lies in the topic's stream, seen from outside."""
    entries = await here.redis.xrange(f"us:{{{here.name}}}:stream")
    return [fields[b"value"] for _, fields in entries]


def test_batches_are_stored_in_the_order_of_the_calls() -> None:
    """Two outstanding batches, over and over, lie in the stream in the order of the calls, with rising positions."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            positions = []
            for first in range(0, 2000, 100):
                one, two = await asyncio.gather(publish(producer, first, 50), publish(producer, first + 50, 50))
                positions += [outcome.position for outcome in [*one, *two] if isinstance(outcome, Receipt)]
            stored = await here.redis.xrange(f"us:{{{here.name}}}:stream")

            assert await bodies(here) == [str(number).encode() for number in range(2000)]
            assert positions == [identity.decode() for identity, _ in stored]
            await producer.close()

    run(test)


def test_a_missing_topic_is_refused() -> None:
    """Publishing to a topic that was deleted is TopicMissingError, surely not stored, and makes no stream."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            await here.driver.delete_topic(here.name)
            outcomes = await publish(producer, 0, 2)

            assert all(isinstance(outcome, TopicMissingError) and outcome.stored == "no" for outcome in outcomes)
            assert not await here.redis.exists(f"us:{{{here.name}}}:stream")
            with pytest.raises(TopicMissingError):
                await here.driver.producer(await here.driver.topic(here.name))
            await producer.close()

    run(test)


def test_what_was_sent_and_not_answered_is_unknown() -> None:
    """When the connection is cut before the answer, or no answer comes in time, every message is unknown."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            producer = await here.driver.producer(await here.topic())
            proxy.deaf = True
            late = await publish(producer, 0, 3, timeout=0.3)
            cut = await publish(producer, 3, 3)
            proxy.deaf = False
            after = await publish(producer, 6, 3)

            assert all(isinstance(outcome, PublishUnknownError) for outcome in [*late, *cut])
            assert all(isinstance(outcome, Receipt) for outcome in after)
            assert await bodies(here) == [str(number).encode() for number in range(9)]
            await producer.close()

    run(test)


def test_without_a_connection_nothing_is_handed_over_and_the_order_holds() -> None:
    """While Redis refuses connections every outstanding batch raises, also the one that could have gone through."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            producer = await here.driver.producer(await here.topic())
            proxy.refuse = True
            proxy.cut()
            await asyncio.sleep(0.05)
            one = asyncio.create_task(publish(producer, 0, 2))
            two = asyncio.create_task(publish(producer, 2, 2))
            with pytest.raises(BrokerUnavailableError):
                await one
            proxy.refuse = False
            with pytest.raises(BrokerUnavailableError):
                await two
            assert await bodies(here) == []
            await publish(producer, 0, 2)
            await publish(producer, 2, 2)

            assert await bodies(here) == [b"0", b"1", b"2", b"3"]
            await producer.close()

    run(test)


def test_a_cancelled_publish_shifts_no_other_receipt() -> None:
    """Cancelling one of two outstanding batches leaves the other its own receipts."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            one = asyncio.create_task(publish(producer, 0, 50))
            two = asyncio.create_task(publish(producer, 50, 50))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            one.cancel()
            receipts = await two
            entries = {
                identity.decode(): fields for identity, fields in await here.redis.xrange(f"us:{{{here.name}}}:stream")
            }

            assert [
                entries[outcome.position][b"value"]
                for outcome in receipts
                if isinstance(outcome, Receipt) and outcome.position
            ] == [str(number).encode() for number in range(50, 100)]
            await producer.close()

    run(test)


def test_a_message_that_is_too_large_is_refused_alone() -> None:
    """Beyond proto-max-bulk-len a message is TooLargeError before it is sent; its neighbours are stored."""

    async def test() -> None:
        async with opened() as here:
            await here.redis.config_set("proto-max-bulk-len", 1024 * 1024)
            try:
                async with opened() as small:
                    producer = await small.driver.producer(await small.topic())
                    outcomes = await producer.publish([message(0)._replace(value=bytes(1024 * 1024 + 1))], LIMIT)
                    many = (("a", bytes(512 * 1024)),) * 3
                    mixed = await producer.publish([message(1), message(2)._replace(headers=many), message(3)], LIMIT)

                    assert isinstance(outcomes[0], TooLargeError)
                    assert [isinstance(outcome, TooLargeError) for outcome in mixed] == [False, True, False]
                    assert await bodies(small) == [b"1", b"3"]
                    assert small.driver.capabilities.max_message_bytes.limit == 1024 * 1024
                    await producer.close()
            finally:
                await here.redis.config_set("proto-max-bulk-len", 512 * 1024 * 1024)

    run(test)


def test_a_redis_without_memory_refuses_and_lets_consumers_drain() -> None:
    """At maxmemory messages are refused, surely not stored, while settling goes on."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic())
            consumer = await here.join(await here.group())
            await publish(producer, 0, 2)
            deliveries = await take(consumer, 2)
            await here.redis.config_set("maxmemory", 1)
            try:
                outcomes = await publish(producer, 2, 2)
                assert all(
                    isinstance(outcome, NotPublishedError) and outcome.retryable and outcome.stored == "no"
                    for outcome in outcomes
                )
                await end(consumer, deliveries)
            finally:
                await here.redis.config_set("maxmemory", 0)

            assert (await here.driver.lag(here.name, "g")).messages == 0
            assert isinstance((await publish(producer, 2, 1))[0], Receipt)
            await consumer.close()
            await producer.close()

    run(test)


def test_a_full_topic_refuses_until_its_slowest_group_settles() -> None:
    """With reject, max_backlog messages are unsettled by the slowest group; a topic without groups is free."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic(max_backlog=10))
            assert all(isinstance(outcome, Receipt) for outcome in await publish(producer, 0, 20))
            slow, fast = await here.join(await here.group("slow")), await here.join(await here.group("fast"))
            outcomes = await publish(producer, 100, 15)
            assert [isinstance(outcome, Receipt) for outcome in outcomes] == [True] * 10 + [False] * 5
            assert all(isinstance(outcome, TopicFullError) and outcome.stored == "no" for outcome in outcomes[10:])
            await end(fast, await take(fast, 10))
            assert isinstance((await publish(producer, 110, 1))[0], TopicFullError)
            deliveries = await take(slow, 10)
            assert isinstance((await publish(producer, 110, 1))[0], TopicFullError)
            await end(slow, deliveries[:3])
            outcomes = await publish(producer, 110, 5)

            assert [isinstance(outcome, Receipt) for outcome in outcomes] == [True] * 3 + [False] * 2
            assert ids(await take(fast, 3)) == ["110", "111", "112"]
            assert ids(await take(slow, 3)) == ["110", "111", "112"]
            for part in (slow, fast):
                await part.close()
            await producer.close()

    run(test)


def test_drop_oldest_drops_the_oldest_and_counts_them() -> None:
    """With drop_oldest the newest max_backlog messages stay, and each group is told how many it lost."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic(max_backlog=10, overflow="drop_oldest"))
            group = await here.group(lease=1.0)
            outcomes = await publish(producer, 0, 25)
            assert all(isinstance(outcome, Receipt) for outcome in outcomes)
            assert (await here.driver.lag(here.name, "g")).messages == 10
            consumer = await here.join(group)
            deliveries = await take(consumer, 10)

            assert ids(deliveries) == [str(number) for number in range(15, 25)]
            assert here.lost == 15
            await end(consumer, deliveries)
            await consumer.close()
            await producer.close()

    run(test)


def test_drop_oldest_leaves_a_loan_to_its_member() -> None:
    """A dropped message that a member holds can still be acked; given back instead, it counts as lost."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic(max_backlog=4, overflow="drop_oldest"))
            consumer = await here.join(await here.group())
            await publish(producer, 0, 2)
            first, second = await take(consumer, 2)
            await publish(producer, 2, 8)
            await end(consumer, [first])
            await end(consumer, [second], Verb.NACK)
            deliveries = await take(consumer, 4)
            await end(consumer, deliveries)
            await quiet(consumer)

            assert ids(deliveries) == ["6", "7", "8", "9"]
            assert here.lost == 5
            await consumer.close()
            await producer.close()

    run(test)


def test_retention_removes_and_reports() -> None:
    """A declared max_messages removes what no group has read, and the group is told how many."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(retention=Retention(max_messages=10))
            group = await here.group()
            producer = await here.driver.producer(topic)
            await publish(producer, 0, 25)
            consumer = await here.join(group)
            deliveries = await take(consumer, 10)

            assert ids(deliveries) == [str(number) for number in range(15, 25)]
            assert here.lost == 15
            await end(consumer, deliveries)
            assert (await here.driver.lag(here.name, "g")).messages == 0
            await consumer.close()
            await producer.close()

    run(test)


def test_retention_by_age_removes_what_is_old() -> None:
    """A declared max_age removes what is older, though nobody read it, and keeps what is younger."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(retention=Retention(max_age=1.0))
            group = await here.group()
            producer = await here.driver.producer(topic)
            await publish(producer, 0, 5)
            await asyncio.sleep(1.1)
            await publish(producer, 5, 3)
            consumer = await here.join(group)
            deliveries = await take(consumer, 3)

            assert ids(deliveries) == ["5", "6", "7"]
            assert here.lost == 5
            await consumer.close()
            await producer.close()

    run(test)


def test_data_removed_by_others_is_reported() -> None:
    """Messages that a foreign program trims or deletes under a group are a DataLoss event with their number."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group(lease=0.4))
            stream = f"us:{{{here.name}}}:stream"
            await here.publish(4)
            read = await take(consumer, 4)
            await here.redis.xdel(stream, read[0].position, read[1].position)
            await end(consumer, read[:2], Verb.NACK)
            await end(consumer, read[2:])
            await quiet(consumer)
            assert here.lost == 2
            await consumer.close()
            await here.publish(20, first=4)
            await here.redis.xtrim(stream, maxlen=5, approximate=False)
            consumer = await here.join((await here.driver.groups(here.name))[0])
            deliveries = await take(consumer, 5)

            assert ids(deliveries) == [str(number) for number in range(19, 24)]
            assert here.lost == 17
            await consumer.close()

    run(test)


def test_settled_messages_are_trimmed_and_unsettled_ones_never() -> None:
    """What every group settled is removed in time; what one group still holds, or never read, stays."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group("quick", lease=6.0))
            await here.group("slow")
            await here.publish(3000)
            deliveries = await take(consumer, 3000)
            await end(consumer, deliveries[:10] + deliveries[11:])
            stream = f"us:{{{here.name}}}:stream"
            assert await consumer.extend([deliveries[10].token], 60.0) == [None]
            for _ in range(5):
                assert await consumer.receive(1, 0.3) == []
            assert await here.redis.xlen(stream) == 3000
            await here.driver.delete_group(here.name, "slow")
            await end(consumer, deliveries[10:11])
            async with asyncio.timeout(10):
                while await here.redis.xlen(stream) > 300:
                    assert await consumer.receive(1, 0.3) == []

            assert here.lost == 0
            assert (await here.driver.lag(here.name, "quick")).messages == 0
            await consumer.close()

    run(test)


def test_a_retention_that_redis_cannot_keep_is_refused() -> None:
    """max_bytes is not offered: the topic is not made."""

    async def test() -> None:
        async with opened() as here:
            with pytest.raises(UnsupportedError) as raised:
                await here.topic(retention=Retention(max_bytes=1000))

            assert raised.value.capability == "retention"
            with pytest.raises(TopicMissingError):
                await here.driver.topic(here.name)

    run(test)


def test_ordered_topics_bound_their_whole_backlog() -> None:
    """max_backlog counts all partitions of a topic together."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(partitions=2, ordering="key", max_backlog=5)
            await here.group()
            producer = await here.driver.producer(replace(topic))
            batch = [message(number, key=b"k", partition=number % 2) for number in range(8)]
            outcomes = await producer.publish(batch, LIMIT)

            assert [isinstance(outcome, Receipt) for outcome in outcomes] == [True] * 5 + [False] * 3
            assert (await here.driver.lag(here.name, "g")).messages == 5
            await producer.close()

    run(test)


def test_flushed_scripts_are_brought_back() -> None:
    """After SCRIPT FLUSH a bounded topic refuses one batch as unsent, then goes on; settling does not notice."""

    async def test() -> None:
        async with opened() as here:
            producer = await here.driver.producer(await here.topic(max_backlog=100))
            consumer = await here.join(await here.group())
            await publish(producer, 0, 1)
            await here.redis.script_flush()
            with pytest.raises(BrokerUnavailableError):
                await publish(producer, 1, 1)
            await publish(producer, 1, 1)
            deliveries = await take(consumer, 2)
            await here.redis.script_flush()
            await end(consumer, deliveries)

            assert ids(deliveries) == ["0", "1"]
            await consumer.close()
            await producer.close()

    run(test)


@pytest.mark.parametrize("how", ["max_age", "max_messages", "drop_oldest"])
def test_losses_are_counted_also_after_redis_forgot_what_was_read(how: str) -> None:
    """In a new run of the server the groups' counters are not trusted; what is removed is still counted, no more."""

    async def test() -> None:
        settings = {
            "max_age": {"retention": Retention(max_age=1.0)},
            "max_messages": {"retention": Retention(max_messages=10)},
            "drop_oldest": {"max_backlog": 10, "overflow": "drop_oldest"},
        }[how]
        async with opened() as here:
            topic = await here.topic(**settings)
            group = await here.group(lease=0.4)
            stream = f"us:{{{here.name}}}:stream"
            producer = await here.driver.producer(topic)
            consumer = await here.join(group)
            await publish(producer, 0, 6)
            await end(consumer, await take(consumer, 4))
            await consumer.close()
            place = (await here.redis.xinfo_groups(stream))[0]["last-delivered-id"]
            version = (await here.redis.info("server"))["redis_version"]
            if tuple(map(int, version.split("."))) < (8, 2):
                # What a restart of 7.0 leaves: a counter that is too low, from another run.
                await here.redis.execute_command("XGROUP", "SETID", stream, "g", place, "ENTRIESREAD", 0)
                await here.redis.set(f"us:{{{here.name}}}:run", "another")
            else:
                await here.redis.execute_command("XGROUP", "SETID", stream, "g", place)
            await asyncio.sleep(1.1)  # retention by age, and retention runs once a second
            await publish(producer, 6, 10)
            consumer = await here.join(group)
            deliveries = await take(consumer, 10)
            await end(consumer, deliveries)
            await quiet(consumer)

            assert ids(deliveries) == [str(number) for number in range(6, 16)]
            assert here.lost == 2
            assert await here.driver.lag(here.name, "g") == (0, True)
            await consumer.close()
            await producer.close()

    run(test)
