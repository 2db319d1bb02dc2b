"""Topics, groups, places to start, seek, lag, foreign messages, removal and capabilities on a real NATS."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import pytest

from tests.adapters.nats.support import LIMIT, end, ids, opened, proxied, quiet, run, take, url
from tests.adapters.support import LATE
from unistream.driver.types import (
    Connected,
    Disconnected,
    GroupSpec,
    RawDelivery,
    RawMessage,
    Retention,
    TopicSpec,
    Verb,
)
from unistream.errors import (
    BrokerUnavailableError,
    ConfigError,
    GroupMissingError,
    TopicMissingError,
    UnsupportedError,
)

pytestmark = pytest.mark.nats


def test_a_topic_is_created_once_with_all_its_settings() -> None:
    """Creating twice returns what the first one declared; topics lists it; deleting twice succeeds."""

    async def test() -> None:
        async with opened() as here:
            spec = TopicSpec(here.name, 4, "key", Retention(max_age=3600.5, max_messages=10, max_bytes=10**6))
            assert await here.driver.create_topic(spec) == spec
            assert await here.driver.create_topic(TopicSpec(here.name)) == spec
            assert await here.driver.topic(here.name) == spec
            assert spec in await here.driver.topics()
            await here.group()
            await here.driver.delete_topic(here.name)
            await here.driver.delete_topic(here.name)
            await here.driver.delete_group(here.name, "g")

            assert spec not in await here.driver.topics()
            with pytest.raises(TopicMissingError):
                await here.driver.topic(here.name)
            with pytest.raises(TopicMissingError):
                await here.group()
            with pytest.raises(TopicMissingError):
                await here.driver.groups(here.name)

    run(test)


def test_concurrent_creators_agree() -> None:
    """Of concurrent creators of a topic and a group, with different settings, all see the one that won."""

    async def test() -> None:
        async with opened() as here:
            topics = await asyncio.gather(
                *(here.driver.create_topic(TopicSpec(here.name, max_backlog=number)) for number in range(1, 9))
            )
            groups = await asyncio.gather(
                *(here.driver.create_group(GroupSpec(here.name, "g", start=start)) for start in ("latest", "earliest"))
            )

            assert len(set(topics)) == len(set(groups)) == 1

    run(test)


def test_names_do_not_collide() -> None:
    """Topics and groups whose names differ in dots only are different."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            names = ["a.b", "a-b", "a_b", "a..b", "A.b"]
            for name in names:
                await here.group(name)

            assert sorted(names) == [group.name for group in await here.driver.groups(here.name)]

    run(test)


def test_groups_start_where_they_are_told() -> None:
    """latest, earliest, a time and a position begin exactly there; the time and the position are inclusive."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            earliest = await here.join(await here.group("first", start="earliest"))
            for number in range(6):
                await here.publish(1, first=number)
            deliveries = await take(earliest, 6)
            third, fourth = deliveries[2], deliveries[3]
            stamp = datetime.fromtimestamp(fourth.published_at or 0, UTC)
            starts = {
                "time": stamp,
                "position": third.position or "",
                "earliest": "earliest",
                "latest": "latest",
                "future": "100000",
            }
            expected = {"time": "345", "position": "2345", "earliest": "012345", "latest": "", "future": ""}
            for name, start in starts.items():
                consumer = await here.join(await here.group(name, start=start))
                wanted = list(expected[name])
                assert ids(await take(consumer, len(wanted))) == wanted
                await quiet(consumer)
                await consumer.close()
            with pytest.raises(ConfigError):
                await here.group("wrong", start="1-0")
            await earliest.close()

    run(test)


@pytest.mark.parametrize("ordering", ["none", "key"])
def test_seek_moves_a_group_without_members(ordering: str) -> None:
    """After seek the next delivery is the place asked for, attempts are forgotten; with members it refuses."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2, ordering=ordering, retention=Retention(max_age=3600))
            group = await here.group(ordering=ordering)
            consumer = await here.join(group)
            await here.publish(4, key=b"a", partition=1)
            seen: list[RawDelivery] = []
            while len(seen) < 4:
                deliveries = await take(consumer, 1)
                seen += deliveries
                await end(consumer, deliveries)
            with pytest.raises(UnsupportedError, match="joined"):
                await here.driver.seek(here.name, "g", "earliest")
            await consumer.close()
            places = {"earliest": 0, seen[2].position or "": 2, "latest": 4}
            for place, left in places.items():
                await here.driver.seek(here.name, "g", place)

                assert await here.driver.lag(here.name, "g") == (4 - left, True)
            await here.driver.seek(here.name, "g", seen[2].position or "")
            consumer = await here.join(group)
            (delivery,) = await take(consumer, 1)

            assert (delivery.message.id, delivery.attempt) == ("2", 1)
            assert await here.driver.groups(here.name) == [group]
            await consumer.close()
            with pytest.raises(GroupMissingError):
                await here.driver.seek(here.name, "other", "earliest")

    run(test)


def test_foreign_messages_are_delivered_and_ours_are_readable() -> None:
    """What a bare client publishes comes with its headers; a bare client reads what we publish, key and headers too."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2)
            consumer = await here.join(await here.group())
            stream = here.client.jetstream()
            await stream.publish(here.subject(1), b"bare")
            await stream.publish(here.subject(0), b"", headers={"Color": "blue", "Nats-Msg-Id": "7"})
            await stream.publish(here.subject(0)[:-1] + "other.place", b"elsewhere")
            await stream.publish(here.subject(1), b"keyed", headers={"unistream-key": "k/%FF%20", "a": "1"})
            deliveries = await take(consumer, 4)
            assert [one.message for one in deliveries] == [
                RawMessage("", b"bare", None, (), 1),
                RawMessage("", b"", None, (("Color", b"blue"), ("Nats-Msg-Id", b"7")), 0),
                RawMessage("", b"elsewhere", None, (), 0),
                RawMessage("", b"keyed", b"k/\xff ", (("a", b"1"),), 1),
            ]
            await end(consumer, deliveries)

            sent = RawMessage("id 1", b"\x00body", b"k/\xff ", (("a", b"1"), ("B-c", b"x y")), 1)
            odd = RawMessage("2", b"", b"", (("a", b"1"), ("a", b"\xff"), ("", b" ")), 0)
            producer = await here.produce()
            await producer.publish([sent, odd], LIMIT)
            assert [one.message for one in await take(consumer, 2)] == [sent, odd]
            raw = await stream.get_msg(here.stream, 5)

            assert raw.subject == here.subject(1)
            assert raw.data == b"\x00body"
            assert raw.headers == {
                "Nats-Msg-Id": "id%201",
                "a": "1",
                "B-c": "x y",
                "unistream-id": "id 1",
                "unistream-v": "1",
                "unistream-key": "k/%FF%20",
            }
            await producer.close()
            await consumer.close()

    run(test)


def test_a_foreign_stream_and_consumer_are_adopted() -> None:
    """A stream and a durable pull consumer made by other tools are a topic and a group."""

    async def test() -> None:
        async with opened() as here:
            await here.api(
                f"STREAM.CREATE.{here.stream}",
                name=here.stream,
                subjects=[here.subject(0)[:-1] + ">"],
                storage="file",
                max_msgs=1000,
            )
            config = {"durable_name": "ops", "ack_policy": "explicit", "ack_wait": 5 * 10**9, "max_ack_pending": 10}
            await here.api(f"CONSUMER.DURABLE.CREATE.{here.stream}.ops", stream_name=here.stream, config=config)
            assert await here.driver.topic(here.name) == TopicSpec(here.name, retention=Retention(max_messages=1000))
            [group] = await here.driver.groups(here.name)
            assert (group.name, group.lease) == ("ops", 5.0)
            consumer = await here.join(group)
            await here.publish(3)
            await end(consumer, await take(consumer, 3))

            assert await here.driver.lag(here.name, "ops") == (0, True)
            await consumer.close()

    run(test)


def test_what_every_group_has_settled_is_removed_and_nothing_else() -> None:
    """Members purge up to the slowest group's place; a group without members keeps what it has not seen."""

    async def test() -> None:
        async with opened(url() + "?keep_settled=0") as here:
            await here.topic()
            consumer = await here.join(await here.group("quick"))
            slow = await here.group("slow")
            await here.publish(10)
            deliveries = await take(consumer, 10)
            await end(consumer, deliveries)
            other = await here.join(slow)
            mine = await take(other, 10)
            await end(other, mine[:4] + mine[5:])
            async with asyncio.timeout(LIMIT):
                while (await here.state())["first_seq"] == 1:
                    await asyncio.gather(consumer.receive(1, 0.2), other.receive(1, 0.2))
            assert (await here.state())["first_seq"] == 5
            await end(other, mine[4:5])
            async with asyncio.timeout(LIMIT):
                while (await here.state())["messages"]:
                    await consumer.receive(1, 0.2)

            assert here.lost == 0
            await consumer.close()
            await other.close()

    run(test)


def test_removing_what_is_settled_loses_no_redelivery() -> None:
    """What a member gave back while nobody pulls is lent at once to the next one, though something was settled."""

    async def test() -> None:
        async with opened(url() + "?keep_settled=0") as here:
            await here.topic()
            group = await here.group(lease=60.0)
            consumer = await here.join(group)
            await here.publish(10)
            deliveries = await take(consumer, 10)
            await end(consumer, deliveries[:5])
            await end(consumer, deliveries[5:], Verb.RELEASE)
            await consumer.close()
            watcher = await here.join(await here.group("watcher"))
            # Longer than the time between two looks of a member at what can be removed.
            assert await watcher.receive(1, 6.0) == []
            consumer = await here.join(group)

            assert sorted(ids(await take(consumer, 5))) == ["5", "6", "7", "8", "9"]
            await watcher.close()
            await consumer.close()

    run(test)


@pytest.mark.parametrize("joined", [True, False])
def test_what_retention_removed_unread_is_reported(joined: bool) -> None:
    """Messages that a declared limit removed before the group read them are a DataLoss with their number."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(retention=Retention(max_messages=10))
            group = await here.group()
            consumer = await here.join(group)
            await here.publish(2)
            await end(consumer, await take(consumer, 2))
            if not joined:
                await consumer.close()
            await here.publish(30, first=2)
            if not joined:
                consumer = await here.join(group)
            deliveries = await take(consumer, 10)
            await quiet(consumer)

            assert ids(deliveries) == [str(number) for number in range(22, 32)]
            assert here.lost == 20
            await consumer.close()

    run(test)


def test_a_foreign_purge_is_reported() -> None:
    """Messages that somebody purged before the group read them are a DataLoss with their number."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(5)
            await here.api(f"STREAM.PURGE.{here.stream}", seq=4)
            deliveries = await take(consumer, 2)
            await consumer.receive(1, 0.1)

            assert ids(deliveries) == ["3", "4"]
            assert here.lost == 3
            await consumer.close()

    run(test)


def test_capabilities_say_what_the_server_is() -> None:
    """Product, durability and size come from the live server, and what is not offered says so."""

    async def test() -> None:
        async with opened() as here:
            capabilities = here.driver.capabilities
            assert capabilities.product.startswith("NATS 2.")
            assert capabilities.durability.kind == "process_crash"
            assert capabilities.max_message_bytes.limit == here.client.max_payload - 1024
            assert not capabilities.fencing
            assert capabilities.lease.dead_peer_after == 10.0
        async with opened(url() + "?replicas=3") as here:
            assert here.driver.capabilities.durability.satisfies("replicated(3)")

    run(test)


def test_a_dead_server_is_an_error_in_time() -> None:
    """Where nobody answers, open raises within the connect timeout."""

    async def test() -> None:
        async with proxied() as (_, proxy):
            proxy.freeze()
            started = time.monotonic()
            with pytest.raises(BrokerUnavailableError):
                async with opened(url() + "?connect_timeout=0.5", proxy.driver):
                    pytest.fail("opened through a frozen proxy")

            assert time.monotonic() - started < LATE

    run(test)


def test_a_lost_connection_is_an_event_and_heals() -> None:
    """Cutting the connections emits Disconnected, the next calls Connected, and everything works again."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(3)
            deliveries = await take(consumer, 3)
            proxy.cut()
            async with asyncio.timeout(LIMIT):
                while not any(isinstance(event, Disconnected) for event in here.events):
                    await here.client.flush()
            await end(consumer, deliveries[:1], Verb.NACK)
            await end(consumer, deliveries[1:])
            await here.publish(1, first=3)
            await end(consumer, await take(consumer, 2))

            assert any(isinstance(event, Connected) for event in here.events)
            assert await here.driver.lag(here.name, "g") == (0, True)
            await consumer.close()

    run(test)


def test_a_purge_under_an_ordered_group_is_reported() -> None:
    """Unread messages of a partition that somebody purged are a DataLoss, though another partition is not touched."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2, ordering="key")
            consumer = await here.join(await here.group(ordering="key"))
            await here.publish(6, key=b"a", partition=1)
            held = await take(consumer, 1)
            async with asyncio.timeout(LIMIT):
                # Until the member has seen that five wait.
                while not any(lane._looked[1] == 5 for lane in consumer._lanes):
                    await consumer.extend([held[0].token], 30.0)
                    await asyncio.sleep(0.1)
                await here.api(f"STREAM.PURGE.{here.stream}", filter=here.subject(1))
                while not here.lost:
                    await consumer.receive(1, 0.2)

            assert here.lost == 5
            await consumer.close()

    run(test)
