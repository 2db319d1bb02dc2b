"""Topics, groups, lag, seek and capabilities on a real Redis."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest

from tests.adapters.redis.support import LIMIT, end, ids, opened, proxied, quiet, run, take, url
from tests.adapters.support import LATE
from unistream.driver.types import Connected, Disconnected, GroupSpec, RawMessage, Retention, TopicSpec
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ConfigError,
    GroupMissingError,
    TopicMissingError,
    UnsupportedError,
)

pytestmark = pytest.mark.redis


def test_a_topic_is_created_once_with_all_its_settings() -> None:
    """Creating twice returns what the first one declared; topics lists it; deleting twice succeeds."""

    async def test() -> None:
        async with opened() as here:
            spec = TopicSpec(here.name, 4, "key", Retention(max_age=3600.5, max_messages=10), 100, "drop_oldest")
            assert await here.driver.create_topic(spec) == spec
            assert await here.driver.create_topic(TopicSpec(here.name)) == spec
            assert await here.driver.topic(here.name) == spec
            assert spec in await here.driver.topics()
            await here.group()
            await here.driver.delete_topic(here.name)
            await here.driver.delete_topic(here.name)

            assert spec not in await here.driver.topics()
            assert [key async for key in here.redis.scan_iter(f"us:{{{here.name}*")] == []
            with pytest.raises(TopicMissingError):
                await here.driver.topic(here.name)

    run(test)


def test_concurrent_creators_agree() -> None:
    """Of concurrent creators of a topic and a group with different settings, all see the one that won."""

    async def test() -> None:
        async with opened() as here:
            topics = await asyncio.gather(
                *(here.driver.create_topic(TopicSpec(here.name, max_backlog=number)) for number in range(1, 9))
            )
            groups = await asyncio.gather(
                *(here.driver.create_group(GroupSpec(here.name, "g", lease=number)) for number in range(1, 9))
            )

            assert len(set(topics)) == len(set(groups)) == 1

    run(test)


def test_a_foreign_stream_is_adopted() -> None:
    """A stream and a group that redis-cli made are a topic and a group, and their entries deliveries."""

    async def test() -> None:
        async with opened() as here:
            stream = f"us:{{{here.name}}}:stream"
            await here.redis.xadd(stream, {"value": b"body", "color": b"blue"})
            await here.redis.xadd(stream, {"anything": b"alone"})
            await here.redis.xadd(stream, {"a": b"1", "b": b"2"})
            await here.redis.xgroup_create(stream, "foreign", "0")
            assert await here.driver.topic(here.name) == TopicSpec(here.name)
            (group,) = await here.driver.groups(here.name)
            consumer = await here.join(group)
            deliveries = await take(consumer, 3)
            messages = [delivery.message for delivery in deliveries]

            assert [(one.id, one.key, one.value, one.headers) for one in messages] == [
                ("", None, b"body", (("color", b"blue"),)),
                ("", None, b"alone", ()),
                ("", None, b"", (("a", b"1"), ("b", b"2"))),
            ]
            await end(consumer, deliveries)
            assert (await here.driver.lag(here.name, "foreign")).messages == 0
            await consumer.close()

    run(test)


def test_foreign_clients_read_and_write_keys_headers_and_ids() -> None:
    """A bare XRANGE shows what was published, field by field; a bare XADD of the same fields is the same message."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            consumer = await here.join(await here.group())
            sent = RawMessage("id 1", b"\x00body", b"k\xff", (("a", b"1"), ("A", b"\xfe")), 0)
            producer = await here.produce()
            [receipt] = await producer.publish([sent], LIMIT)
            await producer.close()
            stream = f"us:{{{here.name}}}:stream"
            [(identity, fields)] = await here.redis.xrange(stream)

            assert identity.decode() == receipt.position
            assert list(fields.items()) == [
                (b"value", b"\x00body"),
                (b"a", b"1"),
                (b"A", b"\xfe"),
                (b"unistream-id", b"id 1"),
                (b"unistream-v", b"1"),
                (b"unistream-key", b"k\xff"),
            ]
            await here.redis.xadd(stream, fields)
            ours, theirs = await take(consumer, 2)
            assert ours.message == theirs.message == sent
            await end(consumer, [ours, theirs])
            await consumer.close()

    run(test)


def test_a_newer_format_is_a_clear_error() -> None:
    """A topic or group that a newer version wrote is refused, not guessed at."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            await here.group()
            await here.redis.hset(f"us:{{{here.name}}}:groups", "g", '{"format": 2}')
            with pytest.raises(UnsupportedError, match="format 2"):
                await here.driver.groups(here.name)
            await here.redis.hset(f"us:{{{here.name}}}:meta", "format", "2")
            try:
                with pytest.raises(UnsupportedError, match="format 2"):
                    await here.driver.topic(here.name)
                with pytest.raises(UnsupportedError, match="format 2"):
                    await here.topic()
            finally:
                await here.redis.hset(f"us:{{{here.name}}}:meta", "format", "1")

    run(test)


@pytest.mark.parametrize("partitions", [1, 3])
def test_groups_start_where_they_are_told(partitions: int) -> None:
    """latest, earliest, a time and a position begin exactly there; the time and the position are inclusive."""

    async def test() -> None:
        async with opened() as here:
            ordering = "key" if partitions > 1 else "none"
            await here.topic(partitions=partitions, ordering=ordering)
            earliest = await here.join(await here.group("first", start="earliest"))
            await here.publish(3)
            await asyncio.sleep(0.01)
            await here.publish(3, first=3)
            await asyncio.sleep(0.01)
            deliveries = await take(earliest, 6)
            third, fourth = deliveries[2], deliveries[3]
            at = datetime.fromtimestamp(fourth.published_at or 0, UTC)
            starts = {
                "time": at,
                "after": at + timedelta(microseconds=1),
                "position": third.position or "",
                "earliest": "earliest",
                "latest": "latest",
                "beyond": datetime(2999, 1, 1, tzinfo=UTC),
            }
            got = {}
            lags = {}
            for name, start in starts.items():
                group = await here.group(name, start=start)
                assert group.start == start
                lags[name] = await here.driver.lag(here.name, name)
                consumer = await here.join(group)
                got[name] = []
                while batch := await consumer.receive(10, 0):
                    got[name] += ids(batch)
                await consumer.close()

            assert got["earliest"] == [str(number) for number in range(6)]
            assert got["time"] == ["3", "4", "5"]
            assert got["position"] == ["2", "3", "4", "5"]
            assert got["latest"] == []
            assert set(got["after"]) < {"3", "4", "5"}
            assert {name: (lag.messages, lag.exact) for name, lag in lags.items() if name != "after"} == {
                "time": (3, True),
                "position": (4, True),
                "earliest": (6, True),
                "latest": (0, True),
                "beyond": (0, True),
            }
            await here.publish(1, first=6)
            beyond = await here.join(await here.group("beyond"))
            assert ids(await take(beyond, 1)) == ["6"]
            await beyond.close()
            await earliest.close()

    run(test)


def test_a_position_of_another_backend_is_refused() -> None:
    """A start that is no position of Redis is a ConfigError, and nothing is created."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            with pytest.raises(ConfigError):
                await here.group(start="offset 12")
            assert await here.driver.groups(here.name) == []

    run(test)


def test_seek_moves_a_group_that_nobody_is_joined_to() -> None:
    """Seek refuses while a member is joined, changing nothing; afterwards it moves, and old loans end."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            consumer = await here.join(group)
            await here.publish(6)
            deliveries = await take(consumer, 6)
            await end(consumer, deliveries[:3])
            with pytest.raises(UnsupportedError) as raised:
                await here.driver.seek(here.name, "g", "latest")
            assert raised.value.capability == "seek"
            assert (await here.driver.lag(here.name, "g")).messages == 3
            await consumer.close()
            seen = {}
            for to in ("earliest", deliveries[4].position or "", "latest"):
                await here.driver.seek(here.name, "g", to)
                consumer = await here.join(group)
                seen[to] = [(one.message.id, one.attempt) for one in await consumer.receive(10, 0.1)]
                await quiet(consumer)
                await consumer.close()

            assert seen["earliest"] == [(str(number), 1) for number in range(6)]
            assert seen[deliveries[4].position or ""] == [("4", 1), ("5", 1)]
            assert seen["latest"] == []
            with pytest.raises(GroupMissingError):
                await here.driver.seek(here.name, "none", "latest")

    run(test)


def test_what_does_not_exist_is_named() -> None:
    """Every call on a missing topic or group says which of the two is missing; deleting it succeeds."""

    async def test() -> None:
        async with opened() as here:
            for call in (
                here.driver.groups(here.name),
                here.driver.lag(here.name, "g"),
                here.driver.members(here.name, "g"),
                here.driver.create_group(GroupSpec(here.name, "g")),
                here.driver.producer(TopicSpec(here.name)),
            ):
                with pytest.raises(TopicMissingError):
                    await call
            await here.driver.delete_group(here.name, "g")
            topic = await here.topic()
            for call in (
                here.driver.lag(here.name, "g"),
                here.driver.members(here.name, "g"),
                here.driver.consumer(GroupSpec(here.name, "g"), topic, max_in_flight=1, lost=lambda tokens, why: None),
            ):
                with pytest.raises(GroupMissingError):
                    await call

    run(test)


def test_durability_is_read_from_the_live_server() -> None:
    """The capability follows appendfsync, the append-only file and the eviction policy of the running server."""

    async def kind(**settings: str) -> str:
        async with opened() as here:
            before = {name: (await here.redis.config_get(name))[name] for name in map(setting, settings)}
            try:
                for name, value in settings.items():
                    await here.redis.config_set(setting(name), value)
                async with opened() as other:
                    return other.driver.capabilities.durability.kind
            finally:
                for name, value in before.items():
                    await here.redis.config_set(name, value)

    def setting(name: str) -> str:
        return name.replace("_", "-")

    async def test() -> None:
        assert await kind(appendfsync="always") == "fsync"
        assert await kind(appendfsync="everysec") == "process_crash"
        assert await kind(maxmemory_policy="allkeys-lru") == "memory"
        assert await kind(maxmemory_policy="volatile-lru") == "fsync"
        assert await kind(appendonly="no") == "memory"

    run(test)


def test_a_user_with_few_rights_gets_the_least_claim_and_clear_refusals() -> None:
    """Without CONFIG the claim falls to what INFO tells; what is forbidden is AccessError; no password is shown."""

    async def test() -> None:
        async with opened() as here:
            await here.redis.execute_command(
                "ACL", "SETUSER", "few", "on", ">secret-word", "~us:*", "+@all", "-config", "-xadd", "-client|unblock"
            )
            await here.topic()
            plain = url()
            address = plain.replace("redis://", "redis://few:secret-word@")
            try:
                async with opened(address) as few:
                    few.name = here.name
                    assert few.driver.capabilities.durability.kind == "process_crash"
                    producer = await few.driver.producer(TopicSpec(here.name))
                    (outcome,) = await producer.publish([raw()], 5.0)
                    assert isinstance(outcome, AccessError)
                    assert outcome.stored == "no"
                    await producer.close()
                    group = await few.group()
                    consumer = await few.join(group)
                    waiting = asyncio.create_task(consumer.receive(1, 5.0))
                    await asyncio.sleep(0.05)
                    started = time.monotonic()
                    await consumer.close()
                    assert time.monotonic() - started < LATE
                    assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], Exception)
                with pytest.raises(AccessError) as raised:
                    async with opened(plain.replace("redis://", "redis://few:wrong-word@")):
                        raise AssertionError("a wrong password must not open")
                assert "wrong-word" not in str(raised.value)
                assert "wrong-word" not in repr(raised.value.__cause__)
            finally:
                await here.redis.execute_command("ACL", "DELUSER", "few")

    def raw():  # type: ignore[no-untyped-def]
        from tests.adapters.redis.support import message

        return message(1)

    run(test)


def test_wrong_addresses_fail_clearly_and_in_time() -> None:
    """Nobody there, a silent server, nonsense in the URL: each is its own error, within the time limit."""

    async def test() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read()
            except ConnectionError:
                writer.transport.abort()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        started = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match=r"no answer within 0\.3 s"):
            async with opened(f"redis://127.0.0.1:{port}/?connect_timeout=0.3"):
                raise AssertionError("a silent server must not open")
        assert time.monotonic() - started < LATE
        server.close()
        await server.wait_closed()
        with pytest.raises(BrokerUnavailableError):
            async with opened(f"redis://127.0.0.1:{port}/"):
                raise AssertionError("a closed port must not open")
        for nonsense in ("redis://127.0.0.1/name", "redis://a,b/0", f"rediss://127.0.0.1:{port}/?ca_file=/none"):
            with pytest.raises(ConfigError):
                async with opened(nonsense):
                    raise AssertionError("nonsense must not open")

    run(test)


def test_ping_and_events_tell_of_the_connection() -> None:
    """A cut connection is a Disconnected event, ping makes a new one and a Connected event."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            await here.driver.ping()
            assert here.events == []
            proxy.cut()
            await asyncio.sleep(0.1)
            await here.driver.ping()
            assert [type(event) for event in here.events] == [Disconnected, Connected]
            proxy.freeze()
            with pytest.raises(BrokerUnavailableError):
                await here.driver.ping()

    run(test)


def test_a_stream_that_somebody_deleted_is_made_anew() -> None:
    """After a foreign DEL the topic counts as missing, and creating it again forgets the groups that went with it."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(max_backlog=5)
            await here.group()
            await here.redis.delete(f"us:{{{here.name}}}:stream")
            with pytest.raises(TopicMissingError):
                await here.driver.topic(here.name)
            await here.topic(max_backlog=7)

            assert (await here.driver.topic(here.name)).max_backlog == 7
            assert await here.driver.groups(here.name) == []
            await here.group()

    run(test)
