"""Ordered groups on a real NATS: one message of a partition at a time, whatever becomes of it."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.adapters.nats.support import Opened, end, ids, opened, quiet, run, take
from tests.adapters.support import LATE
from unistream.core.partitions import partition_for
from unistream.driver.types import GroupSpec, RawMessage, Settlement, TopicSpec, Verb

pytestmark = pytest.mark.nats


async def keyed(here: Opened, count: int, keys: int, partitions: int) -> None:
    """Publish messages over keys in turn; the body is `key:number`, rising within the key."""
    producer = await here.produce()
    batch = []
    for number in range(count):
        key = b"k%d" % (number % keys)
        body = b"%d:%d" % (number % keys, number // keys)
        batch.append(RawMessage(body.decode(), body, key, (), partition_for(key, partitions)))
    for begin in range(0, count, producer.batch_messages):
        await producer.publish(batch[begin : begin + producer.batch_messages], 10.0)
    await producer.close()


def out_of_order(seen: list[str]) -> list[str]:
    """Messages that came before an earlier one of their key had been acked."""
    last: dict[str, int] = {}
    wrong = []
    for identity in seen:
        key, number = identity.split(":")
        if int(number) != last.get(key, -1) + 1:
            wrong.append(identity)
        last[key] = int(number)
    return wrong


def test_one_message_of_a_partition_is_lent_at_a_time() -> None:
    """Members get at most one message of each partition, and its next one only after the ack."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2, ordering="key")
            group = await here.group(ordering="key")
            one, two = await here.join(group), await here.join(group)
            await here.publish(3, key=b"a", partition=0)
            await here.publish(3, first=10, key=b"b", partition=1)
            first = await take(one, 2)
            await quiet(two)
            assert sorted(ids(first)) == ["0", "10"]
            assert [delivery.message.partition for delivery in first] == [int(one) // 10 for one in ids(first)]
            await end(one, first)
            second = await take(two, 2)

            assert sorted(ids(second)) == ["1", "11"]
            assert await here.driver.lag(here.name, "g") == (4, True)
            await one.close()
            await two.close()

    run(test)


def test_a_nack_holds_its_partition_back_and_no_other() -> None:
    """While a nacked message waits for its delay, its partition rests, others flow, and it comes before the next."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2, ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            await here.publish(2, key=b"a", partition=0)
            (nacked,) = await take(consumer, 1)
            started = time.monotonic()
            await end(consumer, [nacked], Verb.NACK, 1.2)
            await here.publish(3, first=10, key=b"b", partition=1)
            others = []
            for _ in range(3):
                deliveries = await take(consumer, 1)
                others += ids(deliveries)
                await end(consumer, deliveries)
            flowed = time.monotonic() - started
            (again,) = await take(consumer, 1)
            assert flowed < 1.2 <= time.monotonic() - started < 1.2 + LATE
            assert others == ["10", "11", "12"]
            assert (again.message.id, again.attempt, again.suspect) == ("0", 2, False)
            await end(consumer, [again])

            assert ids(await take(consumer, 1)) == ["1"]
            await consumer.close()

    run(test)


def test_messages_without_a_key_hold_back_nothing() -> None:
    """In an ordered topic messages without a key are lent at once, many at a time, beside a blocked partition."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2, ordering="key")
            group = await here.group(ordering="key")
            consumer = await here.join(group)
            await here.publish(2, key=b"a", partition=0)
            (held,) = await take(consumer, 1)
            await here.publish(10, first=10, partition=0)
            free = await take(consumer, 10)
            assert ids(free) == [str(number) for number in range(10, 20)]
            assert {delivery.message.partition for delivery in free} == {0}
            await end(consumer, [held, *free])

            assert ids(await take(consumer, 1)) == ["1"]
            await consumer.close()

    run(test)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_small_window_reaches_every_partition(window: int) -> None:
    """A member that may hold fewer messages than there are partitions still works through all of them."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=8, ordering="key")
            consumer = await here.join(await here.group(ordering="key"), window)
            await keyed(here, 80, 20, 8)
            seen: list[str] = []
            async with asyncio.timeout(30):
                while len(seen) < 80:
                    deliveries = await consumer.receive(window, 0.2)
                    assert len(deliveries) <= window
                    await end(consumer, deliveries)
                    seen += ids(deliveries)

            assert out_of_order(seen) == []
            await consumer.close()

    run(test)


def test_order_holds_through_nacks_and_a_member_that_dies() -> None:
    """Three members nack at random (seed printed) and one falls silent: every key's acks are in publish order."""
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=4, ordering="key")
            group = await here.group(ordering="key", lease=1.0)
            members = [await here.join(group) for _ in range(3)]
            await keyed(here, 300, 12, 4)
            seen: list[str] = []
            # It takes what it gets and is never heard of again.
            silent = await members[2].receive(4, 0.2)
            assert silent

            async def work(number: int) -> None:
                consumer = members[number]
                while len(seen) < 300:
                    deliveries = await consumer.receive(8, 0.2)
                    for delivery in deliveries:
                        verb = Verb.NACK if chance.random() < 0.2 else Verb.ACK
                        [refused] = await consumer.settle([Settlement(delivery.token, verb)])
                        if verb is Verb.ACK and refused is None:
                            seen.append(delivery.message.id)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(work(0))
                tasks.create_task(work(1))

            assert out_of_order(seen) == []
            assert len(seen) == 300
            assert await here.driver.lag(here.name, "g") == (0, True)
            for consumer in members:
                await consumer.close()

    run(test)


def test_a_shared_group_on_an_ordered_topic_gets_everything() -> None:
    """A group without order gets keyed and other messages of an ordered topic, with their partitions."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=4, ordering="key")
            consumer = await here.join(await here.group())
            await here.publish(2, key=b"a", partition=3)
            await here.publish(2, first=2, partition=1)
            deliveries = await take(consumer, 4)

            assert [delivery.message.partition for delivery in deliveries] == [3, 3, 1, 1]
            await end(consumer, deliveries)
            await consumer.close()

    run(test)


def test_an_ordered_group_is_one_group() -> None:
    """It is listed, created again and deleted as one, whatever consumers it has at the server."""

    async def test() -> None:
        async with opened() as here:
            await here.driver.create_topic(TopicSpec(here.name, 3, "key"))
            spec = GroupSpec(here.name, "g.1", "key", "latest", 5.0, 50.0)
            other = GroupSpec(here.name, "g", "none")
            assert await here.driver.create_group(spec) == spec
            assert await here.driver.create_group(GroupSpec(here.name, "g.1")) == spec
            await here.driver.create_group(other)
            assert await here.driver.groups(here.name) == [other, spec]
            await here.driver.delete_group(here.name, "g.1")
            await here.driver.delete_group(here.name, "g.1")

            assert await here.driver.groups(here.name) == [other]
            assert len((await here.api(f"CONSUMER.LIST.{here.stream}"))["consumers"]) == 1

    run(test)


def test_an_ephemeral_ordered_group_sees_what_comes() -> None:
    """An ephemeral group of an ordered topic gets keyed messages in order and leaves nothing."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2, ordering="key")
            consumer = await here.join(GroupSpec(here.name, "x", "key", ephemeral=True))
            await here.publish(2, key=b"a", partition=1)
            await here.publish(1, first=2)
            seen: list[str] = []
            while len(seen) < 3:
                deliveries = await take(consumer, 1)
                seen += ids(deliveries)
                await end(consumer, deliveries)
            await consumer.close()

            assert [one for one in seen if one != "2"] == ["0", "1"]
            assert (await here.api(f"CONSUMER.LIST.{here.stream}"))["consumers"] in (None, [])

    run(test)
