"""Shared and ephemeral groups on a real RabbitMQ: lending, settling, attempts, suspects, leaving."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.adapters.rabbitmq.support import (
    LATE,
    LIMIT,
    end,
    ids,
    opened,
    proxied,
    quiet,
    receive,
    run,
    settle,
    take,
    url,
)
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import GroupSpec, RawDelivery, Verb
from unistream.errors import BrokerUnavailableError, ClosedError, LeaseLostError
from unistream_rabbitmq.consumer import PATIENCE_SECONDS

pytestmark = pytest.mark.rabbitmq


async def gather(consumers: list[ConsumerDriver], count: int) -> list[list[RawDelivery]]:
    """Receive with several members at once until `count` deliveries came, acking all."""
    got: list[list[RawDelivery]] = [[] for _ in consumers]

    async def one(at: int) -> None:
        while sum(map(len, got)) < count:
            deliveries = await receive(consumers[at], 20, 0.2)
            got[at] += deliveries
            if deliveries:
                await end(consumers[at], deliveries)
                await asyncio.sleep(0)

    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(one(at) for at in range(len(consumers))))
    return got


def test_every_group_gets_every_message_once_spread_over_its_members() -> None:
    """Two groups of three members each get all of 1000 messages, and nothing comes twice."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            groups = [await here.group("a"), await here.group("b")]
            teams = [[await here.join(group, 50) for _ in range(3)] for group in groups]
            await here.publish(1000)
            for team in teams:
                got = await gather(team, 1000)
                everything = [delivery for each in got for delivery in each]

                assert sorted(ids(everything), key=int) == [str(number) for number in range(1000)]
                assert {delivery.attempt for delivery in everything} == {1}
                assert all(got)
                for consumer in team:
                    await quiet(consumer)
                    await consumer.close()
            assert (await here.driver.lag(here.name, "a")).messages == 0

    run(test)


def test_a_nack_comes_again_after_its_delay_with_the_next_attempt_and_others_pass_it() -> None:
    """A nacked message is lent again not before its delay, soon after it, also by another member."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(3)
            first, *rest = await take(one, 3)
            started = time.monotonic()
            await end(one, [first], Verb.NACK, 1.2)
            await end(one, rest)
            await here.publish(1, first=3)
            assert ids(await take(one, 1)) == ["3"]
            await one.close()
            two = await here.join(group)
            joined = time.monotonic()
            again = await take(two, 2)
            late = next(delivery for delivery in again if delivery.message.id == "0")

            # Until `two` has joined no member lives.
            assert 1.2 <= time.monotonic() - started < max(1.2, joined - started) + LATE
            assert (late.message, late.attempt, late.suspect) == (first.message, 2, False)
            for attempt in (3, 4):
                await end(two, [late], Verb.NACK)
                (late,) = await take(two, 1)
                assert (late.attempt, late.message) == (attempt, first.message)
            await two.close()

    run(test)


def test_the_first_nack_of_a_delay_stops_nothing_and_is_in_time() -> None:
    """While the queue for a new delay is made, other messages are lent and settled, and the delay runs."""

    async def test() -> None:
        async with opened(url() + "?creation_settles=1.5") as here:
            await here.bare(lambda channel: channel.queue_delete("us~delay.1750"))
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(2)
            first, second = await take(consumer, 2)
            started = time.monotonic()
            await end(consumer, [first], Verb.NACK, 1.7)
            await end(consumer, [second])
            await here.publish(1, first=2)
            (third,) = await take(consumer, 1)
            await end(consumer, [third])
            held_up = time.monotonic() - started
            (again,) = await take(consumer, 1)
            came = time.monotonic() - started

            assert held_up < 1.5
            assert 1.7 <= came < 1.5 + 1.75
            assert (again.message, again.attempt, again.suspect) == (first.message, 2, False)
            await end(consumer, [again])
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_a_nack_of_a_new_delay_is_handed_over_by_a_member_that_leaves() -> None:
    """A member that leaves while the queue for a delay is made leaves the message in it, with its attempt."""

    async def test() -> None:
        async with opened(url() + "?creation_settles=0.5") as here:
            await here.bare(lambda channel: channel.queue_delete("us~delay.3500"))
            await here.topic()
            group = await here.group()
            consumer = await here.join(group)
            await here.publish(1)
            held = await take(consumer, 1)
            started = time.monotonic()
            await end(consumer, held, Verb.NACK, 3.4)
            await consumer.close()
            heir = await here.join(group)
            (again,) = await take(heir, 1)

            assert time.monotonic() - started >= 3.4
            assert (again.attempt, again.suspect) == (2, False)
            await end(heir, [again])
            await heir.close()

    run(test)


def test_a_member_that_is_not_asked_lets_others_have_what_it_was_pushed() -> None:
    """Messages pushed to a member that asks for none go to another with the attempt they had; alone it keeps them."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            idle = await here.join(group, 10)
            await here.publish(10)
            held = await take(idle, 2, 2)
            # Longer than it takes to be found idle: alone it keeps what it was pushed, in order.
            await asyncio.sleep(2.5 * PATIENCE_SECONDS)
            assert ids(await take(idle, 2)) == ["2", "3"]
            busy = await here.join(group)
            others = await take(busy, 6)

            assert sorted(ids(others)) == ["4", "5", "6", "7", "8", "9"]
            assert {(delivery.attempt, delivery.suspect) for delivery in others} == {(1, False)}
            assert len(await here.driver.members(here.name, "g")) == 2
            await end(busy, others)
            await end(idle, held)
            await here.publish(3, first=10)
            assert len(await take(idle, 1)) == 1
            assert here.ended == []
            await idle.close()
            await busy.close()

    run(test)


def test_a_release_spends_no_attempt_and_so_does_what_was_never_lent() -> None:
    """What is released, or fetched ahead by a member that leaves, comes to others with the attempt it had."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(20)
            held = await take(one, 5, 5)
            await end(one, held, Verb.RELEASE)
            started = time.monotonic()
            await one.close()
            assert time.monotonic() - started < 5 + LATE
            two = await here.join(group)
            deliveries = await take(two, 20)

            assert sorted(ids(deliveries), key=int) == [str(number) for number in range(20)]
            assert {(delivery.attempt, delivery.suspect) for delivery in deliveries} == {(1, False)}
            await end(two, deliveries)
            await quiet(two)
            await two.close()

    run(test)


def test_an_expired_loan_is_lent_again_alone_and_its_token_is_dead() -> None:
    """The message of an ended lease comes again as a suspect; the old loan settles nothing any more."""

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

            assert (again.attempt, again.suspect) == (2, True)
            assert isinstance(refused, LeaseLostError)
            assert isinstance(lost, LeaseLostError)
            await end(consumer, [again])
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_a_lost_connection_ends_its_loans_and_everything_works_again() -> None:
    """Loans of a cut connection are lost and fenced; their messages come again, each alone, with the next attempt."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(4)
            held = await take(consumer, 4)
            await end(consumer, held[:1])
            async with asyncio.timeout(LIMIT):
                while (await here.driver.lag(here.name, "g")).messages > 3:
                    pass  # each look is a round trip
            proxy.cut()
            rest: list[RawDelivery] = []
            async with asyncio.timeout(LIMIT):
                while len(rest) < 3:
                    try:
                        deliveries = await receive(consumer, 10, 1.0)
                    except BrokerUnavailableError:
                        continue
                    assert len(deliveries) <= 1
                    rest += deliveries
                    if deliveries:
                        await end(consumer, deliveries)

            assert sorted(here.ended) == sorted(delivery.token for delivery in held[1:])
            assert all(isinstance(outcome, LeaseLostError) for outcome in await settle(consumer, held[1:]))
            assert sorted(ids(rest)) == ["1", "2", "3"]
            assert {(delivery.attempt, delivery.suspect) for delivery in rest} == {(2, True)}
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_a_member_holds_no_more_than_asked_for() -> None:
    """The broker pushes no more than max_in_flight, and a receive returns no more than its limit."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group(), 10)
            await here.publish(30)
            deliveries = await take(consumer, 10, 3)
            await quiet(consumer)
            _, waiting, _ = await here.bare(
                lambda channel: (0, channel.queue_declare(f"us.{here.name}.g", passive=True).method.message_count, 0)
            )

            assert waiting == 20
            assert (await here.driver.lag(here.name, "g")).messages == 30
            await end(consumer, deliveries[3:5])
            assert len(await take(consumer, 2)) == 2
            assert [member.name for member in await here.driver.members(here.name, "g")] == ["member-1"]
            await consumer.close()
            assert await here.driver.members(here.name, "g") == []

    run(test)


def test_a_bounded_group_takes_back_what_it_lent_although_it_is_full() -> None:
    """A nack or a release finds room beyond max_backlog, with and without delay."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(max_backlog=3)
            consumer = await here.join(await here.group(), 3)
            await here.publish(3)
            held = await take(consumer, 3)
            await here.publish(3, first=3)
            await end(consumer, held[:1], Verb.NACK)
            await end(consumer, held[1:2], Verb.NACK, 0.4)
            await end(consumer, held[2:], Verb.RELEASE)
            deliveries: list[RawDelivery] = []
            for _ in range(6):
                one = await take(consumer, 1, 1)
                await end(consumer, one)
                deliveries += one

            assert sorted(ids(deliveries)) == ["0", "1", "2", "3", "4", "5"]
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_a_delayed_message_of_a_deleted_group_stops_nobody_elses() -> None:
    """More delayed messages of a deleted group than RabbitMQ moves at once do not hold up another group's."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            gone, kept = await here.join(await here.group("gone")), await here.join(await here.group("kept"))
            await here.publish(60)
            await end(gone, await take(gone, 60), Verb.NACK, 1.0)
            deliveries = await take(kept, 60)
            await end(kept, deliveries[1:])
            await here.driver.delete_group(here.name, "gone")
            await end(kept, deliveries[:1], Verb.NACK, 1.0)
            (again,) = await take(kept, 1)

            assert (again.message.id, again.attempt) == ("0", 2)
            await gone.close()
            await kept.close()

    run(test)


def test_an_ephemeral_group_sees_everything_and_leaves_nothing() -> None:
    """Each ephemeral member gets all messages from its entry to its end; a lost connection is a gap that is told."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            one = await here.join(GroupSpec(here.name, "ephemeral-1", ephemeral=True))
            two = await here.join(GroupSpec(here.name, "ephemeral-2", ephemeral=True))
            await here.publish(3)
            for consumer in (one, two):
                first, *rest = await take(consumer, 3)
                await end(consumer, [first], Verb.NACK, 0.3)
                await end(consumer, rest)
                (again,) = await take(consumer, 1)
                assert (again.message.id, again.attempt) == ("0", 2)
                await end(consumer, [again])
            await two.close()
            proxy.cut()
            async with asyncio.timeout(LIMIT):
                while not here.gaps:
                    try:
                        assert await receive(one, 1, 0.1) == []
                    except BrokerUnavailableError:
                        continue
            await here.publish(1, first=3)
            assert ids(await take(one, 1)) == ["3"]
            await one.close()

            assert [(gap.group, gap.count) for gap in here.gaps] == [("ephemeral-1", None)]
            assert await here.driver.groups(here.name) == []
            await here.publish(1, first=4)  # to no group any more

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
    """Closing ends a waiting receive with ClosedError."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            waiting = asyncio.create_task(receive(consumer, 1, 5.0))
            await asyncio.sleep(0)
            await consumer.close()
            await consumer.close()

            with pytest.raises(ClosedError):
                await waiting

    run(test)
