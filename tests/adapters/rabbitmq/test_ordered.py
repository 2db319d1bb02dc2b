"""Ordered groups on a real RabbitMQ: turns per key, sharing, handing over, counting."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.adapters.rabbitmq.support import (
    LATE,
    LIMIT,
    Opened,
    end,
    ids,
    message,
    opened,
    proxied,
    quiet,
    receive,
    run,
    settle,
    take,
)
from unistream.core.partitions import partition_for
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import GroupSpec, RawDelivery, RawMessage, Receipt, Verb
from unistream.errors import BrokerUnavailableError, LeaseLostError

pytestmark = pytest.mark.rabbitmq


def keyed(number: int, keys: int, partitions: int) -> RawMessage:
    """A message of one of some keys, in its key's partition."""
    key = b"key-%d" % (number % keys)
    return message(number, key=key, partition=partition_for(key, partitions))


def test_one_message_per_key_is_lent_and_other_keys_flow() -> None:
    """While a message waits after a nack, its key waits with it, in order, and others are lent."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(partitions=1, ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            producer = await here.driver.producer(topic)
            await producer.publish([keyed(number, 2, 1) for number in range(6)], LIMIT)
            first, second = await take(consumer, 2)
            await quiet(consumer)
            started = time.monotonic()
            await end(consumer, [first], Verb.NACK, 1.0)
            await end(consumer, [second])
            (third,) = await take(consumer, 1)
            await end(consumer, [third])
            (fourth,) = await take(consumer, 1)
            await end(consumer, [fourth])
            (again,) = await take(consumer, 1)

            assert 1.0 <= time.monotonic() - started < 1.0 + LATE
            assert ids([first, second, third, fourth, again]) == ["0", "1", "3", "5", "0"]
            assert (again.attempt, again.suspect) == (2, False)
            await end(consumer, [again])
            assert ids(await take(consumer, 1)) == ["2"]
            await consumer.close()
            await producer.close()

    run(test)


def test_attempts_and_delays_are_left_to_the_heir_and_a_clean_leave_costs_nothing() -> None:
    """The next owner knows attempts and due times; what was only fetched ahead has attempt 1, however often left."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(partitions=1, ordering="key")
            group = await here.group(ordering="key")
            producer = await here.driver.producer(topic)
            await producer.publish([keyed(number, 3, 1) for number in range(9)], LIMIT)
            for _ in range(3):
                consumer = await here.join(group)
                held = await take(consumer, 3)
                assert [(one.message.id, one.attempt, one.suspect) for one in held] == [
                    ("0", 1, False),
                    ("1", 1, False),
                    ("2", 1, False),
                ]
                await end(consumer, held, Verb.RELEASE)
                await consumer.close()
            consumer = await here.join(group)
            held = await take(consumer, 3)
            started = time.monotonic()
            await end(consumer, held[:1], Verb.NACK, 2.0)
            await end(consumer, held[1:2], Verb.NACK)
            await end(consumer, held[2:], Verb.RELEASE)
            await consumer.close()
            heir = await here.join(group)
            now = await take(heir, 2)
            (late,) = await take(heir, 1)

            assert {(one.message.id, one.attempt, one.suspect) for one in now} == {("1", 2, False), ("2", 1, False)}
            assert 2.0 <= time.monotonic() - started < 2.0 + LATE
            assert (late.message.id, late.attempt, late.suspect) == ("0", 2, False)
            await heir.close()
            await producer.close()

    run(test)


def test_order_by_key_stands_through_joins_leaves_nacks_and_cuts() -> None:
    """Members come, go, nack and lose connections at random: each key's acked messages stay in order, none lost."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)

    async def test() -> None:
        async with proxied() as (here, proxy), opened() as there:
            topic = await here.topic(partitions=4, ordering="key")
            group = await here.group(ordering="key")
            name, there.name = there.name, here.name
            acked: dict[bytes | None, list[int]] = {}
            done = asyncio.Event()
            total = 600

            async def member(of: Opened, life: int) -> None:
                consumer = await of.join(group, 20)
                try:
                    for _ in range(life):
                        await turn(consumer)
                finally:
                    await consumer.close()

            async def turn(consumer: ConsumerDriver) -> None:
                deliveries = await receive(consumer, dice.randint(1, 5), 0.1)
                nacks = [one for one in deliveries if dice.random() < 0.1]
                kept = [one for one in deliveries if one not in nacks]
                for one, outcome in zip(kept, await settle(consumer, kept), strict=True):
                    if outcome is None:
                        acked.setdefault(one.message.key, []).append(int(one.message.id))
                await settle(consumer, nacks, Verb.NACK)
                if len({number for numbers in acked.values() for number in numbers}) == total:
                    done.set()

            async def team(of: Opened) -> None:
                while not done.is_set():
                    try:
                        await member(of, dice.randint(20, 60))
                    except BrokerUnavailableError:
                        await asyncio.sleep(0.05)  # as the portable layer backs off

            async def chaos() -> None:
                while not done.is_set():
                    await asyncio.sleep(dice.uniform(0.5, 1.5))
                    proxy.cut()

            teams = [asyncio.create_task(team(of)) for of in (here, there, there)]
            spoiler = asyncio.create_task(chaos())
            producer = await there.driver.producer(topic)
            for start in range(0, total, 20):
                outcomes = await producer.publish([keyed(start + n, 12, 4) for n in range(20)], LIMIT)
                assert all(isinstance(outcome, Receipt) for outcome in outcomes)
            async with asyncio.timeout(60):
                await asyncio.gather(*teams)
            await spoiler
            await producer.close()
            there.name = name

            assert sorted({number for numbers in acked.values() for number in numbers}) == list(range(total))
            for numbers in acked.values():
                firsts = list(dict.fromkeys(numbers))
                assert firsts == sorted(firsts)

    run(test)


def test_members_share_the_partitions() -> None:
    """A member that joins later gets its share of the partitions without a loan being lost."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(partitions=4, ordering="key")
            group = await here.group(ordering="key")
            members = [await here.join(group)]
            producer = await here.driver.producer(topic)
            members.append(await here.join(group))
            number = 0
            got: list[set[int]] = [set(), set()]
            async with asyncio.timeout(LIMIT):
                while sorted(map(len, got)) != [2, 2]:
                    got = [set(), set()]
                    await producer.publish([message(number + n, key=b"%d" % n, partition=n) for n in range(4)], LIMIT)
                    number += 4
                    count = 0
                    while count < 4:
                        for at, consumer in enumerate(members):
                            deliveries = await receive(consumer, 10, 0.1)
                            got[at] |= {delivery.message.partition for delivery in deliveries}
                            count += len(deliveries)
                            await end(consumer, deliveries)

            assert here.ended == []
            assert got[0] | got[1] == {0, 1, 2, 3}
            for consumer in members:
                await consumer.close()
            await producer.close()

    run(test)


def test_a_lost_owner_leaves_suspects_that_are_lent_alone_in_order() -> None:
    """After a cut connection the first unsettled messages come again, one at a time, with the next attempt."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            topic = await here.topic(partitions=1, ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            producer = await here.driver.producer(topic)
            await producer.publish([keyed(number, 3, 1) for number in range(6)], LIMIT)
            held = await take(consumer, 3)
            proxy.cut()
            rest: list[RawDelivery] = []
            async with asyncio.timeout(LIMIT):
                while len(rest) < 6:
                    try:
                        deliveries = await receive(consumer, 10, 1.0)
                    except BrokerUnavailableError:
                        continue
                    assert len(deliveries) <= 1
                    rest += deliveries
                    await end(consumer, deliveries)

            assert sorted(here.ended) == sorted(delivery.token for delivery in held)
            assert all(isinstance(outcome, LeaseLostError) for outcome in await settle(consumer, held))
            assert ids(rest) == ["0", "1", "2", "3", "4", "5"]
            assert {(delivery.attempt, delivery.suspect) for delivery in rest} == {(2, True)}
            await consumer.close()

    run(test)


def test_an_ephemeral_ordered_group_keeps_order_through_a_nack() -> None:
    """An ephemeral member of an ordered topic gets each key in order, also after a nack."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(partitions=2, ordering="key")
            consumer = await here.join(GroupSpec(here.name, "e", "key", ephemeral=True))
            producer = await here.driver.producer(topic)
            await producer.publish([keyed(number, 1, 2) for number in range(3)], LIMIT)
            (first,) = await take(consumer, 1)
            await end(consumer, [first], Verb.NACK, 0.3)
            seen = []
            for _ in range(3):
                deliveries = await take(consumer, 1)
                seen += ids(deliveries)
                await end(consumer, deliveries)

            assert seen == ["0", "1", "2"]
            await consumer.close()
            await producer.close()

    run(test)


def test_a_shared_group_reads_an_ordered_topic() -> None:
    """A group without order on an ordered topic gets the messages of all partitions, with their partition."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(partitions=3, ordering="key")
            consumer = await here.join(await here.group())
            producer = await here.driver.producer(topic)
            batch = [message(number, partition=number) for number in range(3)]
            await producer.publish(batch, LIMIT)
            deliveries = await take(consumer, 3)
            assert [delivery.message for delivery in deliveries] == batch
            await end(consumer, deliveries[2:], Verb.NACK, 0.2)
            (again,) = await take(consumer, 1)

            assert again.message == batch[2]
            await consumer.close()
            await producer.close()

    run(test)
