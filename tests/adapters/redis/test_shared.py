"""Shared groups on a real Redis: lending, settling, fencing, recovery."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.adapters.redis.support import end, ids, opened, proxied, quiet, run, take
from tests.adapters.support import LATE
from unistream.driver.types import DataLoss, GroupSpec, Settlement, Verb
from unistream.errors import (
    BrokerUnavailableError,
    ClosedError,
    GroupMissingError,
    LeaseLostError,
    TopicMissingError,
)
from unistream_redis.keys import TopicKeys

pytestmark = pytest.mark.redis


def test_every_group_gets_every_message_once() -> None:
    """Two groups each get all messages, spread over their members, and nothing comes twice."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            first, second = await here.group("a"), await here.group("b")
            one, two, other = await here.join(first), await here.join(first), await here.join(second)
            await here.publish(20)
            mine, theirs = await take(one, 8, 4), await take(two, 12, 4)
            all_of_them = await take(other, 20)
            for consumer, deliveries in ((one, mine), (two, theirs), (other, all_of_them)):
                await end(consumer, deliveries)
                await quiet(consumer)

                assert (await here.driver.lag(here.name, "a")).exact
            assert sorted(ids(mine + theirs), key=int) == ids(all_of_them) == [str(number) for number in range(20)]
            assert (await here.driver.lag(here.name, "a")).messages == 0
            for consumer in (one, two, other):
                await consumer.close()

    run(test)


def test_a_nack_comes_again_after_its_delay_with_the_next_attempt() -> None:
    """A nacked message is lent again not before its delay, at most a second after it, also by another member."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=1.0)
            one, two = await here.join(group), await here.join(group)
            await here.publish(1)
            (delivery,) = await take(one, 1)
            started = time.monotonic()
            await end(one, [delivery], Verb.NACK, 1.5)
            (again,) = await take(two, 1)

            assert 1.5 <= time.monotonic() - started < 1.5 + LATE
            assert (again.attempt, again.suspect) == (2, False)
            await end(two, [again])
            await one.close()
            await two.close()

    run(test)


def test_a_release_gives_the_attempt_back() -> None:
    """A released message comes again at once, with the attempt it had."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            for _ in range(3):
                (delivery,) = await take(consumer, 1)

                assert delivery.attempt == 1
                await end(consumer, [delivery], Verb.RELEASE)
            await end(consumer, await take(consumer, 1), Verb.NACK)
            (delivery,) = await take(consumer, 1)

            assert delivery.attempt == 2
            await consumer.close()

    run(test)


def test_the_deliveries_of_a_silent_member_come_again_alone() -> None:
    """When a lease ends without a word, its messages go to others, one at a time, and an old settle is refused."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=0.5)
            silent, other = await here.join(group), await here.join(group)
            await here.publish(3)
            stale = await take(silent, 3)
            fresh = []
            for _ in range(3):
                (delivery,) = await other.receive(10, 5.0)
                fresh.append(delivery)
                assert await other.extend([one.token for one in fresh], 0.5) == [None] * len(fresh)

            assert [(one.attempt, one.suspect) for one in fresh] == [(2, True)] * 3
            for verb in (Verb.ACK, Verb.NACK, Verb.RELEASE):
                outcomes = await silent.settle([Settlement(stale[0].token, verb)])
                assert isinstance(outcomes[0], LeaseLostError)
            outcomes = await silent.extend([one.token for one in stale[1:]], 0.5)
            assert all(isinstance(outcome, LeaseLostError) for outcome in outcomes)
            await end(other, fresh)
            await quiet(other)
            await silent.close()
            await other.close()

    run(test)


def test_an_extended_loan_stands_beyond_the_lease() -> None:
    """Extending beyond the group's lease keeps the loan, extending below it ends the loan early."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=0.5)
            one, two = await here.join(group), await here.join(group)
            await here.publish(2)
            long, short = await take(one, 2)
            started = time.monotonic()
            assert await one.extend([long.token], 3.0) == [None]
            assert await one.extend([short.token], 0.1) == [None]
            (first,) = await take(two, 1)
            after_short = time.monotonic() - started
            await end(two, [first])
            await quiet(two)
            (second,) = await take(two, 1)

            assert first.message == short.message
            assert second.message == long.message
            assert after_short < 2.5
            assert 3.0 <= time.monotonic() - started < 3.0 + LATE
            await one.close()
            await two.close()

    run(test)


def test_an_expired_loan_is_lent_again_and_is_no_suspect() -> None:
    """A member that says that a lease ended is alive: the message comes at once, and not alone."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            await end(consumer, await take(consumer, 1), Verb.EXPIRE)
            (again,) = await take(consumer, 1)

            assert (again.attempt, again.suspect) == (2, False)
            await consumer.close()

    run(test)


def test_a_cancelled_receive_loses_nothing() -> None:
    """Whatever moment a receive is cancelled at, every message is delivered by a later one, with attempt 1."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            seen: list[str] = []
            attempts = set()

            def keep(deliveries: list) -> None:  # type: ignore[type-arg]
                seen.extend(ids(deliveries))
                attempts.update(delivery.attempt for delivery in deliveries)

            for number in range(40):
                waiting = asyncio.create_task(consumer.receive(2, 5.0))
                await asyncio.sleep(number % 3 * 0.0005)
                publishing = asyncio.create_task(here.publish(1, first=number))
                for _ in range(number):
                    await asyncio.sleep(0)
                waiting.cancel()
                try:
                    keep(await waiting)
                except asyncio.CancelledError:
                    await publishing
                await publishing
            while len(seen) < 40:
                keep(await take(consumer, 1))

            assert sorted(seen, key=int) == [str(number) for number in range(40)]
            assert attempts == {1}
            await consumer.close()

    run(test)


def test_what_a_cancelled_receive_fetched_is_given_back_on_close() -> None:
    """A fetch that nobody took does not strand in the consumer that fetched it."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            waiting = asyncio.create_task(one.receive(10, 5.0))
            await asyncio.sleep(0.05)
            await here.publish(5)
            waiting.cancel()
            await asyncio.wait([waiting])
            await one.close()
            two = await here.join(group)
            deliveries = await take(two, 5) if waiting.cancelled() else []

            assert all(delivery.attempt == 1 for delivery in deliveries)
            assert [member.in_flight for member in await here.driver.members(here.name, "g")] == [len(deliveries)]
            await two.close()

    run(test)


def test_a_lease_counts_from_the_call_also_for_what_came_for_an_earlier_one() -> None:
    """What a cancelled receive had been lent is lent anew when the next one hands it out."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group(lease=60.0))
            assert await consumer.receive(1, 0) == []
            inner = consumer._inner  # type: ignore[attr-defined]
            receiving = asyncio.create_task(consumer.receive(1, 30.0))
            for _ in range(5):
                await asyncio.sleep(0)
            assert inner._reading is not None
            inner._reader.current._transport.pause_reading()
            await here.publish(1)
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            # The time that it lies unread.
            await asyncio.sleep(0.5)
            inner._reader.current._transport.resume_reading()
            (one,) = await take(consumer, 1)
            stream = TopicKeys.of(await here.driver.topic(here.name)).streams[0].stream
            ((_, _, idle, _),) = [
                tuple(entry.values()) for entry in await here.redis.xpending_range(stream, "g", "-", "+", 10)
            ]

            assert idle < 400
            await end(consumer, [one])
            await consumer.close()

    run(test)


def test_a_waiting_receive_is_told_of_the_close() -> None:
    """Closing ends a waiting receive with ClosedError, at once, and forgets the member."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            waiting = asyncio.create_task(consumer.receive(1, 10.0))
            await asyncio.sleep(0.05)
            started = time.monotonic()
            await consumer.close()
            with pytest.raises(ClosedError):
                await waiting

            assert time.monotonic() - started < LATE
            assert await here.driver.members(here.name, "g") == []
            assert await here.redis.xinfo_consumers(f"us:{{{here.name}}}:stream", "g") == []

    run(test)


@pytest.mark.parametrize("what", ["group", "topic"])
def test_a_deleted_group_or_topic_ends_the_receive(what: str) -> None:
    """A member that waits in a group or topic that is deleted is told which of them is gone."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            waiting = asyncio.create_task(consumer.receive(1, 10.0))
            await asyncio.sleep(0.05)
            if what == "group":
                await here.driver.delete_group(here.name, "g")
            else:
                await here.driver.delete_topic(here.name)
            with pytest.raises(GroupMissingError if what == "group" else TopicMissingError):
                await waiting
            with pytest.raises(GroupMissingError if what == "group" else TopicMissingError):
                await consumer.receive(1, 1.0)
            await consumer.close()

    run(test)


def test_a_lost_reply_strands_nothing() -> None:
    """Messages whose delivery was cut off on the way come again without an attempt being counted."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group())
            assert await consumer.receive(10, 0) == []
            waiting = asyncio.create_task(consumer.receive(10, 5.0))
            await asyncio.sleep(0.05)
            proxy.deaf = True
            stream = f"us:{{{here.name}}}:stream"
            async with opened() as outside:
                for number in range(5):
                    await outside.redis.xadd(stream, {"value": str(number)})
                while not (await outside.redis.xpending(stream, "g"))["pending"]:  # noqa: ASYNC110 - Redis has no event
                    await asyncio.sleep(0.01)
            proxy.cut()
            proxy.deaf = False
            with pytest.raises(BrokerUnavailableError):
                await waiting
            deliveries = await take(consumer, 5)

            assert sorted(delivery.message.value for delivery in deliveries) == [b"0", b"1", b"2", b"3", b"4"]
            assert {delivery.attempt for delivery in deliveries} == {1}
            await consumer.close()

    run(test)


def test_a_settle_that_was_answered_in_part_can_be_repeated() -> None:
    """In a shared group of an ordered topic the answers that came before the connection was lost still count."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic(partitions=2, ordering="key")
            consumer = await here.join(await here.group(lease=20.0))
            await here.publish(2, partition=0)
            await here.publish(2, first=2, partition=1)
            deliveries = sorted(await take(consumer, 4), key=lambda delivery: delivery.message.id)
            verbs = [Verb.ACK, Verb.RELEASE, Verb.ACK, Verb.RELEASE]
            batch = [Settlement(one.token, verb) for one, verb in zip(deliveries, verbs, strict=True)]
            proxy.replies_left = 1
            with pytest.raises(BrokerUnavailableError):
                await consumer.settle(batch)
            assert proxy.deaf, "both answers came"
            proxy.replies_left = None
            proxy.deaf = False
            outcomes = await consumer.settle(batch)
            again = await take(consumer, 2)

            assert outcomes == [None] * 4
            assert sorted(ids(again)) == ["1", "3"]
            await end(consumer, again)
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_a_settle_whose_answer_was_lost_can_be_repeated() -> None:
    """Repeating a settle after a lost answer is harmless: the acked are acked, the nacked come again once."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(4)
            deliveries = await take(consumer, 4)
            batch = [
                Settlement(deliveries[0].token, Verb.ACK),
                Settlement(deliveries[1].token, Verb.NACK, 0.5),
                Settlement(deliveries[2].token, Verb.RELEASE),
            ]
            proxy.deaf = True
            with pytest.raises(BrokerUnavailableError):
                await consumer.settle(batch)
            proxy.deaf = False
            outcomes = await consumer.settle(batch)
            assert outcomes == [None, None, None]
            await end(consumer, deliveries[3:])
            again = await take(consumer, 2)

            assert sorted((one.message.id, one.attempt) for one in again) == [("1", 2), ("2", 1)]
            await end(consumer, again)
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_a_half_open_connection_is_noticed() -> None:
    """A frozen connection is given up after dead_peer_after, by receive and by settle; then all goes on."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(2)
            first, second = await take(consumer, 2)
            proxy.freeze()
            started = time.monotonic()
            with pytest.raises(BrokerUnavailableError):
                await consumer.settle([Settlement(first.token, Verb.ACK)])
            with pytest.raises(BrokerUnavailableError):
                await consumer.receive(1, 0.5)

            assert time.monotonic() - started < 4.0 + LATE
            proxy.cut()
            proxy.heal()
            await end(consumer, [first, second])
            await here.publish(1, first=2)
            assert ids(await take(consumer, 1)) == ["2"]
            await consumer.close()

    run(test)


def test_a_paused_member_stays_a_member() -> None:
    """A member that does not call receive stays joined, and its loans stand while they are extended."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=0.5)
            consumer, other = await here.join(group), await here.join(group)
            await here.publish(1)
            deliveries = await take(consumer, 1)
            for _ in range(12):
                assert await consumer.extend([deliveries[0].token], 0.5) == [None]
                assert await other.receive(1, 0.25) == []

            assert sorted(member.in_flight or 0 for member in await here.driver.members(here.name, "g")) == [0, 1]
            await end(consumer, deliveries)
            await consumer.close()
            await other.close()

    run(test)


def test_a_dead_members_record_is_cleaned_up() -> None:
    """The consumer of a member that vanished is removed once nothing is pending for it."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=0.4)
            stream = f"us:{{{here.name}}}:stream"
            consumer = await here.join(group)
            await here.publish(1)
            await here.redis.xreadgroup("g", "vanished", {stream: ">"})
            (delivery,) = await take(consumer, 1)
            await end(consumer, [delivery])
            names = {b"vanished"}
            async with asyncio.timeout(10):
                while b"vanished" in names:
                    await consumer.receive(1, 0.2)
                    names = {one["name"] for one in await here.redis.xinfo_consumers(stream, "g")}

            assert delivery.suspect
            await consumer.close()

    run(test)


def test_parked_messages_survive_the_loss_of_their_timetable() -> None:
    """When the sorted set of due times is lost, the parked messages are found in the pending list and lent again."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group(lease=0.5))
            await here.publish(1)
            await end(consumer, await take(consumer, 1), Verb.NACK, 3600)
            await here.redis.delete(f"us:{{{here.name}}}:due:g")
            (again,) = await take(consumer, 1)

            assert again.attempt == 2
            await consumer.close()

    run(test)


def test_a_shared_group_reads_every_partition_of_an_ordered_topic() -> None:
    """A group without order on a topic with it gets the messages of all partitions, and settles them."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=4, ordering="key")
            consumer = await here.join(await here.group())
            for partition in range(4):
                await here.publish(5, first=5 * partition, partition=partition)
            deliveries = await take(consumer, 20, 3)
            await end(consumer, deliveries[:15])
            await end(consumer, deliveries[15:], Verb.NACK)
            again = await take(consumer, 5)

            assert {int(one.message.id) // 5 for one in deliveries} == {0, 1, 2, 3}
            assert all(one.message.partition == int(one.message.id) // 5 for one in deliveries)
            assert sorted(ids(again)) == sorted(ids(deliveries[15:]))
            assert (await here.driver.lag(here.name, "g")).messages == 5
            await end(consumer, again)
            await consumer.close()

    run(test)


def test_an_ephemeral_group_sees_what_comes_and_leaves_nothing() -> None:
    """An ephemeral group starts at the end, is not listed, and is gone after close."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic()
            await here.publish(3)
            spec = GroupSpec(here.name, "e", ephemeral=True)
            one = await here.driver.consumer(spec, topic, max_in_flight=10, lost=lambda tokens, why: None)
            two = await here.driver.consumer(spec, topic, max_in_flight=10, lost=lambda tokens, why: None)
            await here.publish(2, first=3)
            for consumer in (one, two):
                deliveries = await take(consumer, 2)
                assert ids(deliveries) == ["3", "4"]
                await end(consumer, deliveries)
            assert await here.driver.groups(here.name) == []
            await one.close()
            await two.close()

            assert await here.redis.xinfo_groups(f"us:{{{here.name}}}:stream") == []
            left = {key.decode() async for key in here.redis.scan_iter(f"us:{{{here.name}}}:*")}
            left -= {f"us:{{{here.name}}}:run"}  # belongs to the topic, kept on Redis 7.0
            assert left == {f"us:{{{here.name}}}:stream", f"us:{{{here.name}}}:meta"}

    run(test)


def test_a_suspect_comes_between_others_and_alone() -> None:
    """Nacked messages that are due and suspects are lent in the order of their times, each suspect alone."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=0.4)
            consumer = await here.join(group)
            await here.publish(4)
            deliveries = await take(consumer, 4)
            await end(consumer, deliveries[:2], Verb.NACK, 2.0)
            batches = []
            async with asyncio.timeout(10):
                while sum(map(len, batches)) < 4:
                    batch = await consumer.receive(10, 1.0)
                    batches += [batch] if batch else []
                    await end(consumer, batch)

            assert [[one.suspect for one in batch] for batch in batches][:2] == [[True], [True]]
            assert sorted(ids(batches[2])) == ["0", "1"]
            await consumer.close()

    run(test)


def test_an_abandoned_ephemeral_group_is_swept_away() -> None:
    """An ephemeral group whose consumer gave no sign of life for long is removed by the next one that joins."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic()
            spec = GroupSpec(here.name, "e", ephemeral=True)
            one = await here.driver.consumer(spec, topic, max_in_flight=10, lost=lambda tokens, why: None)
            stream, signs = f"us:{{{here.name}}}:stream", f"us:{{{here.name}}}:ephemeral"
            (abandoned,) = await here.redis.zrange(signs, 0, -1)
            await here.redis.zadd(signs, {abandoned: 1})
            two = await here.driver.consumer(spec, topic, max_in_flight=10, lost=lambda tokens, why: None)
            assert abandoned not in [group["name"] for group in await here.redis.xinfo_groups(stream)]
            assert here.events == []
            assert await one.receive(1, 1.0) == []
            await here.publish(1)
            for consumer in (one, two):
                await end(consumer, await take(consumer, 1))

            assert [event.count for event in here.events if isinstance(event, DataLoss)] == [None]
            await one.close()
            await two.close()

    run(test)
