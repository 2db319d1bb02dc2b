"""Topics and groups on a real Kafka: what is declared, what the cluster keeps of it, where groups begin."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.structs import OffsetAndMetadata

from tests.adapters.kafka.support import end, ids, opened, quiet, run, take, url
from unistream.config import parse_target
from unistream.driver.types import GroupSpec, Retention, TopicSpec
from unistream.errors import (
    BrokerUnavailableError,
    ConfigError,
    GroupMissingError,
    TopicMissingError,
    UnsupportedError,
)
from unistream_kafka import KafkaDriver
from unistream_kafka.registry import group_id
from unistream_kafka.topics import substitute

pytestmark = pytest.mark.kafka


def test_a_topic_keeps_its_declaration() -> None:
    """Partitions, ordering and retention come back as declared; creating again tells how the topic stands."""

    async def test() -> None:
        async with opened() as here:
            spec = TopicSpec(here.name, 3, "key", Retention(max_age=3600.0, max_bytes=10_000_000))

            assert await here.driver.create_topic(spec) == spec
            assert await here.driver.create_topic(spec) == spec
            assert await here.driver.create_topic(TopicSpec(here.name, 5)) == TopicSpec(
                here.name, 3, "key", Retention(max_age=3600.0, max_bytes=10_000_002)
            )
            assert await here.driver.topic(here.name) == TopicSpec(
                here.name, 3, "key", Retention(max_age=3600.0, max_bytes=10_000_002)
            )
            assert here.name in [topic.name for topic in await here.driver.topics()]

    run(test)


def test_names_that_kafka_takes_for_the_same_are_two_topics() -> None:
    """`a.b` and `a_b` stand beside each other; the one that came later has another name inside Kafka."""

    async def test() -> None:
        async with opened() as here:
            names = [f"{here.name}.b", f"{here.name}_b"]
            try:
                for count, name in enumerate(names, 1):
                    assert await here.driver.create_topic(TopicSpec(name, count)) == TopicSpec(name, count)
                for count, name in enumerate(names, 1):
                    assert await here.driver.create_topic(TopicSpec(name, count)) == TopicSpec(name, count)
                    assert (await here.driver.topic(name)).partitions == count
                listed = [topic.name for topic in await here.driver.topics() if topic.name.startswith(here.name)]
                admin = KafkaAdminClient(bootstrap_servers=here.address)
                stored = {name for name in admin.list_topics() if name in (*names, substitute(names[1]))}
                admin.close()

                assert listed == names
                assert stored == {names[0], substitute(names[1])}

                await here.driver.delete_topic(names[0])

                assert (await here.driver.create_topic(TopicSpec(names[1], 2))).partitions == 2
                with pytest.raises(TopicMissingError):
                    await here.driver.topic(names[0])
            finally:
                for name in names:
                    await here.driver.delete_topic(name)

    run(test)


def test_a_topic_without_retention_keeps_everything() -> None:
    """Nothing declared means that nothing unsettled is ever removed: Kafka's seven days are turned off."""

    async def test() -> None:
        async with opened() as here:
            assert (await here.topic()).retention == Retention()
            assert (await here.driver.topic(here.name)).retention == Retention()

    run(test)


def test_a_foreign_topic_is_adopted() -> None:
    """A topic that another program made has its partitions, its retention, and order by key."""

    async def test() -> None:
        async with opened() as here:
            admin = here.driver.native
            configs = {"retention.ms": "5000"}
            await asyncio.to_thread(admin.create_topics, {here.name: {"num_partitions": 2, "configs": configs}})

            assert await here.driver.topic(here.name) == TopicSpec(here.name, 2, "key", Retention(max_age=5.0))

    run(test)


def test_what_does_not_exist_is_missing_and_deleting_it_succeeds() -> None:
    """Every call on a missing topic or group says which of them is missing; deletions succeed."""

    async def test() -> None:
        async with opened() as here:
            driver = here.driver
            for call in (
                driver.topic(here.name),
                driver.producer(TopicSpec(here.name)),
                driver.groups(here.name),
                driver.lag(here.name, "g"),
                driver.create_group(GroupSpec(here.name, "g")),
            ):
                with pytest.raises(TopicMissingError):
                    await call
            await driver.delete_topic(here.name)
            await driver.delete_group(here.name, "g")
            topic = await here.topic()
            for call in (
                driver.lag(here.name, "g"),
                driver.members(here.name, "g"),
                driver.seek(here.name, "g", "earliest"),
                driver.consumer(GroupSpec(here.name, "g"), topic, max_in_flight=1, lost=lambda tokens, why: None),
            ):
                with pytest.raises(GroupMissingError):
                    await call
            await driver.delete_group(here.name, "g")

    run(test)


def test_a_group_keeps_its_declaration() -> None:
    """What was declared first stands, whatever a later creator asks for, and is listed."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            first = GroupSpec(here.name, "a.b", "key", datetime(2020, 1, 1, tzinfo=UTC), 12.0, 24.0)

            assert await here.driver.create_group(first) == first
            assert await here.group("a.b") == first
            assert await here.driver.groups(here.name) == [first]
            await here.driver.delete_group(here.name, "a.b")
            assert await here.driver.groups(here.name) == []

    run(test)


def test_of_concurrent_creators_one_pins() -> None:
    """Creators with different settings, on connections of their own, all get the settings and the place of one."""

    async def test() -> None:
        async with opened() as here, opened() as there, opened() as elsewhere:
            await here.topic(partitions=2)
            await here.publish(5)
            made = await asyncio.gather(
                *(
                    each.driver.create_group(GroupSpec(here.name, "g", "none", start, lease))
                    for each, start, lease in (
                        (here, "latest", 10.0),
                        (there, "earliest", 20.0),
                        (elsewhere, "latest", 30.0),
                    )
                )
            )

            assert made[0] == made[1] == made[2]
            assert await there.driver.groups(here.name) == [made[0]]
            expected = 5 if made[0].start == "earliest" else 0
            assert await here.driver.lag(here.name, "g") == (expected, True)

    run(test)


def test_nothing_published_after_creation_is_lost() -> None:
    """A group begins where it was created, though its first member comes later; what was before is not its own."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2)
            await here.publish(3)
            group = await here.group()
            await here.publish(3, first=3, partition=1)
            await here.publish(3, first=6)
            consumer = await here.join(group)

            assert sorted(ids(await take(consumer, 6))) == ["3", "4", "5", "6", "7", "8"]
            await quiet(consumer)
            await consumer.close()

    run(test)


@pytest.mark.parametrize("how", ["earliest", "latest", "time", "position"])
def test_a_group_begins_and_is_moved_to_any_place(how: str) -> None:
    """Start and seek know the first message, the end, a time, and a position of a receipt."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=2)
            await here.publish(4)
            await here.publish(4, first=4, partition=1)
            stored = sorted(await here.stored(2), key=lambda one: (one.partition, one.offset))
            wanted: Any = {
                "earliest": "earliest",
                "latest": "latest",
                "time": datetime.fromtimestamp(stored[4].timestamp / 1000, UTC),
                "position": "0/2",
            }[how]
            expected = {
                "earliest": list(range(8)),
                "latest": [],
                "time": [n for n in range(8) if stored[n].timestamp >= stored[4].timestamp],
                "position": [2, 3, *(n for n in range(4, 8) if stored[n].timestamp >= stored[2].timestamp)],
            }[how]
            await here.group("made", start=wanted)
            await here.group("moved", start="earliest" if how == "latest" else "latest")
            await here.driver.seek(here.name, "moved", wanted)
            for name in ("made", "moved"):
                consumer = await here.join(GroupSpec(here.name, name))
                deliveries = await take(consumer, len(expected))

                assert sorted(int(number) for number in ids(deliveries)) == expected
                await end(consumer, deliveries)
                await quiet(consumer)
                await consumer.close()

    run(test)


def test_seeking_forgets_what_was_settled() -> None:
    """A group that is moved back gets what it had settled again, with attempt 1; with members it is refused."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(4)
            deliveries = await take(one, 4)
            await end(one, [deliveries[0], deliveries[2], deliveries[3]])
            with pytest.raises(UnsupportedError):
                await here.driver.seek(here.name, "g", "earliest")
            assert await here.driver.lag(here.name, "g") == (1, True)
            await one.close()
            await here.driver.seek(here.name, "g", "earliest")
            two = await here.join(group)
            again = await take(two, 4)

            assert [(one.message.id, one.attempt) for one in again] == [(str(n), 1) for n in range(4)]
            await two.close()

    run(test)


def test_a_position_that_is_none_is_refused() -> None:
    """Text that no receipt of this backend ever held, or a partition that is not there, is an error of the caller."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            for nonsense in ("17-0", "0/x", "5/0", ""):
                with pytest.raises(ConfigError):
                    await here.group(start=nonsense)
            assert await here.driver.groups(here.name) == []

    run(test)


def test_a_group_of_foreign_tools_is_adopted_where_it_stands() -> None:
    """Offsets that another program committed for `topic.group` are where the group goes on."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            await here.publish(5)
            admin: KafkaAdminClient = here.driver.native
            offsets = {TopicPartition(here.name, 0): OffsetAndMetadata(3, "theirs", -1)}
            await asyncio.to_thread(admin.alter_group_offsets, group_id(here.name, "g"), offsets)
            consumer = await here.join(await here.group())

            assert ids(await take(consumer, 2)) == ["3", "4"]
            await consumer.close()

    run(test)


def test_offsets_that_are_gone_are_reported() -> None:
    """A group whose offsets Kafka forgot says so, and begins again where it was created: nothing is skipped."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            await here.publish(2)
            group = await here.group()
            consumer = await here.join(group)
            await here.publish(3, first=2)
            await end(consumer, await take(consumer, 3))
            await consumer.close()
            admin: KafkaAdminClient = here.driver.native
            await asyncio.to_thread(admin.delete_groups, [group_id(here.name, "g")])
            again = await here.join(await here.group())

            assert ids(await take(again, 3)) == ["2", "3", "4"]
            assert [gap.count for gap in here.gaps] == [None]
            await again.close()

    run(test)


def test_retention_that_removes_unread_messages_is_reported_with_the_count() -> None:
    """Messages deleted before the group read them are a data loss of that many, whether it is joined or not."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            await here.publish(10)
            admin: KafkaAdminClient = here.driver.native
            await asyncio.to_thread(admin.delete_records, {TopicPartition(here.name, 0): 4})
            consumer = await here.join(group)
            deliveries = await take(consumer, 6)

            assert ids(deliveries) == [str(number) for number in range(4, 10)]
            assert [gap.count for gap in here.gaps] == [4]
            await end(consumer, deliveries)
            assert await here.driver.lag(here.name, "g") == (0, True)
            await consumer.close()

    run(test)


def test_group_names_never_meet() -> None:
    """The dots of topics and groups are no way for one group to be taken for another."""
    assert group_id("a.b", "c") != group_id("a", "b.c")
    assert group_id("orders", "billing") == "orders.billing"


def test_capabilities_are_those_of_the_live_cluster() -> None:
    """One broker that never syncs survives its own crash, no more; idle groups are kept as long as it says."""

    async def test() -> None:
        async with opened() as here:
            capabilities = here.driver.capabilities

            assert (capabilities.durability.kind, capabilities.durability.copies) == ("process_crash", 1)
            assert capabilities.start.group_kept_for == 7 * 86400
            assert capabilities.max_message_bytes.limit == 1_048_588 - 8192
            with pytest.raises(UnsupportedError):
                capabilities.require({"durability": "replicated(2)"})

    run(test)


def test_a_dead_server_is_unavailable_within_its_time() -> None:
    """Nobody listens: opening fails within connect_timeout, and leaves no thread behind."""

    async def test() -> None:
        driver = KafkaDriver(parse_target("kafka://127.0.0.1:9?connect_timeout=1", KafkaDriver), lambda event: None)
        async with asyncio.timeout(5):
            with pytest.raises(BrokerUnavailableError):
                await driver.open()

    run(test)


@pytest.mark.parametrize(
    "address", ["kafka://h/path", "kafka://user@h", "kafka://h?nonsense=1", "kafka://h?sasl_mechanism=GSSAPI"]
)
def test_bad_urls_are_refused_before_any_connection(address: str) -> None:
    """A path, a user without password, an unknown option or mechanism are errors of the configuration."""
    with pytest.raises(ConfigError):
        KafkaDriver(parse_target(address, KafkaDriver), lambda event: None)


def test_a_session_that_the_cluster_refuses_is_refused_at_open() -> None:
    """A session_timeout outside of the cluster's bounds is found out before a member joins."""

    async def test() -> None:
        with pytest.raises(ConfigError, match="session_timeout"):
            async with opened(url() + "?session_timeout=0.5"):
                pass

    run(test)


def test_the_cursor_is_readable_for_foreign_tools() -> None:
    """What a bare client sees as committed is the first unsettled message."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(5)
            deliveries = await take(consumer, 5)
            await end(consumer, deliveries[:2] + deliveries[3:])

            def committed() -> Any:
                reader = KafkaConsumer(bootstrap_servers=here.address, group_id=group_id(here.name, "g"))
                found = reader.committed(TopicPartition(here.name, 0))
                reader.close()
                return found

            assert await asyncio.to_thread(committed) == 2
            await consumer.close()

    run(test)
