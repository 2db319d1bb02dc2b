"""Publishing to a real NATS: confirms, refusals, unknown outcomes, deduplication, bounded backlogs."""

from __future__ import annotations

import asyncio

import pytest

from tests.adapters.nats.support import LIMIT, end, ids, message, opened, proxied, run, take
from unistream.driver.types import PublishOutcome, RawMessage, Receipt, Retention
from unistream.errors import (
    BrokerUnavailableError,
    PublishUnknownError,
    TooLargeError,
    TopicFullError,
    TopicMissingError,
    UnsupportedError,
)
from unistream_nats.producer import NatsProducer

pytestmark = pytest.mark.nats


async def publish(producer: NatsProducer, first: int, count: int, timeout: float = LIMIT) -> list[PublishOutcome]:
    """Publish one batch of numbered messages."""
    return await producer.publish([message(number) for number in range(first, first + count)], timeout)


def test_batches_are_stored_in_the_order_of_the_calls() -> None:
    """Two outstanding batches, over and over, lie in the stream in the order of the calls, with rising positions."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            producer = await here.produce()
            positions = []
            for first in range(0, 600, 100):
                one, two = await asyncio.gather(publish(producer, first, 50), publish(producer, first + 50, 50))
                positions += [outcome.position for outcome in [*one, *two] if isinstance(outcome, Receipt)]

            assert await here.bodies() == [str(number).encode() for number in range(600)]
            assert positions == [str(number) for number in range(1, 601)]
            await producer.close()

    run(test)


def test_a_missing_topic_is_refused() -> None:
    """Publishing to a topic that was deleted is TopicMissingError, surely not stored."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            producer = await here.produce()
            await here.driver.delete_topic(here.name)
            outcomes = await publish(producer, 0, 2)

            assert all(isinstance(outcome, TopicMissingError) and outcome.stored == "no" for outcome in outcomes)
            with pytest.raises(TopicMissingError):
                await here.produce()
            await producer.close()

    run(test)


def test_what_was_sent_and_not_answered_is_unknown_and_stored_once_when_repeated() -> None:
    """When the connection is cut before the answer, or no answer comes in time, repeating stores nothing twice."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            producer = await here.produce()
            proxy.deaf = True
            late = await publish(producer, 0, 3, timeout=0.3)
            cut = await publish(producer, 3, 3)
            proxy.deaf = False
            again = await publish(producer, 0, 6)
            after = await publish(producer, 6, 3)

            assert all(isinstance(outcome, PublishUnknownError) for outcome in [*late, *cut])
            assert [outcome.duplicate for outcome in again if isinstance(outcome, Receipt)] == [True] * 6
            assert all(isinstance(outcome, Receipt) for outcome in after)
            assert await here.bodies() == [str(number).encode() for number in range(9)]
            await producer.close()

    run(test)


def test_without_a_connection_nothing_is_handed_over_and_the_order_holds() -> None:
    """While NATS can't be reached every outstanding batch raises, and none of them is sent later."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            producer = await here.produce()
            proxy.refuse = True
            proxy.cut()
            one = asyncio.create_task(publish(producer, 0, 2))
            two = asyncio.create_task(publish(producer, 2, 2))
            outcomes = await asyncio.gather(one, two, return_exceptions=True)
            proxy.refuse = False
            # Written to a connection that was being cut is unknown; what came later found none.
            assert isinstance(outcomes[1], BrokerUnavailableError) or isinstance(outcomes[0], list)
            await publish(producer, 0, 2)
            await publish(producer, 2, 2)

            assert await here.bodies() == [b"0", b"1", b"2", b"3"]
            await producer.close()

    run(test)


def test_what_a_frozen_server_did_not_take_is_dropped_with_the_connection() -> None:
    """A message that was refused because the server is away is never executed after it is back."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            producer = await here.produce()
            proxy.refuse = True
            proxy.cut()
            async with asyncio.timeout(LIMIT):
                while True:
                    try:
                        outcomes = await publish(producer, 0, 1, timeout=1.0)
                    except BrokerUnavailableError:
                        break
                    assert isinstance(outcomes[0], PublishUnknownError)
            before = await here.bodies()
            with pytest.raises(BrokerUnavailableError):
                await publish(producer, 1, 1, timeout=1.0)
            proxy.refuse = False
            await publish(producer, 2, 1)

            assert await here.bodies() == [*before, b"2"]
            await producer.close()

    run(test)


def test_a_cancelled_publish_shifts_no_other_receipt() -> None:
    """Cancelling one of two outstanding batches leaves the other its own receipts."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            producer = await here.produce()
            one = asyncio.create_task(publish(producer, 0, 50))
            two = asyncio.create_task(publish(producer, 50, 50))
            await asyncio.sleep(0)
            one.cancel()
            receipts = await two
            bodies = await here.bodies()

            assert [bodies[int(outcome.position or 0) - 1] for outcome in receipts if isinstance(outcome, Receipt)] == [
                str(number).encode() for number in range(50, 100)
            ]
            await producer.close()

    run(test)


def test_one_oversize_message_fails_alone() -> None:
    """Of a batch only the message too large for the server is refused; headers count, and the connection lives."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            producer = await here.produce()
            limit = int(here.driver.capabilities.max_message_bytes.limit)
            fits = RawMessage("fits", b"x" * limit, None, (), 0)
            large = RawMessage("large", b"x" * (limit + 1), None, (), 0)
            by_key = RawMessage("key", b"x" * (limit - 1000), b"\xff" * 1000, (), 0)
            by_headers = RawMessage("headers", b"x", None, (("a", b"\xff" * limit),), 0)
            outcomes = []
            for one in (fits, large, by_key, by_headers):
                outcomes += await producer.publish([message(1), one], LIMIT)

            assert [type(outcome) for outcome in outcomes[1::2]] == [Receipt, *[TooLargeError] * 3]
            assert all(isinstance(outcome, Receipt) for outcome in outcomes[::2])
            assert not here.events
            await producer.close()

    run(test)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_full_topic_refuses_until_the_slowest_group_settles(groups: int) -> None:
    """`max_backlog` counts what some group has not settled, settled ones between unsettled ones not."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(max_backlog=5)
            members = [await here.join(await here.group(f"g{number}")) for number in range(groups)]
            producer = await here.produce()
            outcomes = await publish(producer, 0, 7)
            assert [type(outcome) for outcome in outcomes] == [*[Receipt] * 5, *[TopicFullError] * 2]
            assert {outcome.stored for outcome in outcomes[5:] if isinstance(outcome, TopicFullError)} == {"no"}
            for consumer in members:
                assert isinstance((await publish(producer, 7, 1))[0], TopicFullError)
                deliveries = await take(consumer, 5)
                # The oldest stays, what is behind it makes room.
                await end(consumer, deliveries[1:3])
            async with asyncio.timeout(LIMIT):
                while (await here.state())["messages"] != 3:
                    await here.client.flush()
            outcomes = await publish(producer, 8, 3)

            assert [type(outcome) for outcome in outcomes] == [Receipt, Receipt, TopicFullError]
            for consumer in members:
                assert ids(await take(consumer, 2)) == ["8", "9"]
                await consumer.close()
            await producer.close()

    run(test)


def test_what_a_backlog_limit_can_not_do_is_refused() -> None:
    """Dropping the oldest, and a limit beside a retention by size, are UnsupportedError."""

    async def test() -> None:
        async with opened() as here:
            with pytest.raises(UnsupportedError, match="max_backlog"):
                await here.topic(max_backlog=5, retention=Retention(max_messages=3))
            assert here.driver.capabilities.max_backlog.overflow == {"reject"}

    run(test)


def test_a_topic_in_memory_is_refused_by_producers() -> None:
    """A stream that is less durable than the capability says is not published to."""

    async def test() -> None:
        async with opened() as here:
            await here.api(
                f"STREAM.CREATE.{here.stream}", name=here.stream, subjects=[here.subject(0)], storage="memory"
            )
            with pytest.raises(UnsupportedError, match="memory"):
                await here.produce()

    run(test)
