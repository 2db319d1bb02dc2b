"""Ordered groups on a real Redis: turns of keys, owners of partitions, handing over, fencing."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict

import pytest

from tests.adapters.redis.support import LIMIT, Opened, end, ids, opened, proxied, quiet, run, take
from tests.adapters.support import LATE
from unistream.core.partitions import partition_for
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import GroupSpec, RawDelivery, RawMessage, Receipt, Settlement, Verb
from unistream.errors import BrokerUnavailableError, GroupMissingError, LeaseLostError, SettleError, TopicMissingError
from unistream_redis.keys import TopicKeys

pytestmark = pytest.mark.redis


async def publish(here: Opened, keys: list[bytes | None], first: int = 0, partitions: int = 4) -> None:
    """Publish one message per key given; ids are numbers in that order."""
    producer = await here.driver.producer(await here.driver.topic(here.name))
    for start in range(0, len(keys), 256):
        batch = [
            RawMessage(
                str(first + start + at),
                b"",
                key,
                (),
                (start + at) % partitions if key is None else partition_for(key, partitions),
            )
            for at, key in enumerate(keys[start : start + 256])
        ]
        outcomes = await producer.publish(batch, LIMIT)
        assert all(isinstance(outcome, Receipt) for outcome in outcomes)
    await producer.close()


async def ordered(here: Opened, partitions: int = 4, **settings: object) -> GroupSpec:
    """An ordered topic with an ordered group."""
    await here.topic(partitions=partitions, ordering="key")
    return await here.group(ordering="key", **settings)


async def die(consumer: ConsumerDriver) -> None:
    """Vanish without a word, as a killed process does."""
    member = consumer._inner  # type: ignore[attr-defined]
    member._beat.cancel()
    member._closed = True
    await member._reader.close()


class Watch:
    """Checks that the messages of each key begin in order, and that one of a key is out at a time."""

    def __init__(self) -> None:
        self.seen: dict[bytes, list[int]] = defaultdict(list)
        self.out: set[bytes] = set()
        self.handled = 0
        self.redelivered = 0

    def begin(self, delivery: RawDelivery) -> None:
        """A message was lent."""
        key, number = delivery.message.key, int(delivery.message.id)
        assert key is not None
        assert key not in self.out, f"two messages of {key!r} are out"
        self.out.add(key)
        before = self.seen[key]
        if before and number <= before[-1]:
            assert number == before[-1], f"{number} of {key!r} after {before[-1]}"
            self.redelivered += 1
        else:
            before.append(number)

    def end(self, delivery: RawDelivery) -> None:
        """Its loan ended."""
        assert delivery.message.key is not None
        self.out.remove(delivery.message.key)


def test_one_message_of_a_key_is_out_at_a_time_and_other_keys_flow() -> None:
    """The second message of a key comes when the first is settled; other keys and no key do not wait."""

    async def test() -> None:
        async with opened() as here:
            consumer = await here.join(await ordered(here, 1))
            await publish(here, [b"a", b"a", b"b", None, None, b"a", b""], partitions=1)
            first = await take(consumer, 5)
            assert ids(first) == ["0", "2", "3", "4", "6"]
            await quiet(consumer)
            await end(consumer, first[:1])
            (second,) = await take(consumer, 1)
            assert second.message.id == "1"
            await end(consumer, [second, *first[1:]])
            (third,) = await take(consumer, 1)

            assert (third.message.id, third.attempt) == ("5", 1)
            await end(consumer, [third])
            assert (await here.driver.lag(here.name, "g")).messages == 0
            await consumer.close()

    run(test)


def test_a_delayed_message_holds_its_key_only() -> None:
    """A nack with a delay holds the later messages of its key, not before its delay; others flow meanwhile."""

    async def test() -> None:
        async with opened() as here:
            consumer = await here.join(await ordered(here, 1))
            await publish(here, [b"a", b"a", b"b", b"b"], partitions=1)
            first = await take(consumer, 2)
            started = time.monotonic()
            await end(consumer, first[:1], Verb.NACK, 1.5)
            await end(consumer, first[1:])
            other = await take(consumer, 1)
            assert ids(other) == ["3"]
            (again,) = await take(consumer, 1)
            waited = time.monotonic() - started

            assert (again.message.id, again.attempt, again.suspect) == ("0", 2, False)
            assert 1.5 <= waited < 2.5
            await end(consumer, [again, *other])
            assert ids(await take(consumer, 1)) == ["1"]
            await consumer.close()

    run(test)


def test_a_delay_outlives_its_owner() -> None:
    """A delayed message is lent by the next owner, not before its time, with its attempts counted."""

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 1)
            one = await here.join(group)
            await publish(here, [b"a", b"a"], partitions=1)
            started = time.monotonic()
            await end(one, await take(one, 1), Verb.NACK, 2.0)
            await one.close()
            two = await here.join(group)
            (again,) = await take(two, 1)

            assert (again.message.id, again.attempt, again.suspect) == ("0", 2, False)
            assert 2.0 <= time.monotonic() - started < 2.0 + LATE
            await end(two, [again])
            (later,) = await take(two, 1)
            assert (later.message.id, later.attempt) == ("1", 1)
            await two.close()

    run(test)


def test_a_release_is_lent_again_with_the_same_attempt() -> None:
    """Released and expired loans come again before later messages of their key; only the expired counts."""

    async def test() -> None:
        async with opened() as here:
            consumer = await here.join(await ordered(here, 1))
            await publish(here, [b"a", b"a"], partitions=1)
            await end(consumer, await take(consumer, 1), Verb.RELEASE)
            (again,) = await take(consumer, 1)
            assert (again.message.id, again.attempt) == ("0", 1)
            await end(consumer, [again], Verb.EXPIRE)
            (again,) = await take(consumer, 1)

            assert (again.message.id, again.attempt, again.suspect) == ("0", 2, False)
            outcomes = await consumer.settle([Settlement(again.token, Verb.ACK), Settlement(again.token, Verb.ACK)])
            assert outcomes[0] is None
            await consumer.close()

    run(test)


def test_a_loan_that_is_not_extended_ends() -> None:
    """A loan that nobody extends or settles ends with the lease, comes again as a suspect, and its token is refused."""

    async def test() -> None:
        async with opened() as here:
            consumer = await here.join(await ordered(here, 1, lease=0.6))
            await publish(here, [b"a", b"b"], partitions=1)
            kept, left = await take(consumer, 2)
            for _ in range(4):
                assert await consumer.extend([kept.token], 0.6) == [None]
                assert await consumer.receive(1, 0.1) == []
            (again,) = await take(consumer, 1)
            (outcome,) = await consumer.settle([Settlement(left.token, Verb.ACK)])

            assert isinstance(outcome, LeaseLostError)
            assert (again.message.id, again.attempt, again.suspect) == ("1", 2, True)
            await end(consumer, [kept, again])
            await consumer.close()

    run(test)


def test_a_partition_is_owned_as_long_as_anything_of_it_is_lent() -> None:
    """Whatever lends or extends keeps others away for that long, also if nothing of this member is heard any more."""

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 1, lease=60.0, max_lease=600.0)
            consumer = await here.join(group)
            owner = TopicKeys.of(await here.driver.topic(here.name)).streams[0].owner(group.name)
            redis = here.redis

            async def nearly_over() -> None:
                assert await redis.pexpire(owner, 5000)

            async def owned_for() -> float:
                return float(await redis.pttl(owner)) / 1000

            await publish(here, [b"a", b"a", b"b"], partitions=1)
            await nearly_over()
            first, other = await take(consumer, 2)
            assert await owned_for() > 55
            await nearly_over()
            assert await consumer.extend([first.token], 300.0) == [None]
            assert await owned_for() > 295
            # What keeps membership up shortens nothing, and a turn that comes is as good as a read.
            await consumer._inner._live()  # type: ignore[attr-defined]
            assert await owned_for() > 290
            await nearly_over()
            await end(consumer, [first])
            (second,) = await take(consumer, 1)
            assert await owned_for() > 55
            await end(consumer, [second, other])
            await consumer.close()

    run(test)


def test_what_a_cancelled_receive_left_is_lent_from_the_next_one_on() -> None:
    """A lease counts from the call that hands the delivery out, so the ownership has to last from then on, too."""

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 1, lease=60.0)
            consumer = await here.join(group)
            owner = TopicKeys.of(await here.driver.topic(here.name)).streams[0].owner(group.name)
            await publish(here, [b"a", b"b"], partitions=1)
            (one,) = await consumer.receive(1, LIMIT)
            inner = consumer._inner  # type: ignore[attr-defined]
            receiving = asyncio.create_task(consumer.receive(1, LIMIT))
            for _ in range(5):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.gather(receiving, inner._step, return_exceptions=True)
            assert inner._held
            assert await here.redis.pexpire(owner, 5000)
            (two,) = await take(consumer, 1)

            assert float(await here.redis.pttl(owner)) > 55_000
            await end(consumer, [one, two])
            await consumer.close()

    run(test)


def test_members_share_the_partitions_out_evenly() -> None:
    """As members join and leave, each partition has one owner, and the owners have even shares."""

    async def owners(here: Opened) -> list[int]:
        names = defaultdict(int)
        for partition in range(6):
            fence = await here.redis.get(f"us:{{{here.name}.{partition}}}:part:owner:g")
            names[fence.decode().partition(":")[0] if fence else ""] += 1
        return sorted(names.values()) if "" not in names else []

    async def reach(here: Opened, shares: list[int]) -> None:
        async with asyncio.timeout(10):
            while await owners(here) != shares:  # noqa: ASYNC110 - Redis has no event for it
                await asyncio.sleep(0.05)

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 6, lease=1.0)
            members = [await here.join(group)]
            assert await owners(here) == [6]
            members.append(await here.join(group))
            await reach(here, [3, 3])
            members += [await here.join(group), await here.join(group)]
            await reach(here, [1, 1, 2, 2])
            assert len(await here.driver.members(here.name, "g")) == 4
            await members.pop(0).close()
            await reach(here, [2, 2, 2])
            await die(members.pop(0))
            await reach(here, [3, 3])
            for member in members:
                await member.close()
            assert await owners(here) == []
            assert await here.driver.members(here.name, "g") == []

    run(test)


def test_a_partition_is_handed_over_when_its_loans_are_settled() -> None:
    """A joining member gets its share only after what is lent from it is settled, and then in order."""

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 2, lease=2.0)
            keys = [next(b"%d" % n for n in range(99) if partition_for(b"%d" % n, 2) == side) for side in (0, 1)]
            one = await here.join(group)
            await publish(here, [keys[0], keys[1], keys[0], keys[1]], partitions=2)
            loans = {one_of.message.key: one_of for one_of in await take(one, 2)}
            two = await here.join(group)
            for _ in range(3):
                assert await two.receive(1, 0.5) == []
                assert await one.extend([loan.token for loan in loans.values()], 2.0) == [None, None]
            for loan in loans.values():
                await end(one, [loan])
            got = {}
            async with asyncio.timeout(LIMIT):
                while len(got) < 2:
                    for consumer in (one, two):
                        for delivery in await consumer.receive(5, 0.3):
                            got[delivery.message.key] = (consumer, delivery)
                            await end(consumer, [delivery])
            await publish(here, keys, first=4, partitions=2)
            last = {}
            async with asyncio.timeout(LIMIT):
                while len(last) < 2:
                    for consumer in (one, two):
                        for delivery in await consumer.receive(5, 0.3):
                            last[delivery.message.key] = consumer
                            await end(consumer, [delivery])

            assert {key: delivery.message.id for key, (_, delivery) in got.items()} == {keys[0]: "2", keys[1]: "3"}
            assert len(set(map(id, last.values()))) == 2
            await one.close()
            await two.close()

    run(test)


def test_a_slow_handler_holds_up_its_key_only_while_its_partition_is_to_be_handed_over() -> None:
    """A member joins while a message of each partition is in hand: other keys flow, and it gets its share later."""

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 2, lease=20.0)
            by_side = [[b"%d" % n for n in range(99) if partition_for(b"%d" % n, 2) == side] for side in (0, 1)]
            one = await here.join(group)
            await publish(here, [by_side[0][0], by_side[1][0]], partitions=2)
            slow = await take(one, 2)
            two = await here.join(group)
            await publish(here, [keys[at] for at in range(1, 9) for keys in by_side], first=2, partitions=2)
            others = await take(one, 16, limit=4)
            assert {delivery.message.id for delivery in others} == {str(number) for number in range(2, 18)}
            await end(one, others)
            await end(one, slow)
            await publish(here, [keys[0] for keys in by_side], first=18, partitions=2)
            assert ids(await take(one, 1)) != ids(await take(two, 1))
            await one.close()
            await two.close()

    run(test)


def test_a_dead_owners_messages_come_again_in_order_and_its_settles_are_fenced() -> None:
    """After the owner's lease others lend what it held, as suspects, then the rest; a late settle changes nothing."""

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 1, lease=0.6)
            one = await here.join(group)
            await publish(here, [b"a", b"b", b"a", b"b"], partitions=1)
            stale = await take(one, 2)
            member = one._inner  # type: ignore[attr-defined]
            member._beat.cancel()
            two = await here.join(group)
            fresh: list[RawDelivery] = []
            async with asyncio.timeout(LIMIT):
                while len(fresh) < 2:
                    batch = await two.receive(10, 1.0)
                    assert len(batch) <= 1
                    fresh += batch
                    await two.extend([loan.token for loan in fresh], 5.0)
            member._owned[0].valid_until += 60  # a clock that stood still does not know that the lease is over
            for loan in member._loans.values():
                loan.until += 60
            outcomes = await one.settle([Settlement(loan.token, Verb.ACK) for loan in stale])
            assert all(isinstance(outcome, LeaseLostError) for outcome in outcomes)

            assert [(one_of.message.id, one_of.attempt, one_of.suspect) for one_of in fresh] == [
                ("0", 2, True),
                ("1", 2, True),
            ]
            await end(two, fresh)
            rest = await take(two, 2)
            assert [(one_of.message.id, one_of.attempt, one_of.suspect) for one_of in rest] == [
                ("2", 1, False),
                ("3", 1, False),
            ]
            await end(two, rest)
            await die(one)
            await two.close()

    run(test)


def test_a_lost_read_breaks_no_order() -> None:
    """When the answer of a read is lost, its messages come before later ones, with attempt 1."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            consumer = await here.join(await ordered(here, 1, lease=5.0))
            await publish(here, [b"a", b"b", b"a", b"b"], partitions=1)
            proxy.deaf = True
            with pytest.raises(BrokerUnavailableError):
                await consumer.receive(10, 3.0)
            proxy.deaf = False
            proxy.cut()
            await publish(here, [b"a", b"b"], first=4, partitions=1)
            watch = Watch()
            async with asyncio.timeout(LIMIT):
                while sum(map(len, watch.seen.values())) < 6:
                    for delivery in await consumer.receive(10, 1.0):
                        watch.begin(delivery)
                        assert delivery.attempt == 1
                        watch.end(delivery)
                        await end(consumer, [delivery])

            assert dict(watch.seen) == {b"a": [0, 2, 4], b"b": [1, 3, 5]}
            await consumer.close()

    run(test)


def test_a_settle_without_an_answer_is_not_called_lost() -> None:
    """When the partition was lost before a settle was answered nobody says that the settle was refused."""

    async def test() -> None:
        async with proxied() as (here, proxy):
            group = await ordered(here, 1, lease=1.5)
            one = await here.join(group)
            await publish(here, [b"a", b"a"], partitions=1)
            first = await take(one, 1)
            proxy.deaf = True
            with pytest.raises(BrokerUnavailableError):
                await one.settle([Settlement(delivery.token, Verb.ACK) for delivery in first])
            proxy.refuse = True
            proxy.cut()
            async with opened() as elsewhere:
                elsewhere.name = here.name
                two = await elsewhere.join(group)
                rest = await take(two, 1)
                await end(two, rest)
                proxy.deaf = proxy.refuse = False
                [outcome] = await one.settle([Settlement(delivery.token, Verb.ACK) for delivery in first])
                await two.close()
            await one.close()

            assert ids(rest) == ["1"]
            assert type(outcome) is SettleError

    run(test)


def test_a_deserted_owner_resigns() -> None:
    """When loans end and nobody calls receive for a lease, the partitions go to others; receive takes part again."""

    async def test() -> None:
        async with opened() as here:
            group = await ordered(here, 2, lease=0.8)
            one = await here.join(group)
            await publish(here, [b"a", b"b", b"c", b"d", b"a"], partitions=2)
            stale = await take(one, 4)
            two = await here.join(group)
            again: list[RawDelivery] = []
            async with asyncio.timeout(LIMIT):
                while len(again) < 5:
                    batch = await two.receive(10, 1.0)
                    again += batch
                    await end(two, batch)
            assert {delivery.message.id: (delivery.attempt, delivery.suspect) for delivery in again} == {
                **{delivery.message.id: (2, True) for delivery in stale},
                "4": (1, False),
            }
            (outcome,) = await one.settle([Settlement(stale[0].token, Verb.ACK)])
            assert isinstance(outcome, LeaseLostError)
            assert len(await here.driver.members(here.name, "g")) == 1
            assert await one.receive(1, 0.1) == []
            assert len(await here.driver.members(here.name, "g")) == 2
            await one.close()
            await two.close()

    run(test)


@pytest.mark.parametrize("what", ["group", "topic"])
def test_a_deleted_group_or_topic_is_told(what: str) -> None:
    """Members of an ordered group that is deleted, or whose topic is, get the error that names it."""

    async def test() -> None:
        async with opened() as here:
            consumer = await here.join(await ordered(here, 2, lease=1.0))
            waiting = asyncio.create_task(consumer.receive(1, 10.0))
            await asyncio.sleep(0.05)
            if what == "group":
                await here.driver.delete_group(here.name, "g")
            else:
                await here.driver.delete_topic(here.name)
            with pytest.raises(GroupMissingError if what == "group" else TopicMissingError):
                await waiting
            await consumer.close()

    run(test)


def test_an_ephemeral_ordered_group_keeps_the_order() -> None:
    """An ephemeral group can be ordered, starts at the end, and leaves nothing."""

    async def test() -> None:
        async with opened() as here:
            topic = await here.topic(partitions=2, ordering="key")
            await publish(here, [b"a"], partitions=2)
            spec = GroupSpec(here.name, "e", "key", ephemeral=True)
            consumer = await here.driver.consumer(spec, topic, max_in_flight=10, lost=lambda tokens, why: None)
            await publish(here, [b"a", b"a"], first=1, partitions=2)
            for number in ("1", "2"):
                (delivery,) = await take(consumer, 1)
                assert delivery.message.id == number
                await end(consumer, [delivery])
            await consumer.close()
            left = {key.decode() async for key in here.redis.scan_iter(f"us:{{{here.name}*")}
            left -= {f"us:{{{here.name}.{at}}}:part:run" for at in (0, 1)}  # belongs to the topic, kept on Redis 7.0

            assert left == {f"us:{{{here.name}.{at}}}:part:stream" for at in (0, 1)} | {f"us:{{{here.name}}}:meta"}

    run(test)


@pytest.mark.parametrize("seed", [1, 2])
def test_order_holds_through_nacks_crashes_and_rebalances(seed: int) -> None:
    """Under load, with random nacks, members that die, leave and join, each key keeps its order and nothing is lost."""

    async def test() -> None:
        chance = random.Random(seed)
        print("seed", seed)
        async with opened() as here:
            group = await ordered(here, 4, lease=1.0)
            count = 1500
            keys: list[bytes | None] = [b"%d" % chance.randrange(25) for _ in range(count)]
            watch = Watch()
            done: set[str] = set()

            async def work(consumer: ConsumerDriver, dying: asyncio.Event) -> None:
                held: list[RawDelivery] = []
                while not dying.is_set() and len(done) < count:
                    batch = await consumer.receive(chance.randint(1, 20), 0.2)
                    for delivery in batch:
                        watch.begin(delivery)
                    held += batch
                    chance.shuffle(held)
                    now, held = held[: len(held) // 2 + 1], held[len(held) // 2 + 1 :]
                    verbs = [chance.choices([Verb.ACK, Verb.NACK, Verb.RELEASE], [8, 1, 1])[0] for _ in now]
                    for delivery in now:
                        watch.end(delivery)
                    outcomes = await consumer.settle(
                        [
                            Settlement(delivery.token, verb, chance.random() / 3 if verb is Verb.NACK else 0)
                            for delivery, verb in zip(now, verbs, strict=True)
                        ]
                    )
                    for delivery, verb, outcome in zip(now, verbs, outcomes, strict=True):
                        assert outcome is None
                        if verb is Verb.ACK:
                            done.add(delivery.message.id)
                    await consumer.extend([delivery.token for delivery in held], 1.0)
                for delivery in held:
                    watch.end(delivery)
                if dying.is_set():
                    await die(consumer)
                else:
                    outcomes = await consumer.settle([Settlement(one.token, Verb.RELEASE) for one in held])
                    await consumer.close()

            dying = [asyncio.Event() for _ in range(5)]
            workers = [asyncio.create_task(work(await here.join(group), event)) for event in dying[:3]]
            publishing = asyncio.create_task(publish(here, keys))
            await asyncio.sleep(0.5)
            dying[0].set()
            workers.append(asyncio.create_task(work(await here.join(group), dying[3])))
            await asyncio.sleep(1.0)
            dying[1].set()
            workers.append(asyncio.create_task(work(await here.join(group), dying[4])))
            await publishing
            await asyncio.gather(*workers)

            assert done == {str(number) for number in range(count)}
            assert watch.redelivered > 20
            for key, numbers in watch.seen.items():
                assert numbers == [at for at, of in enumerate(keys) if of == key]
            assert (await here.driver.lag(here.name, "g")).messages == 0

    run(test)
