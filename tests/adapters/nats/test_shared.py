"""Shared groups on a real NATS: lending, settling, attempts, suspects, recovery."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.adapters.nats.support import LIMIT, end, ids, opened, proxied, quiet, run, take
from tests.adapters.support import LATE
from unistream.driver.types import GroupSpec, RawDelivery, Settlement, Verb
from unistream.errors import (
    BrokerUnavailableError,
    ClosedError,
    GroupMissingError,
    LeaseLostError,
    TopicMissingError,
)

pytestmark = pytest.mark.nats


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
            assert (await here.driver.lag(here.name, "a")).messages == 20
            for consumer, deliveries in ((one, mine), (two, theirs), (other, all_of_them)):
                await end(consumer, deliveries)
                await quiet(consumer)

            assert sorted(ids(mine + theirs), key=int) == ids(all_of_them) == [str(number) for number in range(20)]
            assert await here.driver.lag(here.name, "a") == (0, True)
            for consumer in (one, two, other):
                await consumer.close()

    run(test)


def test_a_nack_comes_again_after_its_delay_with_the_next_attempt() -> None:
    """A nacked message is lent again not before its delay, though it is longer than the lease, to another member."""

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
    """A released message comes again at once, with the attempt it had, also at another member; its note is removed."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one, two = await here.join(group), await here.join(group)
            await here.publish(1)
            for consumer in (one, two, one):
                (delivery,) = await take(consumer, 1)

                assert (delivery.attempt, delivery.suspect) == (1, False)
                await end(consumer, [delivery], Verb.RELEASE)
            await end(two, await take(two, 1), Verb.NACK)
            (delivery,) = await take(one, 1)

            assert (delivery.attempt, delivery.suspect) == (2, False)
            notes = f"us=notes.{here.stream}.g.*"
            assert (await here.api("STREAM.INFO.us=notes", subjects_filter=notes))["state"]["subjects"]
            await end(one, [delivery])
            async with asyncio.timeout(LIMIT):
                while (await here.api("STREAM.INFO.us=notes", subjects_filter=notes))["state"].get("subjects"):
                    await here.client.flush()
            await one.close()
            await two.close()

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
                (delivery,) = await take(other, 1)
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


def test_nothing_is_held_beside_a_suspect() -> None:
    """A member that gets several suspects in one fetch keeps one; another member gets the rest, uncounted."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=1.0)
            silent, one, two = await here.join(group), await here.join(group), await here.join(group)
            await here.publish(4)
            await take(silent, 4)
            first = None
            async with asyncio.timeout(LIMIT):
                while first is None:
                    first = next(iter(await one.receive(100, 0.1)), None)
            rest = [(await take(two, 1))[0] for _ in range(3)]

            assert first.suspect
            assert {(delivery.attempt, delivery.suspect) for delivery in rest} == {(2, True)}
            for consumer in (silent, one, two):
                await consumer.close()

    run(test)


def test_an_extended_loan_stands_beyond_the_lease() -> None:
    """Extending beyond the group's lease keeps the loan as long as the member lives."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=0.6)
            one, two = await here.join(group), await here.join(group)
            await here.publish(1)
            (delivery,) = await take(one, 1)
            started = time.monotonic()
            assert await one.extend([delivery.token], 2.0) == [None]
            (again,) = await take(two, 1)

            assert 2.0 <= time.monotonic() - started < 2.0 + LATE
            assert again.message == delivery.message
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
            for number in range(40):
                waiting = asyncio.create_task(consumer.receive(2, 5.0))
                await asyncio.sleep(number % 3 * 0.0005)
                publishing = asyncio.create_task(here.publish(1, first=number))
                for _ in range(number):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    seen += ids(waiting.result())
                    attempts |= {delivery.attempt for delivery in waiting.result()}
                await publishing
            while len(seen) < 40:
                deliveries = await take(consumer, 1)
                seen += ids(deliveries)
                attempts |= {delivery.attempt for delivery in deliveries}

            assert sorted(seen, key=int) == [str(number) for number in range(40)]
            assert attempts == {1}
            await consumer.close()

    run(test)


def test_what_a_cancelled_receive_fetched_is_given_back_on_close() -> None:
    """A fetch that nobody took does not strand in the consumer that fetched it, and counts no attempt."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            waiting = asyncio.create_task(one.receive(10, 5.0))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])
            await here.publish(5)
            await one.close()
            two = await here.join(group)
            deliveries = await take(two, 5)

            assert {(delivery.attempt, delivery.suspect) for delivery in deliveries} == {(1, False)}
            assert [member.in_flight for member in await here.driver.members(here.name, "g")] == [5]
            await two.close()
            assert await here.driver.members(here.name, "g") == []

    run(test)


def test_a_message_that_waited_too_long_goes_to_another_member() -> None:
    """What a member fetched and nobody took is given back within seconds, not at the end of a long lease."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group(lease=60.0)
            one, two = await here.join(group), await here.join(group)
            waiting = asyncio.create_task(one.receive(10, 5.0))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])
            await here.publish(3)
            deliveries = await take(two, 3)

            assert {(delivery.attempt, delivery.suspect) for delivery in deliveries} == {(1, False)}
            await one.close()
            await two.close()

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

    run(test)


@pytest.mark.parametrize("what", ["group", "topic"])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_deleted_group_or_topic_ends_the_receive(what: str, waiting: bool) -> None:
    """A member of a group or topic that is deleted is told which of them is gone, whether it waits or comes later."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            deliveries = await take(consumer, 1)
            task = asyncio.create_task(consumer.receive(1, 10.0)) if waiting else None
            await asyncio.sleep(0.05)
            started = time.monotonic()
            if what == "group":
                await here.driver.delete_group(here.name, "g")
            else:
                await here.driver.delete_topic(here.name)
            expected = GroupMissingError if what == "group" else TopicMissingError
            with pytest.raises(expected):
                await (task or consumer.receive(1, 10.0))
            with pytest.raises(expected):
                await consumer.receive(1, 1.0)

            assert time.monotonic() - started < 6 + LATE
            assert here.ended == [deliveries[0].token]
            outcomes = await consumer.settle([Settlement(deliveries[0].token, Verb.ACK)])
            assert isinstance(outcomes[0], LeaseLostError)
            await consumer.close()

    run(test)


def test_settling_in_a_deleted_group_is_refused() -> None:
    """An ack that finds no consumer at the server is a lost lease, not a success."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(2)
            deliveries = await take(consumer, 2)
            await here.driver.delete_group(here.name, "g")
            outcomes = await consumer.settle([Settlement(delivery.token, Verb.ACK) for delivery in deliveries])

            assert [type(outcome) for outcome in outcomes] == [LeaseLostError] * 2
            await consumer.close()

    run(test)


def test_what_was_lent_to_a_lost_connection_comes_again() -> None:
    """Messages whose delivery was cut off on the way come again when their lease ends."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group(lease=1.0))
            waiting: asyncio.Task[list[RawDelivery]] | None = asyncio.create_task(consumer.receive(10, 5.0))
            await asyncio.sleep(0.05)
            proxy.deaf = True
            for number in range(3):
                await here.client.jetstream().publish(here.subject(), str(number).encode())
            async with asyncio.timeout(LIMIT):
                while not (await here.api(f"CONSUMER.INFO.{here.stream}.g"))["num_ack_pending"]:
                    await here.client.flush()
            proxy.cut()
            proxy.deaf = False
            seen: set[bytes] = set()
            async with asyncio.timeout(LIMIT):
                while len(seen) < 3:
                    try:
                        deliveries = await (waiting if waiting is not None else consumer.receive(10, 0.1))
                    except BrokerUnavailableError:
                        deliveries = []
                    waiting = None
                    seen |= {delivery.message.value for delivery in deliveries}
                    await end(consumer, deliveries)

            assert seen == {b"0", b"1", b"2"}
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
            # So that the stream of notes is there and a lost answer is that of the settle itself.
            await end(consumer, deliveries[:1], Verb.RELEASE)
            deliveries[0] = (await take(consumer, 1))[0]
            batch = [Settlement(deliveries[0].token, Verb.ACK), Settlement(deliveries[1].token, Verb.ACK)]
            proxy.deaf = True
            with pytest.raises(BrokerUnavailableError):
                await consumer.settle(batch)
            proxy.deaf = False
            assert await consumer.settle(batch) == [None, None]
            await end(consumer, deliveries[2:3], Verb.NACK, 0.5)
            await end(consumer, deliveries[3:])
            again = await take(consumer, 1)

            assert [(one.message.id, one.attempt) for one in again] == [(deliveries[2].message.id, 2)]
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
            group = await here.group(lease=1.0)
            consumer, other = await here.join(group), await here.join(group)
            await here.publish(1)
            deliveries = await take(consumer, 1)
            for _ in range(12):
                assert await consumer.extend([deliveries[0].token], 1.0) == [None]
                assert await other.receive(1, 0.25) == []

            assert sorted(member.in_flight or 0 for member in await here.driver.members(here.name, "g")) == [0, 1]
            await end(consumer, deliveries)
            await consumer.close()
            await other.close()

    run(test)


def test_an_ephemeral_group_sees_what_comes_and_leaves_nothing() -> None:
    """Each consumer of an ephemeral group gets all messages from its entry on, and no consumer stays at the server."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            await here.publish(1)
            ephemeral = GroupSpec(here.name, "x", ephemeral=True)
            one, two = await here.join(ephemeral), await here.join(ephemeral)
            await here.publish(2, first=1)
            assert ids(await take(one, 2)) == ids(await take(two, 2)) == ["1", "2"]
            assert await here.driver.groups(here.name) == []
            await one.close()
            await two.close()

            assert (await here.api(f"CONSUMER.LIST.{here.stream}"))["consumers"] in (None, [])

    run(test)


def test_an_ephemeral_group_that_was_swept_away_starts_again_with_a_gap() -> None:
    """A consumer whose ephemeral group was removed makes another and reports a loss of unknown size."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(GroupSpec(here.name, "x", ephemeral=True))
            assert await consumer.receive(1, 0) == []
            [swept] = (await here.api(f"CONSUMER.LIST.{here.stream}"))["consumers"]
            await here.api(f"CONSUMER.DELETE.{here.stream}.{swept['name']}")
            assert await consumer.receive(1, 2.0) == []
            await here.publish(1)

            assert ids(await take(consumer, 1)) == ["0"]
            assert [getattr(event, "count", 0) for event in here.events] == [None]
            await consumer.close()

    run(test)


def test_a_thousand_messages_two_groups_three_members() -> None:
    """Under nacks and uneven members, each group gets each of 1 000 messages acked exactly once."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            groups = [await here.group("a"), await here.group("b")]
            members = [(group.name, await here.join(group)) for group in groups for _ in range(3)]
            acked: dict[str, list[str]] = {"a": [], "b": []}

            async def work(name: str, number: int) -> None:
                consumer = members[number][1]
                while len(acked[name]) < 1000:
                    deliveries = await consumer.receive(10 + number, 0.3)
                    good = [one for one in deliveries if one.attempt > 1 or int(one.message.id) % 7]
                    await consumer.settle(
                        [Settlement(one.token, Verb.ACK if one in good else Verb.NACK) for one in deliveries]
                    )
                    acked[name] += ids(good)

            async with asyncio.TaskGroup() as tasks:
                for number, (name, _) in enumerate(members):
                    tasks.create_task(work(name, number))
                await here.publish(1000)

            everything = [str(number) for number in range(1000)]
            assert sorted(acked["a"], key=int) == sorted(acked["b"], key=int) == everything
            assert [(await here.driver.lag(here.name, name)).messages for name in "ab"] == [0, 0]
            for _, consumer in members:
                await consumer.close()

    run(test)


def test_a_lease_counts_from_the_call_also_for_what_was_lent_while_the_process_stood_still() -> None:
    """What lies unread was lent when it was sent: the server's lease begins anew before it is handed out."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group(lease=2.0))
            inner = consumer._inner  # type: ignore[attr-defined]
            loop = asyncio.get_running_loop()
            receiving = asyncio.create_task(consumer.receive(1, LIMIT))
            await asyncio.sleep(0)
            assert inner._lanes[0].open
            inner._wire.transport.pause_reading()
            await here.client.jetstream().publish(here.subject(), b"x")
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            # The time that the process stands still.
            await asyncio.sleep(0.4)
            began = loop.time()
            receiving = asyncio.create_task(consumer.receive(1, LIMIT))
            await asyncio.sleep(0)
            inner._wire.transport.resume_reading()
            (first,) = await receiving
            (again,) = await take(consumer, 1)

            assert (first.attempt, again.attempt) == (1, 2)
            assert loop.time() - began >= 2.0
            await end(consumer, [again])
            await consumer.close()

    run(test)
