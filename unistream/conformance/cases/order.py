"""Cases `ord.*`: publish order where it was promised, also through nacks, deaths and new members."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from unistream.conformance.recorded import RecordedMember
from unistream.conformance.registry import GATED, MUST, Tier, case
from unistream.conformance.trial import Trial
from unistream.core.partitions import partition_for
from unistream.errors import UnsupportedError

ORDERED = GATED(ordering="key")


@case("ord.fifo-single", rules=("ORD-5",), level=MUST, tier=Tier.SMOKE, sometimes=("delivered",))
async def fifo_single(trial: Trial) -> None:
    """One partition, one member, no redelivery: deliveries come in publish order."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(100):
        await producer.submit()
    await producer.watched()
    member = await trial.member(group, max_in_flight=50)
    numbers: list[int] = []
    while len(numbers) < 100:
        for lent in await member.receive_many(10, trial.pace.patience):
            numbers.append(int((lent.msg or "x.0").rpartition(".")[2]))
            await lent.ack()
    trial.equal(numbers, sorted(numbers), "ORD-5", "deliveries in publish order")


@case("ord.per-key", rules=("ORD-2",), level=ORDERED, sometimes=("delivered",))
async def per_key(trial: Trial) -> None:
    """In an ordered group messages of one key are lent in publish order, over several members."""
    topic = await trial.topic(partitions=4, ordering="key")
    group = await trial.group(topic, ordering="key")
    members = [await trial.member(group, max_in_flight=10) for _ in range(4)]
    producer = await trial.producer(topic)
    for number in range(320):
        await producer.submit(key=b"key-%d" % (number % 16))
    await producer.watched()
    order: dict[str, list[int]] = defaultdict(list)

    async def consume(member: RecordedMember) -> None:
        # Partitions are shared out anew while members join, so one of them may have long to wait.
        waits = trial.lull
        while sum(map(len, order.values())) < 320 and waits < trial.pace.patience + trial.lull:
            lent = await member.receive(0.5)
            if lent is None:
                waits += 0.5
                continue
            waits = trial.lull
            order[(lent.delivery.key or b"").decode()].append(int((lent.msg or "x.0").rpartition(".")[2]))
            await lent.ack()

    await asyncio.gather(*(consume(member) for member in members))
    trial.equal(sum(map(len, order.values())), 320, "GRP-1", "deliveries")
    for key, numbers in order.items():
        trial.equal(numbers, sorted(numbers), "ORD-2", f"order of {key}")


@case("ord.m3-m4-crash", rules=("ORD-2",), level=ORDERED, sometimes=("died", "redelivered"))
async def m3_m4_crash(trial: Trial) -> None:
    """The holder of m3 dies: m4 of the same key is not lent before m3 is settled."""
    topic = await trial.topic(partitions=1, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    victim, line = await trial.doomed(group, max_in_flight=1)
    m3, _ = await producer.publish(key=b"k")
    m4, _ = await producer.publish(key=b"k")
    held = await trial.next(victim)
    trial.equal(held.msg, m3, "ORD-2", "first delivery")
    other = await trial.member(group)
    trial.kill(victim, line)
    first = await trial.next(other, "GRP-4", timeout=2 * trial.recovery + trial.lease)
    trial.equal(first.msg, m3, "ORD-2", "first delivery after the death")
    await trial.silent(other, "ORD-2")
    await first.ack()
    second = await trial.next(other, "ORD-2")
    trial.equal(second.msg, m4, "ORD-2", "delivery after m3 was settled")
    await second.ack()


@case("ord.redelivered-batch", rules=("ORD-2", "GRP-4"), level=ORDERED, sometimes=("died", "redelivered"), limit=120.0)
async def redelivered_batch(trial: Trial) -> None:
    """When a member dies with messages of five keys in hand each comes again before the later ones of its key."""
    topic = await trial.topic(partitions=8, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    keys = _apart(8, 5)
    wanted = {key: [(await producer.publish(key=key))[0]] for key in keys}
    victim, line = await trial.doomed(group, max_in_flight=len(keys))
    held = await trial.take(victim, len(keys), "ORD-2")
    trial.equal(sorted(str(lent.msg) for lent in held), sorted(first for (first,) in wanted.values()), "ORD-2", "batch")
    for _ in range(2):
        for key in keys:
            wanted[key].append((await producer.publish(key=key))[0])
    trial.kill(victim, line)
    fresh = await trial.member(group)
    order: dict[bytes, list[str]] = {key: [] for key in keys}
    # A suspect is lent alone, so each is settled before the next one comes.
    for _ in range(3 * len(keys)):
        lent = await trial.next(fresh, "GRP-4", timeout=2 * trial.recovery + trial.lease)
        order[lent.delivery.key or b""].append(lent.msg or "")
        await lent.ack()
    trial.equal(order, wanted, "ORD-2", "deliveries by key")


@case("ord.unordered-reorders", rules=("ORD-1",), sometimes=("died", "redelivered"))
async def unordered_reorders(trial: Trial) -> None:
    """In an unordered group m4 may be handled before m3 when the holder of m3 dies: a property, not a bug."""
    topic = await trial.topic(partitions=1)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    victim, line = await trial.doomed(group, max_in_flight=1)
    m3, _ = await producer.publish(key=b"k")
    m4, _ = await producer.publish(key=b"k")
    await trial.next(victim)
    other = await trial.member(group)
    trial.kill(victim, line)
    order = []
    for _ in range(2):
        lent = await trial.next(other, "GRP-4", timeout=2 * trial.recovery + trial.lease)
        order.append(lent.msg)
        await lent.ack()
    trial.equal(sorted(map(str, order)), sorted([m3, m4]), "GRP-1", "both messages")
    if order == [m4, m3]:
        trial.tally("reordered")


@case("ord.nack-holds-key", rules=("ORD-2", "DEL-2"), level=GATED(ordering="key", nack_delay=2), sometimes=("nacked",))
async def nack_holds_key(trial: Trial) -> None:
    """A nacked message holds up the later ones of its key, and nobody else's."""
    topic = await trial.topic(partitions=8, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    member = await trial.member(group)
    held_key, free_key = _apart(8, 2)
    first, _ = await producer.publish(key=held_key)
    second, _ = await producer.publish(key=held_key)
    lent = await trial.next(member)
    trial.equal(lent.msg, first, "ORD-2", "first delivery")
    await lent.nack(2.0)
    other, _ = await producer.publish(key=free_key)
    flowing = await trial.next(member, "ORD-2", timeout=1.5)
    trial.equal(flowing.msg, other, "ORD-2", "delivery while the first waits")
    await flowing.ack()
    again = await trial.next(member, "DEL-2", timeout=4.0 + trial.pace.slack)
    trial.equal(again.msg, first, "ORD-2", "delivery after the delay")
    await again.ack()
    last = await trial.next(member, "ORD-2")
    trial.equal(last.msg, second, "ORD-2", "delivery after the first was settled")
    await last.ack()


def _apart(partitions: int, count: int) -> list[bytes]:
    """Return so many keys, each of a partition of its own."""
    found: dict[int, bytes] = {}
    for number in range(100):
        key = b"key-%d" % number
        found.setdefault(partition_for(key, partitions), key)
    return list(found.values())[:count]


@case("ord.keys-flow-beside", rules=("ORD-2",), level=GATED(ordering="key-only"), sometimes=("delivered",))
async def keys_flow_beside(trial: Trial) -> None:
    """Where the blocked unit is the key, other keys of the same partition keep flowing."""
    topic = await trial.topic(partitions=1, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish(key=b"held")
    held = await trial.next(member)
    other, _ = await producer.publish(key=b"free")
    flowing = await trial.next(member, "ORD-2")
    trial.equal(flowing.msg, other, "ORD-2", "delivery beside the held key")
    await flowing.ack()
    await held.ack()


@case("ord.none-key-never-blocks", rules=("ORD-2",), level=ORDERED, sometimes=("delivered",))
async def none_key_never_blocks(trial: Trial) -> None:
    """Messages without a key have no order and block nothing; the empty key is a key."""
    topic = await trial.topic(partitions=1, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    member = await trial.member(group)
    for _ in range(3):
        await producer.publish(key=None)
    held = await trial.take(member, 3, "ORD-2")
    for lent in held:
        await lent.ack()
    await producer.publish(key=b"")
    await producer.publish(key=b"")
    first = await trial.next(member)
    await trial.silent(member, "ORD-2")
    await first.ack()
    await (await trial.next(member, "ORD-2")).ack()


@case("ord.across-members", rules=("ORD-2", "GRP-4"), level=ORDERED, sometimes=("left", "delivered"))
async def across_members(trial: Trial) -> None:
    """When members come and go under load, no new owner is ahead of an unsettled older message of a key."""
    topic = await trial.topic(partitions=4, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)

    async def consume(member: RecordedMember, count: int) -> None:
        while count and (lent := await member.receive(trial.lull)) is not None:
            await asyncio.sleep(0.005)
            await lent.ack()
            count -= 1
        await member.leave()

    async with asyncio.TaskGroup() as tasks:
        for count in (30, 60, 1000, 1000):
            tasks.create_task(consume(await trial.member(group, max_in_flight=10), count))
        for number in range(300):
            await producer.submit(key=b"key-%d" % (number % 12))
        await producer.watched()
    await trial.drain(group)


@case("ord.reject-releases-key", rules=("ORD-2", "DEL-3"), level=ORDERED, sometimes=("rejected",))
async def reject_releases_key(trial: Trial) -> None:
    """A rejected message lets the next one of its key follow."""
    topic = await trial.topic(ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish(key=b"k")
    second, _ = await producer.publish(key=b"k")
    await (await trial.next(member)).reject()
    lent = await trial.next(member, "ORD-2")
    trial.equal(lent.msg, second, "ORD-2", "delivery after the reject")
    await lent.ack()


@case("ord.several-producers", rules=("ORD-2", "PUB-4"), level=ORDERED, sometimes=("drained",))
async def several_producers(trial: Trial) -> None:
    """Four producers of one key at once: each one's own order is kept."""
    topic = await trial.topic(ordering="key")
    group = await trial.group(topic, ordering="key")
    producers = [await trial.producer(topic, client=await trial.open()) for _ in range(4)]
    for _ in range(25):
        for producer in producers:
            await producer.submit(key=b"k")
    for producer in producers:
        await producer.watched()
    await trial.drain(group)


@case("ord.partition-of-key", rules=("ORD-3",), level=ORDERED, sometimes=("delivered",))
async def partition_of_key(trial: Trial) -> None:
    """The partition of a key is murmur2 mod partitions, the same on every backend."""
    topic = await trial.topic(partitions=8, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    member = await trial.member(group)
    # Vectors of Kafka's own client: murmur2 of these keys, masked to 31 bits.
    vectors = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    for key in vectors:
        await producer.publish(key=key)
    for _ in vectors:
        lent = await trial.next(member)
        key = lent.delivery.key or b""
        trial.equal(lent.delivery.partition, (vectors[key] & 0x7FFFFFFF) % 8, "ORD-3", f"partition of {key!r}")
        await lent.ack()


@case("ord.shared-on-ordered", rules=("ORD-4",), level=ORDERED, sometimes=("drained",))
async def shared_on_ordered(trial: Trial) -> None:
    """A shared group on an ordered topic is allowed, and sees everything."""
    topic = await trial.topic(partitions=2, ordering="key")
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for number in range(40):
        await producer.submit(key=b"key-%d" % (number % 3))
    await producer.watched()
    await trial.drain(group)


@case("ord.unordered-refused", rules=("ORD-4",), tier=Tier.SMOKE)
async def unordered_refused(trial: Trial) -> None:
    """Asking a group for an order that its topic does not give raises UnsupportedError at open."""
    topic = await trial.topic()
    group = trial.client.group("ordered", topic, ordering="key")
    await trial.raises(UnsupportedError, group.create(), "ORD-4")
    trial.equal([spec.name for spec in await trial.client.groups(topic)], [], "ORD-4", "groups made all the same")


@case("ord.one-at-a-time", rules=("ORD-2",), level=GATED(ordering="key"), sometimes=("delivered", "acked", "drained"))
async def one_at_a_time(trial: Trial) -> None:
    """A lone member that takes one message at a time is lent every key in publish order, from the first on."""
    topic = await trial.topic(partitions=2, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    for number in range(20):
        await producer.publish(key=b"k%d" % (number % 3))
    member = await trial.member(group, max_in_flight=1)
    for _ in range(20):
        await (await trial.next(member)).ack()
    await member.leave()
    await trial.drain(group)
