"""Shared groups on a real Kafka: lending, settling, attempts, suspects, recovery, rebalances."""

from __future__ import annotations

import asyncio
import time

import pytest

import unistream
from tests.adapters.kafka.support import LIMIT, end, ids, opened, quiet, receive, run, settle, take, url
from tests.adapters.support import LATE
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import GroupSpec, RawDelivery, Verb
from unistream.errors import BrokerUnavailableError, ClosedError, GroupMissingError, LeaseLostError, TopicMissingError
from unistream_kafka import member

pytestmark = pytest.mark.kafka


async def gather(consumers: list[ConsumerDriver], count: int) -> list[list[RawDelivery]]:
    """Receive with several members at once until `count` deliveries came, acking all."""
    got: list[list[RawDelivery]] = [[] for _ in consumers]

    async def one(at: int) -> None:
        while sum(map(len, got)) < count:
            deliveries = await receive(consumers[at], 50, 0.2)
            got[at] += deliveries
            if deliveries:
                await end(consumers[at], deliveries)

    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(one(at) for at in range(len(consumers))))
    return got


def test_every_group_gets_every_message_once_spread_over_its_members() -> None:
    """Two groups each get all of 1000 messages, one of them over three members, and nothing comes twice."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=6)
            first, second = await here.group("a"), await here.group("b")
            members = [await here.join(first) for _ in range(3)]
            other = await here.join(second)
            await asyncio.gather(
                *(here.publish(170, first=170 * partition, partition=partition) for partition in range(6))
            )
            got, rest = await asyncio.gather(gather(members, 1020), gather([other], 1020))
            everything = [str(number) for number in range(1020)]

            assert sorted((one for each in got for one in ids(each)), key=int) == everything
            assert sorted(ids(rest[0]), key=int) == everything
            assert all(got)
            assert {delivery.attempt for each in (*got, *rest) for delivery in each} == {1}
            assert await here.driver.lag(here.name, "a") == (0, True)
            for consumer in (*members, other):
                await quiet(consumer)
                await consumer.close()

    run(test)


def test_no_wait_of_the_member_outlasts_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Asked for messages at any moment, closed off and opened again, a member misses no fetch: nothing waits for a timer.

    The timers are set too long to help.
    """
    monkeypatch.setattr(member, "_IDLE_SECONDS", 3 * LIMIT)
    monkeypatch.setattr(member, "_POLL_MS", 3000 * LIMIT)

    async def test() -> None:
        async with opened() as here, unistream.connect(url()) as client:
            await client.create_topic(here.name)
            group = client.group("g", here.name)
            await group.create()
            async with client.producer(here.name) as producer:
                await producer.publish_many(bytes(1000) for _ in range(10000))
            async with asyncio.timeout(2 * LIMIT), group.consumer(max_in_flight=256) as consumer:
                left = 10000
                while left:
                    deliveries = await consumer.receive_many(100)
                    await consumer.ack_many(deliveries)
                    left -= len(deliveries)

    run(test)


def test_lag_counts_what_is_not_settled_also_beyond_the_cursor() -> None:
    """Messages in flight count as lag, messages settled out of order do not."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(10)
            deliveries = await take(consumer, 10)
            assert await here.driver.lag(here.name, "g") == (10, True)
            await end(consumer, deliveries[3:6])

            assert await here.driver.lag(here.name, "g") == (7, True)
            await end(consumer, deliveries[:3] + deliveries[6:])
            assert await here.driver.lag(here.name, "g") == (0, True)
            await consumer.close()

    run(test)


def test_a_nack_comes_again_after_its_delay_and_others_pass_it() -> None:
    """A nacked message is lent again not before its delay, with the next attempt; its partition keeps flowing."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(5)
            first, *rest = await take(consumer, 5)
            await end(consumer, [first], Verb.NACK, 1.0)
            started = time.monotonic()
            await end(consumer, rest)
            await here.publish(1, first=5)
            passing = await take(consumer, 1)
            (again,) = await take(consumer, 1)

            assert ids(passing) == ["5"]
            assert 1.0 <= time.monotonic() - started < 1.0 + LATE
            assert (again.message, again.attempt, again.suspect) == (first.message, 2, False)
            await end(consumer, [*passing, again])
            await consumer.close()

    run(test)


def test_a_delay_survives_the_member() -> None:
    """A message that rests after a nack rests on when another member takes the partition over."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(2)
            resting, other = await take(one, 2)
            await end(one, [resting], Verb.NACK, 4.0)
            started = time.monotonic()
            await end(one, [other])
            await one.close()
            two = await here.join(group)
            (again,) = await take(two, 1)

            assert 4.0 <= time.monotonic() - started < 4.0 + LATE
            assert (again.message.id, again.attempt, again.suspect) == ("0", 2, False)
            await end(two, [again])
            await quiet(two)
            await two.close()

    run(test)


def test_a_release_gives_the_attempt_back() -> None:
    """A released message comes again at once, with the attempt it had, also at another member."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            for _ in range(2):
                one = await here.join(group)
                if await here.driver.lag(here.name, "g") == (0, True):
                    await here.publish(3)
                deliveries = await take(one, 3)

                assert [(one.attempt, one.suspect) for one in deliveries] == [(1, False)] * 3
                assert ids(deliveries) == ["0", "1", "2"]
                await end(one, deliveries, Verb.RELEASE)
                await one.close()

    run(test)


def test_an_expired_loan_is_lent_again_and_its_token_is_dead() -> None:
    """A member that says that a lease ended gets the message again; the old loan settles nothing any more."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            (stale,) = await take(consumer, 1)
            assert consumer.extend([stale.token], 30.0) == [None]
            await end(consumer, [stale], Verb.EXPIRE)
            (again,) = await take(consumer, 1)
            (refused,) = await settle(consumer, [stale])
            (lost,) = consumer.extend([stale.token], 30.0)

            assert (again.attempt, again.suspect) == (2, False)
            assert isinstance(refused, LeaseLostError)
            assert isinstance(lost, LeaseLostError)
            await end(consumer, [again])
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_attempts_are_counted_across_members() -> None:
    """What was nacked by one member comes to the next one with the attempts it had."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            attempts = []
            for number in range(4):
                consumer = await here.join(group)
                if number == 0:
                    await here.publish(1)
                (delivery,) = await take(consumer, 1)
                attempts.append(delivery.attempt)
                await end(consumer, [delivery], Verb.NACK)
                await consumer.close()

            assert attempts == [1, 2, 3, 4]

    run(test)


def test_what_was_fetched_and_not_taken_is_not_counted() -> None:
    """A member that leaves without having handed out what it fetched has spent no attempt of it."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(20)
            assert len(await take(one, 1, 1)) == 1
            await one.close()
            two = await here.join(group)
            # The one that was handed out and never settled comes alone: its member ended without a word of it.
            deliveries = await take(two, 1, 100) + await take(two, 19, 100)

            assert sorted((int(one.message.id), one.attempt) for one in deliveries) == [
                (0, 2),
                *((number, 1) for number in range(1, 20)),
            ]
            assert [one.suspect for one in deliveries] == [True] + [False] * 19
            await two.close()

    run(test)


def test_a_settled_message_beyond_an_unsettled_one_does_not_come_again() -> None:
    """After a take-over only what was unsettled comes, although Kafka stores nothing but a cursor."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(300)
            deliveries = await take(one, 300)
            kept = [delivery for delivery in deliveries if int(delivery.message.id) % 7 == 0]
            await end(one, [delivery for delivery in deliveries if int(delivery.message.id) % 7])
            await end(one, kept, Verb.RELEASE)
            await one.close()
            two = await here.join(group)
            again = await take(two, len(kept))

            assert sorted(ids(again), key=int) == ids(kept)
            assert {delivery.attempt for delivery in again} == {1}
            await end(two, again)
            await quiet(two)
            await two.close()

    run(test)


def test_a_joining_member_takes_partitions_over_after_their_loans_are_settled() -> None:
    """A rebalance waits a moment for what is lent; nothing is lost and nothing comes twice."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2)
            group = await here.group()
            one = await here.join(group)
            for partition in range(2):
                await here.publish(5, first=10 * partition, partition=partition)
            held = await take(one, 10)
            joining = asyncio.create_task(here.join(group))
            # The first member hears of the rebalance by a heartbeat, and then waits for its loans.
            async with asyncio.timeout(LIMIT):
                while len(await here.driver.members(here.name, "g")) < 2:
                    pass  # each look is a round trip
            await end(one, held)
            two = await joining
            for partition in range(2):
                await here.publish(5, first=20 + 10 * partition, partition=partition)
            got = await gather([one, two], 10)

            assert here.ended == []
            assert sorted(ids(got[0] + got[1]), key=int) == [str(n) for n in (*range(20, 25), *range(30, 35))]
            await one.close()
            await two.close()

    run(test)


def test_a_loan_that_is_not_settled_in_a_rebalance_is_lost_and_fenced() -> None:
    """The old member is told that its loan ended, its ack is refused, and the new owner gets the message."""

    async def test() -> None:
        async with opened() as here:
            group, one, lent = await here.lent_of_each()
            held = {delivery.token: delivery for delivery in lent}
            two = await here.join(group)
            (again,) = await take(two, 1)
            (gone,) = here.ended
            kept = [delivery for token, delivery in held.items() if token != gone]
            (refused,) = await settle(one, [held[gone]])

            assert again.message == held[gone].message
            assert (again.attempt, again.suspect) == (2, True)
            assert isinstance(refused, LeaseLostError)
            await end(one, kept)
            await end(two, [again])
            assert await here.driver.lag(here.name, "g") == (0, True)
            await one.close()
            await two.close()

    run(test)


def test_a_leaving_member_hands_over_within_five_seconds() -> None:
    """Members that stay get the partitions of one that leaves, and what it released."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2)
            group = await here.group()
            one, two = await here.join(group), await here.join(group)
            for partition in range(2):
                await here.publish(3, first=3 * partition, partition=partition)
            got = {}
            async with asyncio.timeout(LIMIT):
                while sum(map(len, got.values())) < 6:
                    for consumer in (one, two):
                        got.setdefault(consumer, []).extend(await receive(consumer, 10, 0.3))
            await end(one, got[one], Verb.RELEASE)
            started = time.monotonic()
            await one.close()
            rest = await take(two, len(got[one]))

            assert time.monotonic() - started < 5.0 + LATE
            assert sorted(ids(got[two] + rest)) == [str(number) for number in range(6)]
            await two.close()

    run(test)


def test_a_cancelled_receive_loses_nothing() -> None:
    """Whatever moment a receive is cancelled at, every message is delivered by a later one, with attempt 1."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            seen: list[RawDelivery] = []
            for number in range(40):
                waiting = asyncio.create_task(receive(consumer, 2, 5.0))
                if number % 10 == 0:
                    await here.publish(1, first=number)
                for _ in range(number % 7):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    seen += waiting.result()
            while len(seen) < 4:
                seen += await take(consumer, 1)

            assert sorted(ids(seen), key=int) == ["0", "10", "20", "30"]
            assert {delivery.attempt for delivery in seen} == {1}
            await consumer.close()

    run(test)


def test_a_waiting_receive_is_told_of_the_close() -> None:
    """Closing ends a waiting receive with ClosedError, and forgets the member."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            waiting = asyncio.create_task(receive(consumer, 1, 5.0))
            await asyncio.sleep(0.05)
            started = time.monotonic()
            await consumer.close()
            with pytest.raises(ClosedError):
                await waiting

            assert time.monotonic() - started < 2.0 + LATE
            assert await here.driver.members(here.name, "g") == []

    run(test)


@pytest.mark.parametrize("what", ["group", "topic"])
def test_a_deleted_group_or_topic_ends_the_receive(what: str) -> None:
    """A member of a group or topic that is deleted is told which of them is gone."""

    async def test() -> None:
        async with opened(url() + "?dead_peer_after=3") as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            (delivery,) = await take(consumer, 1)
            error = TopicMissingError if what == "topic" else GroupMissingError
            if what == "topic":
                await here.driver.delete_topic(here.name)
            else:
                await here.driver.delete_group(here.name, "g")
            with pytest.raises(error):
                await receive(consumer, 1, LIMIT)

            assert here.ended == [delivery.token]
            with pytest.raises(error):
                await receive(consumer, 1, 1.0)
            await consumer.close()

    run(test)


def test_a_group_that_was_made_again_does_not_take_old_members_back() -> None:
    """Deleting and creating a group begins at its new start; the old member's settle is refused."""

    async def test() -> None:
        async with opened(url() + "?dead_peer_after=3") as here:
            await here.topic()
            old = await here.join(await here.group())
            await here.publish(3)
            deliveries = await take(old, 3)
            await here.driver.delete_group(here.name, "g")
            outcomes = await settle(old, deliveries)
            assert all(isinstance(outcome, LeaseLostError) for outcome in outcomes)
            await old.close()
            again = await here.join(await here.group(start="earliest"))

            assert ids(await take(again, 3)) == ["0", "1", "2"]
            await again.close()

    run(test)


def test_an_ephemeral_group_sees_all_from_its_entry_and_leaves_nothing() -> None:
    """Each consumer of an ephemeral group gets every message of every partition, and Kafka knows no group of it."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=3)
            await here.publish(2, first=100)
            one = await here.join(GroupSpec(here.name, "e1", ephemeral=True))
            two = await here.join(GroupSpec(here.name, "e2", ephemeral=True))
            for partition in range(3):
                await here.publish(4, first=4 * partition, partition=partition)
            for consumer in (one, two):
                deliveries = await take(consumer, 12)
                assert sorted(ids(deliveries), key=int) == [str(number) for number in range(12)]
                await end(consumer, deliveries[1:])
                await end(consumer, deliveries[:1], Verb.NACK, 0.2)
                (again,) = await take(consumer, 1)
                assert (again.message.id, again.attempt) == (deliveries[0].message.id, 2)
                await end(consumer, [again])
                await quiet(consumer)
                await consumer.close()

            assert await here.driver.groups(here.name) == []
            assert not [group for group in here.driver.native.list_groups() if here.name in group["group_id"]]

    run(test)


def test_members_that_are_more_than_partitions_wait_for_their_turn() -> None:
    """A member without a partition gets one when another leaves."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one, two = await here.join(group), await here.join(group)
            await here.publish(1)
            got = await receive(one, 1, 2.0)
            owner, other = (one, two) if got else (two, one)
            await end(owner, got or await receive(two, 1, 2.0))
            await owner.close()
            await here.publish(1, first=1)

            assert ids(await take(other, 1)) == ["1"]
            await other.close()

    run(test)


def test_a_blocked_event_loop_leaves_the_group() -> None:
    """A member whose loop is blocked beyond lease and session hands its partition over, and comes back by itself."""

    async def test() -> None:
        async with opened(url() + "?session_timeout=2") as here:
            await here.topic()
            group = await here.group(lease=1.0)
            consumer = await here.join(group)
            await here.publish(1)
            (delivery,) = await take(consumer, 1)
            time.sleep(4.0)  # noqa: ASYNC251 - what is tested
            with pytest.raises(BrokerUnavailableError):
                await settle(consumer, [delivery])
            (refused,) = await settle(consumer, [delivery])

            assert isinstance(refused, LeaseLostError)
            async with asyncio.timeout(LIMIT):
                (again,) = await take(consumer, 1)
            assert (again.message.id, again.attempt) == ("0", 2)
            await end(consumer, [again])
            await consumer.close()

    run(test)
