"""Ordered groups on a real Kafka: one unsettled message per key, keys side by side, through nacks and rebalances."""

from __future__ import annotations

import asyncio

import pytest

from tests.adapters.kafka.support import LIMIT, end, ids, opened, quiet, receive, run, take
from unistream.core.partitions import partition_for
from unistream.driver.types import RawDelivery, Verb

pytestmark = pytest.mark.kafka


def test_keys_take_turns_and_other_keys_flow() -> None:
    """One message of a key is lent at a time; a nack with delay holds back its key and nothing else."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            for number in range(9):
                await here.publish(1, first=number, key=b"k%d" % (number % 3))
            first = await take(consumer, 3)
            await quiet(consumer)

            assert ids(first) == ["0", "1", "2"]
            await end(consumer, [first[0]], Verb.NACK, 1.0)
            await end(consumer, first[1:])
            second = await take(consumer, 2)
            assert ids(second) == ["4", "5"]
            await end(consumer, second)
            third = await take(consumer, 3)
            assert sorted(ids(third)) == ["0", "7", "8"]
            await end(consumer, third)
            for number in ("3", "6"):
                (delivery,) = await take(consumer, 1)
                assert (delivery.message.id, delivery.attempt) == (number, 1)
                await end(consumer, [delivery])
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_messages_without_a_key_never_wait() -> None:
    """A message with no key waits for nobody, one with an empty key for others with an empty key."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            await here.publish(3)
            await here.publish(2, first=3, key=b"")
            deliveries = await take(consumer, 4)
            await quiet(consumer)

            assert ids(deliveries) == ["0", "1", "2", "3"]
            await consumer.close()

    run(test)


def test_order_by_key_holds_through_nacks_releases_and_rebalances() -> None:
    """Two groups of members that come and go see every key in its order, and no key twice at a time."""

    async def test() -> None:
        async with opened() as here:
            partitions, keys, count = 4, 10, 400
            await here.topic(partitions=partitions, ordering="key")
            group = await here.group(ordering="key")
            numbers: dict[int, list[int]] = {}
            for number in range(count):
                numbers.setdefault(number % keys, []).append(number)
            for key, mine in numbers.items():
                name = b"key-%d" % key
                for number in mine[:20]:
                    await here.publish(1, first=number, key=name, partition=partition_for(name, partitions))
            done: dict[bytes, list[int]] = {}
            out: set[bytes] = set()

            async def work(rounds: int) -> None:
                consumer = await here.join(group)
                while rounds and sum(map(len, done.values())) < keys * 20:
                    rounds -= 1
                    for delivery in await receive(consumer, 7, 0.3):
                        key, number = delivery.message.key, int(delivery.message.id)
                        assert key is not None
                        assert key not in out, f"two unsettled messages of {key!r}"
                        out.add(key)
                        fate = (number * 7 + delivery.attempt) % 5
                        if fate == 0 and delivery.attempt < 3:
                            out.discard(key)
                            await end(consumer, [delivery], Verb.NACK, 0.05)
                        elif fate == 1 and delivery.attempt < 3:
                            out.discard(key)
                            await end(consumer, [delivery], Verb.NACK)
                        else:
                            out.discard(key)
                            done.setdefault(key, []).append(number)
                            await end(consumer, [delivery])
                await consumer.close()

            async with asyncio.timeout(3 * LIMIT):
                await asyncio.gather(work(1000), work(15), work(30))

            assert done == {b"key-%d" % key: mine[:20] for key, mine in numbers.items()}
            assert here.ended == []
            assert await here.driver.lag(here.name, "g") == (0, True)

    run(test)


def test_a_key_with_many_waiting_messages_does_not_stop_the_others() -> None:
    """Other keys of the partition come through behind hundreds of messages of a key that is held."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            await here.publish(600, key=b"slow")
            (held,) = await take(consumer, 1)
            await here.publish(1, first=600, key=b"quick")
            (passing,) = await take(consumer, 1)

            assert passing.message.id == "600"
            rest: list[RawDelivery] = [held]
            for _ in range(5):
                await end(consumer, [passing, rest[-1]] if len(rest) == 1 else [rest[-1]])
                rest += await take(consumer, 1)
            assert ids(rest) == [str(number) for number in range(6)]
            await consumer.close()

    run(test)


def test_the_order_of_a_key_survives_the_member() -> None:
    """The next owner begins with the first unsettled message of each key; later ones of it wait."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(ordering="key")
            group = await here.group(ordering="key")
            one = await here.join(group)
            for number in range(6):
                await here.publish(1, first=number, key=b"k%d" % (number % 2))
            first, second = await take(one, 2)
            await end(one, [second])
            (third,) = await take(one, 1)
            assert third.message.id == "3"
            await end(one, [first], Verb.RELEASE)
            await one.close()
            two = await here.join(group)
            seen = []
            while len(seen) < 5:
                deliveries = await take(two, 1)
                seen += ids(deliveries)
                await end(two, deliveries)

            assert [number for number in seen if int(number) % 2 == 0] == ["0", "2", "4"]
            assert [number for number in seen if int(number) % 2] == ["3", "5"]
            await two.close()

    run(test)


def test_a_partition_full_of_waiting_messages_opens_again() -> None:
    """A backlog of one key far beyond what a member holds comes through in order, and nothing stands still."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            await here.publish(1200, key=b"one")
            (first,) = await take(consumer, 1)
            await quiet(consumer)
            await here.publish(1100, first=1200)
            await end(consumer, [first])
            seen = [0]
            async with asyncio.timeout(3 * LIMIT):
                while len(seen) < 2300:
                    deliveries = await receive(consumer, 100, 5.0)
                    assert deliveries, "nothing comes any more"
                    seen += [int(number) for number in ids(deliveries)]
                    await end(consumer, deliveries)

            assert [number for number in seen if number < 1200] == list(range(1200))
            assert sorted(seen) == list(range(2300))
            await consumer.close()

    run(test)
