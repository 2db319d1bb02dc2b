"""`memory://` against the driver contract, through the wrapper that checks both sides of it, and through a client."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import unistream
from unistream.conformance.clock import run
from unistream.driver.checked import checked
from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.types import (
    DataLoss,
    GroupSpec,
    RawDelivery,
    RawMessage,
    Receipt,
    Retention,
    Settlement,
    Target,
    TopicSpec,
    Verb,
)
from unistream.errors import (
    ClosedError,
    ConfigError,
    GroupMissingError,
    LeaseLostError,
    TooLargeError,
    TopicConflictError,
    TopicFullError,
    TopicMissingError,
    UnistreamError,
    UnsupportedError,
)
from unistream_builtin import MemoryDriver

Checked = checked(MemoryDriver)
LIMIT = 16 * 1024 * 1024


def virtual(main: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on virtual time."""

    def test() -> None:
        run(main())

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


class Bench:
    """An open driver with a topic and a group."""

    def __init__(self, driver: Driver, topic: TopicSpec) -> None:
        self.driver = driver
        self.topic = topic
        self.group = GroupSpec(topic.name, "g", ordering=topic.ordering, lease=10.0, max_lease=30.0)
        self.events: list[Any] = []
        self.lost: list[tuple[list[Any], str]] = []
        self.count = 0

    async def consumer(self, group: GroupSpec | None = None) -> ConsumerDriver:
        """A new member."""
        return await self.driver.consumer(
            group or self.group,
            self.topic,
            max_in_flight=100,
            lost=lambda tokens, reason: self.lost.append((list(tokens), reason)),
        )

    async def publish(self, *values: bytes, key: bytes | None = None) -> list[Any]:
        """Publish; the outcomes."""
        producer: ProducerDriver = await self.driver.producer(self.topic)
        batch = []
        for value in values:
            self.count += 1
            batch.append(RawMessage(f"m{self.count}", value, key, (("h", b"1"), ("h", b"2")), 3))
        outcomes = await settled(producer.publish(batch, 1.0))
        await producer.close()
        return outcomes


async def settled(answer: Any) -> Any:
    """An answer that came at once, or its result."""
    return await answer if inspect.isawaitable(answer) else answer


def settlements(verb: Verb, *raws: RawDelivery, delay: float = 0.0) -> list[Settlement]:
    """The same settle for each."""
    return [Settlement(raw.token, verb, delay) for raw in raws]


@asynccontextmanager
async def opened(**topic: Any) -> AsyncIterator[Bench]:
    """A bench on a private broker."""
    events: list[Any] = []
    driver = Checked(Target("memory"), events.append)
    await driver.open()
    bench = Bench(driver, TopicSpec("t", **topic))
    bench.events = events
    await driver.create_topic(bench.topic)
    await driver.create_group(bench.group)
    yield bench
    await driver.close()


@virtual
async def test_a_message_goes_through_whole() -> None:
    """Value, key, headers, partition, id, position, time and attempt arrive as published."""
    async with opened() as bench:
        before = datetime.now(UTC)
        outcomes = await bench.publish(b"", bytes(range(256)), key=b"")
        consumer = await bench.consumer()
        raws = await settled(consumer.receive(10, 0.0))

        assert outcomes == [Receipt("m1", "0", False), Receipt("m2", "1", False)]
        assert [raw.message[1:5] for raw in raws] == [
            (b"", b"", (("h", b"1"), ("h", b"2")), 3),
            (bytes(range(256)), b"", (("h", b"1"), ("h", b"2")), 3),
        ]
        assert [(raw.position, raw.attempt, raw.suspect) for raw in raws] == [("0", 1, False), ("1", 1, False)]
        assert type(raws[0]) is RawDelivery
        assert all(abs(raw.published_at - before.timestamp()) < 60 for raw in raws)


@virtual
async def test_everything_but_waiting_is_answered_at_once() -> None:
    """publish, settle, extend, and receive where something is there or no time to wait, return plain lists."""
    async with opened() as bench:
        producer = await bench.driver.producer(bench.topic)
        consumer = await bench.consumer()
        answers: list[Any] = [
            consumer.receive(1, 0.0),
            producer.publish([RawMessage("a", b"", None, (), 0)], 1.0),
            raws := consumer.receive(1, 5.0),
            consumer.extend([raws[0].token], 5.0),  # type: ignore[index]
            consumer.settle(settlements(Verb.ACK, *raws)),  # type: ignore[misc]
        ]
        waiting = consumer.receive(1, 5.0)

        assert [type(answer) for answer in answers] == [list] * 5
        assert inspect.isawaitable(waiting)
        assert await waiting == []


@virtual
async def test_each_way_of_settling_does_what_it_says() -> None:
    """One batch of acks, nacks with delays, releases, and a lease end that the broker sees by itself."""
    async with opened() as bench:
        await bench.publish(b"ack", b"nack", b"later", b"release", b"expire")
        consumer = await bench.consumer()
        raws = await settled(consumer.receive(10, 0.0))
        batch = [
            Settlement(raws[0].token, Verb.ACK),
            Settlement(raws[1].token, Verb.NACK),
            Settlement(raws[2].token, Verb.NACK, 4.0),
            Settlement(raws[3].token, Verb.RELEASE),
            Settlement(raws[4].token, Verb.EXPIRE),
        ]
        assert await settled(consumer.settle(batch)) == [None] * 5
        loop = asyncio.get_running_loop()
        began = loop.time()
        came = []
        while len(came) < 4:
            for raw in await settled(consumer.receive(10, 60.0)):
                came.append((raw.message.value, raw.attempt, raw.suspect, round(loop.time() - began, 6)))
                await settled(consumer.settle(settlements(Verb.ACK, raw)))

        assert came == [
            (b"nack", 2, False, 0.0),
            (b"release", 1, False, 0.0),
            (b"later", 2, False, 4.0),
            (b"expire", 2, True, 10.0),
        ]


@virtual
async def test_a_loan_that_ended_is_refused_and_only_that_one() -> None:
    """The outcomes are in step with the settlements."""
    async with opened() as bench:
        await bench.publish(b"a", b"b")
        one, two = await bench.consumer(), await bench.consumer()
        [stale] = await settled(one.receive(1, 0.0))
        await asyncio.sleep(9.0)
        [fresh] = await settled(one.receive(1, 0.0))
        await asyncio.sleep(2.0)
        [held] = await settled(two.receive(1, 0.0))
        outcomes = await settled(one.settle(settlements(Verb.ACK, stale, fresh)))
        extended = await settled(one.extend([stale.token], 5.0))

        assert (type(outcomes[0]), outcomes[1], type(extended[0])) == (LeaseLostError, None, LeaseLostError)
        assert held.message.value == b"a"
        assert await settled(two.settle(settlements(Verb.ACK, held))) == [None]
        assert await bench.driver.lag("t", "g") == (0, True)


@virtual
async def test_each_message_of_a_batch_has_its_own_outcome() -> None:
    """Too large, duplicate and stored stand side by side; the limit itself is taken."""
    async with opened() as bench:
        producer = await bench.driver.producer(bench.topic)
        big = RawMessage("big", b"v" * (LIMIT - 3), b"k", (("a", b"b"),), 0)
        batch = [
            RawMessage("a", b"", None, (), 0),
            big._replace(id="over", value=big.value + b"v"),
            RawMessage("a", b"", None, (), 0),
            RawMessage("dead", b"", None, (), 0, "a"),
        ]
        outcomes = await settled(producer.publish(batch, 1.0))

        assert outcomes[0] == Receipt("a", "0", False)
        assert (type(outcomes[1]), outcomes[1].stored) == (TooLargeError, "no")
        assert outcomes[2:] == [Receipt("a", "0", True), Receipt("dead", "0", True)]
        assert await settled(producer.publish([big], 1.0)) == [Receipt("big", "1", False)]


@virtual
async def test_a_full_topic_and_a_missing_one_refuse_surely() -> None:
    """Both outcomes say that nothing was stored."""
    async with opened(max_backlog=2) as bench:
        outcomes = await bench.publish(b"a", b"b", b"c")
        producer = await bench.driver.producer(bench.topic)
        await bench.driver.delete_topic("t")
        missing = await settled(producer.publish([RawMessage("x", b"", None, (), 0)] * 2, 1.0))

        assert (type(outcomes[2]), outcomes[2].stored) == (TopicFullError, "no")
        assert [(type(error), error.stored) for error in missing] == [(TopicMissingError, "no")] * 2
        with pytest.raises(TopicMissingError):
            await bench.driver.producer(bench.topic)


@virtual
async def test_settings_stand_as_first_created() -> None:
    """Topics and groups come back as declared, to the microsecond; a second creation changes nothing."""
    async with opened() as bench:
        at = datetime(2020, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
        topic = TopicSpec("u", 8, "key", Retention(1.5, 2, 3), 4, "drop_oldest")
        groups = [
            GroupSpec("u", "1", ordering="key", start=at),
            GroupSpec("u", "2", start="earliest", lease=1.0, max_lease=2.0),
            GroupSpec("u", "3", start="0"),
        ]

        assert await bench.driver.create_topic(topic) == topic
        assert await bench.driver.create_topic(TopicSpec("u")) == topic
        assert [await bench.driver.create_group(group) for group in groups] == groups
        assert await bench.driver.create_group(GroupSpec("u", "2")) == groups[1]
        assert await bench.driver.groups("u") == groups
        assert await bench.driver.topics() == [bench.topic, topic]
        assert await bench.driver.topic("t") == bench.topic


@virtual
async def test_groups_start_and_seek_by_time_and_position() -> None:
    """The first message at or after the place asked for; members that are joined are told what they lost."""
    async with opened() as bench:
        positions, times = [], []
        for value in (b"0", b"1", b"2"):
            [receipt] = await bench.publish(value)
            positions.append(receipt.position)
            consumer = await bench.consumer(GroupSpec("t", f"e{value!r}", start="earliest", ephemeral=True))
            times.append((await settled(consumer.receive(10, 0.0)))[-1].published_at)
            await consumer.close()
            await asyncio.sleep(1.0)
        starts: dict[Any, list[bytes]] = {
            "earliest": [b"0", b"1", b"2"],
            "latest": [],
            positions[1]: [b"1", b"2"],
            datetime.fromtimestamp(times[2], UTC): [b"2"],
            datetime.fromtimestamp(times[2], UTC) + timedelta(milliseconds=1): [],
        }
        member = await bench.consumer()
        held = await settled(member.receive(10, 0.0))
        for number, (start, expected) in enumerate(starts.items()):
            group = GroupSpec("t", f"s{number}", start=start)
            await bench.driver.create_group(group)
            found = await settled((await bench.consumer(group)).receive(10, 0.0))
            await bench.driver.seek("t", "g", start)
            again = await settled(member.receive(10, 0.0))

            assert [raw.message.value for raw in found] == expected
            assert [raw.message.value for raw in again] == expected
        await asyncio.sleep(0)
        assert bench.lost[0][0] == [raw.token for raw in held]
        with pytest.raises(ConfigError, match="no position"):
            await bench.driver.seek("t", "g", "12-0")
        with pytest.raises(ConfigError, match="ends at 3"):
            await bench.driver.seek("t", "g", "4")


@virtual
async def test_closing_and_deleting_end_a_waiting_receive() -> None:
    """The error says which it was; closing twice is fine."""
    async with opened() as bench:
        await bench.driver.create_group(GroupSpec("t", "h"))
        closing, grouped = await bench.consumer(), await bench.consumer()
        topical = await bench.consumer(GroupSpec("t", "h"))
        waits = [asyncio.create_task(settled(one.receive(1, 60.0))) for one in (closing, grouped, topical)]
        await asyncio.sleep(1.0)
        await closing.close()
        await closing.close()
        await bench.driver.delete_group("t", "g")
        await bench.driver.delete_topic("t")
        errors = await asyncio.gather(*waits, return_exceptions=True)

        assert [type(error) for error in errors] == [ClosedError, GroupMissingError, TopicMissingError]
        assert all(isinstance(error, UnistreamError) and error.__cause__ for error in errors)


@virtual
async def test_a_cancelled_receive_loses_nothing() -> None:
    """A thousand waits that are cut off around the arrival of a message."""
    async with opened() as bench:
        consumer = await bench.consumer()
        came = []
        for i in range(1000):
            waiting = asyncio.create_task(settled(consumer.receive(1, 60.0)))
            await asyncio.sleep(0)
            await bench.publish(b"v")
            for _ in range(i % 5):
                await asyncio.sleep(0)
            waiting.cancel()
            [result] = await asyncio.gather(waiting, return_exceptions=True)
            came += result if isinstance(result, list) else []
        while raws := await settled(consumer.receive(100, 0.0)):
            came += raws

        assert len({raw.message.id for raw in came}) == len(came) == 1000


@virtual
async def test_what_a_member_held_goes_to_others_when_it_closes_and_when_it_is_dropped() -> None:
    """Closed: at once and untouched. Dropped: as suspect."""
    async with opened() as bench:
        await bench.publish(b"a", b"b")
        closing, dropped, other = await bench.consumer(), await bench.consumer(), await bench.consumer()
        await settled(closing.receive(1, 0.0))
        await settled(dropped.receive(1, 0.0))
        assert sorted(member.in_flight or 0 for member in await bench.driver.members("t", "g")) == [0, 1, 1]
        await closing.close()
        [given] = await settled(other.receive(5, 1.0))
        del dropped
        gc.collect()
        [suspect] = await settled(other.receive(5, 1.0))

        assert (given.message.value, given.attempt, given.suspect) == (b"a", 1, False)
        assert (suspect.message.value, suspect.attempt, suspect.suspect) == (b"b", 2, True)
        assert [member.in_flight for member in await bench.driver.members("t", "g")] == [2]


@virtual
async def test_data_removed_under_a_group_is_an_event() -> None:
    """With its count, once, for a declared retention and for an overflow that drops."""
    for topic in ({"retention": Retention(max_messages=2)}, {"max_backlog": 2, "overflow": "drop_oldest"}):
        async with opened(**topic) as bench:
            consumer = await bench.consumer()
            await bench.publish(b"1", b"2", b"3", b"4", b"5")
            await asyncio.sleep(0)
            raws = await settled(consumer.receive(10, 0.0))

            assert [(type(event), event.topic, event.group, event.count) for event in bench.events] == [
                (DataLoss, "t", "g", 3)
            ]
            assert [raw.message.value for raw in raws] == [b"4", b"5"]


@virtual
async def test_key_order_holds_across_members_and_redelivery() -> None:
    """One unsettled message per key; other keys flow."""
    async with opened(ordering="key") as bench:
        one, two = await bench.consumer(), await bench.consumer()
        await bench.publish(b"a1", b"a2", key=b"a")
        await bench.publish(b"b1", key=b"b")
        [a1, b1] = await settled(one.receive(10, 0.0))
        await settled(one.settle([*settlements(Verb.NACK, a1, delay=3.0), *settlements(Verb.ACK, b1)]))
        assert await settled(two.receive(10, 1.0)) == []
        [again] = await settled(two.receive(10, 60.0))
        await settled(two.settle(settlements(Verb.ACK, again)))
        [a2] = await settled(one.receive(10, 0.0))

        assert (again.message.value, again.attempt, a2.message.value) == (b"a1", 2, b"a2")


@pytest.mark.parametrize("url", ["memory://name:1", "memory://user@name", "memory://name/path", "memory://a,b"])
def test_a_url_with_anything_but_a_name_is_refused(url: str) -> None:
    """Before anything is opened, with the way to write it."""
    with pytest.raises(ConfigError, match="memory://name"):
        unistream.connect(url)


@virtual
async def test_clients_share_a_name_and_keep_a_broker_without_one_to_themselves() -> None:
    """Named brokers outlive their clients; a private one goes with its client."""
    async with unistream.connect("memory://shared-name", driver=Checked) as client:
        await client.create_topic("t")
    async with (
        unistream.connect("memory://shared-name", driver=Checked) as other,
        unistream.connect("memory://", driver=Checked) as private,
    ):
        assert [topic.name for topic in await other.topics()] == ["t"]
        assert list(await private.topics()) == []
        with pytest.raises(TopicConflictError, match="partitions"):
            await other.create_topic("t", partitions=2)


@virtual
async def test_a_client_publishes_and_consumes() -> None:
    """From publish to ack and lag, with a nack on the way, all in virtual time."""
    async with unistream.connect("memory://", driver=Checked) as client:
        await client.create_topic("orders", partitions=4, ordering="key")
        group = client.group("billing", "orders", ordering="key")
        await group.create()
        async with client.producer("orders") as producer:
            receipts = [await producer.publish(b"%d" % i, key=b"k%d" % (i % 3)) for i in range(30)]
        handled = []
        async with group.consumer() as consumer:
            while len(handled) < 30:
                delivery = await consumer.receive(5.0)
                assert delivery is not None
                if delivery.value == b"7" and delivery.attempt == 1:
                    await delivery.nack(2.0)
                else:
                    handled.append(int(delivery.value))
                    await delivery.ack(confirm=True)

        assert len({receipt.id for receipt in receipts}) == 30
        assert [[i for i in handled if i % 3 == k] for k in range(3)] == [list(range(k, 30, 3)) for k in range(3)]
        assert await group.lag() == (0, True)


@virtual
async def test_what_the_capabilities_say_can_be_required() -> None:
    """Everything but durability beyond the process."""
    needs = {
        "durability": "memory",
        "ordering": "key-only",
        "parallelism": "unlimited",
        "start": ["latest", "earliest", "time", "position"],
        "seek": True,
        "nack_delay": 1e6,
        "lease": "message",
        "fencing": True,
        "attempts": "exact",
        "ack_confirm": True,
        "dedupe": 120,
        "retention": ["max_age", "max_bytes", "max_messages"],
        "max_backlog": "drop_oldest",
        "max_message_bytes": LIMIT,
        "lag": True,
    }
    async with unistream.connect("memory://", require=needs, driver=Checked) as client:
        assert {name for name, capability in client.capabilities if capability} == set(needs)
    with pytest.raises(UnsupportedError, match="durability"):
        async with unistream.connect("memory://", require={"durability": "fsync"}, driver=Checked):
            pytest.fail("it must not open")


@virtual
async def test_a_busy_publisher_and_a_busy_consumer_leave_others_their_turn() -> None:
    """A broker that answers at once does not keep the event loop: others run every thousand messages."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with unistream.connect("memory://") as client:
        await client.create_topic("t")
        group = client.group("g", "t")
        await group.create()
        async with client.producer("t") as producer, group.consumer() as consumer:
            beside = asyncio.create_task(other())
            for _ in range(2000):
                await producer.publish(b"x")
            for _ in range(2000):
                await producer.submit(b"x")
            await producer.publish_many([b"x"] * 4000)
            published = turns
            for _ in range(4000):
                delivery = await consumer.receive(0)
                assert delivery is not None
                await delivery.ack()
            one_by_one = turns - published
            for _ in range(40):
                for delivery in await consumer.receive_many(100, 0):
                    await delivery.ack()
            in_batches = turns - published - one_by_one
            beside.cancel()

    assert published >= 5
    assert one_by_one >= 3
    assert in_batches >= 3
