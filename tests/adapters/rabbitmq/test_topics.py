"""Topics, groups and the registry on a real RabbitMQ: created once, described, deleted, refused, adopted."""

from __future__ import annotations

import asyncio
import zlib
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from tests.adapters.rabbitmq.support import LIMIT, end, ids, opened, quiet, receive, run, take, url
from unistream.config import parse_target
from unistream.driver.types import GroupSpec, RawDelivery, Retention, TopicSpec
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ConfigError,
    GroupMissingError,
    TopicMissingError,
    UnsupportedError,
)
from unistream_rabbitmq import RabbitDriver
from unistream_rabbitmq.delays import MAX_DELAY, step_for
from unistream_rabbitmq.errors import translated
from unistream_rabbitmq.names import LINE, LOCK, GroupQueues
from unistream_rabbitmq.registry import State

pytestmark = pytest.mark.rabbitmq


def test_what_was_created_is_what_stands() -> None:
    """A second creation returns the first one's settings; topics and groups are listed with them."""

    async def test() -> None:
        async with opened() as here, opened() as there:
            made = await here.topic(partitions=3, ordering="key")
            group = await here.group(ordering="key", lease=5.0, max_lease=50.0)
            again = await there.driver.create_topic(TopicSpec(here.name))
            other = await there.driver.create_group(GroupSpec(here.name, "g"))

            assert made == again == await there.driver.topic(here.name) == TopicSpec(here.name, 3, "key")
            assert group == other == GroupSpec(here.name, "g", "key", "latest", 5.0, 50.0)
            assert made in await there.driver.topics()
            assert await there.driver.groups(here.name) == [group]

    run(test)


def test_whoever_waits_for_the_registry_goes_on_when_its_holder_dies() -> None:
    """A foreign connection holds the lock; three clients stand in line, and all create once that connection is lost."""

    async def test() -> None:
        async with opened() as here, AsyncExitStack() as others:
            clients = [await others.enter_async_context(opened()) for _ in range(3)]
            await here.topic()  # there is a registry from here on
            holder = await asyncio.to_thread(pika.BlockingConnection, pika.URLParameters(url()))
            await asyncio.to_thread(holder.channel().queue_declare, LOCK, exclusive=True)
            waiting = [asyncio.create_task(client.topic()) for client in clients]
            async with asyncio.timeout(LIMIT):
                members = 0
                while members < len(clients):
                    members = await here.bare(_consumers_of_the_line)
                assert not any(task.done() for task in waiting)
                await asyncio.to_thread(holder.close)
                made = await asyncio.gather(*waiting)
            assert {spec.name for spec in made} <= {spec.name for spec in await here.driver.topics()}

    run(test)


def _consumers_of_the_line(channel: Any) -> int:
    try:
        return int(channel.queue_declare(LINE, passive=True).method.consumer_count)
    except ChannelClosedByBroker:
        return 0  # nobody waits yet


def test_a_late_answer_does_not_wipe_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose reads all come too late takes the registry for empty: what stands there stays."""

    async def test() -> None:
        async with opened() as here, opened() as late:
            made = await here.topic(partitions=3, ordering="key")
            reads = late.driver._registry
            in_time = reads._last
            answers = [None, None, None]

            async def answer(timeout: float) -> State | None:
                return answers.pop() if answers else await in_time(timeout)

            monkeypatch.setattr(reads, "_last", answer)
            await late.topic()
            assert not answers
            assert {made.name, late.name} <= {spec.name for spec in await here.driver.topics()}
            assert await late.driver.topic(here.name) == made

    run(test)


def test_a_queue_that_nobody_serves_just_now_is_unavailable() -> None:
    """RabbitMQ says 404 of it too; only what is not there is missing."""
    gone = ChannelClosedByBroker(404, "NOT_FOUND - no queue 'us.t.g' in vhost '/'")
    home = "NOT_FOUND - home node 'rabbit@a' of durable queue 'us.t.g' in vhost '/' is down or inaccessible"
    assert type(translated(gone, "join")) is TopicMissingError
    assert type(translated(ChannelClosedByBroker(404, home), "join")) is BrokerUnavailableError


def test_of_concurrent_creators_one_pins() -> None:
    """Ten clients create the same topic and group with different settings: all are told the same ones."""

    async def test() -> None:
        async with opened() as here, opened() as there:
            drivers = [here.driver, there.driver] * 5
            topics = await asyncio.gather(
                *(driver.create_topic(TopicSpec(here.name, at + 1)) for at, driver in enumerate(drivers))
            )
            groups = await asyncio.gather(
                *(
                    driver.create_group(GroupSpec(here.name, "g", lease=float(at + 1)))
                    for at, driver in enumerate(drivers)
                )
            )

            assert len(set(topics)) == len(set(groups)) == 1

    run(test)


def test_deleting_is_idempotent_and_leaves_nothing() -> None:
    """Topics and groups that do not exist are deleted already; their exchange and queues are gone."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(max_backlog=10)
            await here.group("a")
            await here.group("b")
            for _ in range(2):
                await here.driver.delete_group(here.name, "a")
            assert [group.name for group in await here.driver.groups(here.name)] == ["b"]
            for _ in range(2):
                await here.driver.delete_topic(here.name)
            with pytest.raises(TopicMissingError):
                await here.driver.topic(here.name)
            with pytest.raises(TopicMissingError):
                await here.driver.create_group(GroupSpec(here.name, "a"))
            await here.driver.delete_group(here.name, "b")
            for queue in (*GroupQueues(topic, "a", ordered=False).all, *GroupQueues(topic, "b", ordered=False).all):
                with pytest.raises(pika.exceptions.ChannelClosedByBroker):
                    await here.bare(lambda channel, queue=queue: channel.queue_declare(queue, passive=True))

    run(test)


def test_nothing_published_after_the_creation_is_lost() -> None:
    """A group gets what was published between its creation and its first member."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            await here.publish(2)
            group = await here.group()
            await here.publish(3, first=2)
            consumer = await here.join(group)
            deliveries = await take(consumer, 3)

            assert ids(deliveries) == ["2", "3", "4"]
            await end(consumer, deliveries)
            await quiet(consumer)
            await consumer.close()

    run(test)


def test_a_waiting_member_is_told_that_its_group_or_topic_was_deleted() -> None:
    """A deleted group is GroupMissingError, a deleted topic TopicMissingError, within dead_peer_after."""

    async def test() -> None:
        async with opened() as here:
            for whole in (False, True):
                await here.topic()
                consumer = await here.join(await here.group())
                kind: type[Exception]
                if whole:
                    kind = TopicMissingError
                    await here.driver.delete_topic(here.name)
                else:
                    kind = GroupMissingError
                    await here.driver.delete_group(here.name, "g")
                with pytest.raises(kind):
                    await receive(consumer, 1, here.driver.capabilities.lease.dead_peer_after)
                await consumer.close()

    run(test)


def test_a_lag_of_what_is_missing_is_an_error() -> None:
    """Lag and members of a group or topic that does not exist say which."""

    async def test() -> None:
        async with opened() as here:
            with pytest.raises(TopicMissingError):
                await here.driver.lag(here.name, "g")
            await here.topic()
            with pytest.raises(GroupMissingError):
                await here.driver.lag(here.name, "g")
            with pytest.raises(GroupMissingError):
                await here.driver.members(here.name, "g")

    run(test)


def test_what_rabbitmq_cannot_keep_is_refused() -> None:
    """Starts in the past, seek, retention and dropping the oldest are no capabilities, with a note each."""

    async def test() -> None:
        async with opened() as here:
            capabilities = here.driver.capabilities

            assert capabilities.start.at == {"latest"}
            assert not capabilities.seek
            assert not capabilities.retention
            assert capabilities.max_backlog.overflow == {"reject"}
            assert all(capability.note for _, capability in capabilities if not capability)
            assert capabilities.durability.kind == "fsync"
            assert capabilities.product.startswith("RabbitMQ 3.") or capabilities.product.startswith("RabbitMQ 4.")
            with pytest.raises(UnsupportedError):
                capabilities.require({"lease": "message"})

    run(test)


def test_an_exchange_of_a_foreign_program_is_a_topic() -> None:
    """A fanout exchange `us.NAME` that others declared can be joined and published to."""

    async def test() -> None:
        async with opened() as here:
            await here.bare(lambda channel: channel.exchange_declare(f"us.{here.name}", "fanout", durable=True))
            assert await here.driver.topic(here.name) == TopicSpec(here.name)
            consumer = await here.join(await here.group())
            await here.foreign(b"theirs")
            deliveries: list[RawDelivery] = await take(consumer, 1)

            assert deliveries[0].message.value == b"theirs"
            await end(consumer, deliveries)
            await consumer.close()

    run(test)


def test_a_registry_of_a_newer_format_is_refused() -> None:
    """What a later version wrote is an error that says so."""
    with pytest.raises(UnsupportedError, match="format 2"):
        State.decode(zlib.compress(b'{"format": 2, "topics": {}}'))


def test_the_registry_keeps_every_setting() -> None:
    """Topics and groups come out of the registry as they went in, also a start in time; unfinished ones are missing."""
    state = State()
    topic = TopicSpec("t", 4, "key", Retention(max_age=3.0), 7)
    group = GroupSpec("t", "g", "key", datetime(2026, 1, 2, tzinfo=UTC), 1.5, 2.5)
    state.put_topic(topic, ready=True)
    state.put_group(group, ready=True)
    state.put_group(GroupSpec("t", "half"), ready=False)
    read = State.decode(state.encode())

    assert read is not None
    assert read.topic("t") == topic
    assert read.groups("t") == [group]
    assert read.group("t", "half") is None


def test_names_never_meet_and_fit() -> None:
    """Dots in names separate nothing, and the longest names stay within AMQP's 255 bytes, each its own."""
    longest = "x" * 199
    names = [
        GroupQueues(TopicSpec(topic, 5), group, ordered=True).ledger(4)
        for topic in ("a.b", "a", longest + "1", longest + "2")
        for group in ("c", "b.c", longest + "1", longest + "2")
    ]

    assert len(set(names)) == len(names)
    assert max(len(name) for name in names) <= 255


def test_a_delay_is_rounded_up_by_less_than_is_allowed() -> None:
    """Of any delay the queue that holds it is not early, and late by no more than half a second or 8 %."""
    for delay in (0.001, 0.25, 0.3, 1.0, 1.9, 9.99, 10.0, 10.01, 300.0, 3599.0, 86400.0, MAX_DELAY):
        held = step_for(delay) / 1000

        assert delay <= held <= delay + max(0.5, 0.08 * delay)


@pytest.mark.parametrize(
    "address", ["amqp://a,b", "amqp://h?heartbeat=0", "amqp://h?nonsense=1", "amqps://h?ca_file=/-"]
)
def test_bad_urls_are_refused_before_any_connection(address: str) -> None:
    """Several hosts, a heartbeat out of range, an unknown option or a missing file are errors of the configuration."""

    async def test() -> None:
        with pytest.raises(ConfigError):
            await RabbitDriver(parse_target(address, RabbitDriver), lambda event: None).open()

    run(test)


def test_a_dead_server_is_unavailable_and_wrong_credentials_are_refused() -> None:
    """Nobody listens: unavailable within connect_timeout; a wrong password is an AccessError that does not show it."""

    async def test() -> None:
        dead = RabbitDriver(parse_target("amqp://127.0.0.1:9?connect_timeout=1", RabbitDriver), lambda event: None)
        async with asyncio.timeout(5):
            with pytest.raises(BrokerUnavailableError):
                await dead.open()
        wrong = url().replace("guest:guest", "guest:s3cret")
        with pytest.raises(AccessError) as refused:
            await RabbitDriver(parse_target(wrong, RabbitDriver), lambda event: None).open()

        assert "s3cret" not in str(refused.value)

    run(test)
