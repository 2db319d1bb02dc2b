"""Cases `grp.*`: fan-out between groups, load balancing inside one."""

from __future__ import annotations

import asyncio
from collections import Counter

from unistream.conformance.recorded import RecordedMember
from unistream.conformance.registry import GATED, SHOULD, Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import GroupConflictError


async def _consume(trial: Trial, member: RecordedMember, seen: Counter[str], *, work: float = 0.0) -> None:
    """Ack everything that comes, until nothing comes for a while."""
    while (lent := await member.receive(trial.lull)) is not None:
        if work:
            await asyncio.sleep(work)
        await lent.ack()
        seen[lent.msg or ""] += 1


@case("grp.load-balance", rules=("GRP-2",), tier=Tier.SMOKE, sometimes=("delivered",))
async def load_balance(trial: Trial) -> None:
    """Inside a group each message goes to one member."""
    topic = await trial.topic(partitions=4)
    group = await trial.group(topic)
    members = [await trial.member(group, max_in_flight=5) for _ in range(4)]
    producer = await trial.producer(topic)
    published = [(await producer.submit(key=b"%d" % (number % 16)))[0] for number in range(200)]
    seen: Counter[str] = Counter()
    await asyncio.gather(*(_consume(trial, member, seen) for member in members))
    trial.equal(seen, Counter(published), "GRP-2", "times that each message was handled")


@case("grp.fan-out", rules=("GRP-1",), tier=Tier.SMOKE, sometimes=("drained",))
async def fan_out(trial: Trial) -> None:
    """Every group receives every message."""
    topic = await trial.topic()
    groups = [await trial.group(topic) for _ in range(3)]
    producer = await trial.producer(topic)
    for _ in range(50):
        await producer.submit()
    await producer.watched()
    await trial.drain(*groups)


@case("grp.combined", rules=("GRP-1", "GRP-2"), sometimes=("delivered",))
async def combined(trial: Trial) -> None:
    """Fan-out and load balancing hold together: three groups of three members, each message once per group."""
    topic = await trial.topic(partitions=3)
    producer = await trial.producer(topic)
    seen: list[Counter[str]] = []
    consuming = []
    for _ in range(3):
        group = await trial.group(topic)
        seen.append(Counter())
        for _ in range(3):
            consuming.append((await trial.member(group, max_in_flight=4), seen[-1]))
    published = [(await producer.submit(key=b"%d" % (number % 9)))[0] for number in range(100)]
    await asyncio.gather(*(_consume(trial, member, counts) for member, counts in consuming))
    for counts in seen:
        trial.equal(counts, Counter(published), "GRP-1", "times that each message was handled in a group")


@case("grp.independent-settle", rules=("GRP-1",), sometimes=("nacked", "rejected", "acked"))
async def independent_settle(trial: Trial) -> None:
    """What one group nacks, rejects and acks leaves the other group's deliveries as they are."""
    topic = await trial.topic()
    first, second = await trial.group(topic), await trial.group(topic)
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(3)]
    member = await trial.member(first)
    one, two, three = await trial.take(member, 3)
    await one.ack()
    await two.reject()
    await three.nack(0.0)
    await (await trial.next(member)).ack()
    other = await trial.member(second)
    got = await trial.take(other, 3)
    trial.equal(sorted(lent.msg or "" for lent in got), sorted(names), "GRP-1", "deliveries of the other group")
    for lent in got:
        trial.equal(lent.delivery.attempt, 1, "DEL-4", "attempt in the other group")
        await lent.ack()


@case("grp.spread", rules=("GRP-2",), level=SHOULD, sometimes=("delivered",))
async def spread(trial: Trial) -> None:
    """Every member of a busy group gets some of the work."""
    topic = await trial.topic(partitions=8)
    group = await trial.group(topic)
    members = [await trial.member(group, max_in_flight=3) for _ in range(4)]
    producer = await trial.producer(topic)
    for number in range(200):
        await producer.submit(key=b"%d" % (number % 32))
    await producer.watched()
    counts = [Counter[str]() for _ in members]
    await asyncio.gather(
        *(_consume(trial, member, seen, work=0.01) for member, seen in zip(members, counts, strict=True))
    )
    shares = [seen.total() for seen in counts]
    trial.that(all(shares), "GRP-2", "every member to get some", shares)


@case("grp.slow-member", rules=("GRP-2", "DEL-2"), level=GATED(parallelism="unlimited"), sometimes=("delivered",))
async def slow_member(trial: Trial) -> None:
    """A member that holds all it may does not keep the others from the rest."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    slow = await trial.member(group, max_in_flight=2)
    for _ in range(50):
        await producer.submit()
    await producer.watched()
    held = await trial.take(slow, 2)
    quick = await trial.member(group)
    seen: Counter[str] = Counter()
    await _consume(trial, quick, seen)
    trial.equal(seen.total(), 48, "GRP-2", "messages done by the other member")
    for lent in held:
        await lent.ack()


@case("grp.surplus-members", rules=("GRP-2", "GRP-4"), sometimes=("died", "redelivered"))
async def surplus_members(trial: Trial) -> None:
    """More members than partitions do no harm, and one of them takes over when the busy one dies."""
    topic = await trial.topic(partitions=1)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    busy, line = await trial.doomed(group)
    name, _ = await producer.publish()
    await trial.next(busy)
    idle = [await trial.member(group) for _ in range(2)]
    trial.kill(busy, line)
    waiting = [asyncio.create_task(member.receive(2 * trial.recovery + trial.lease)) for member in idle]
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    got = [lent for task in done if (lent := task.result()) is not None]
    trial.equal([lent.msg for lent in got], [name], "GRP-4", "deliveries after the death")
    await got[0].ack()


@case("grp.name-scope", rules=("GRP-1",), sometimes=("delivered",))
async def name_scope(trial: Trial) -> None:
    """A group's name is scoped by its topic: two groups of one name on two topics have nothing in common."""
    topics = [await trial.topic() for _ in range(2)]
    groups = [await trial.group(topic, "same") for topic in topics]
    producers = [await trial.producer(topic) for topic in topics]
    names = [(await producer.publish())[0] for producer in producers]
    for group, name in zip(groups, names, strict=True):
        member = await trial.member(group)
        lent = await trial.next(member)
        trial.equal(lent.msg, name, "GRP-1", "delivery of the topic's own message")
        await lent.ack()
        await trial.silent(member, "GRP-1")


@case("grp.lag", rules=("GRP-1",), level=GATED("lag"), sometimes=("acked",))
async def lag(trial: Trial) -> None:
    """`lag()` is the number of messages published and not settled, those in flight included."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(20):
        await producer.publish()
    trial.equal((await group.lag()).messages, 20, "GRP-1", "lag before any delivery")
    member = await trial.member(group)
    for lent in await trial.take(member, 8):
        await lent.ack(confirm=bool(trial.claims.ack_confirm))
    await asyncio.sleep(trial.terms.settle_flush)
    found = await group.lag()
    if found.exact:
        trial.equal(found.messages, 12, "GRP-1", "lag after 8 of 20")
    await member.leave()
    await trial.drain(group)


@case("grp.leave-hands-over", rules=("GRP-4", "END-1"), sometimes=("left", "redelivered"))
async def leave_hands_over(trial: Trial) -> None:
    """What a member held or had fetched when it left is lent to others within 5 s."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=10 * trial.lease)
    producer = await trial.producer(topic)
    for _ in range(30):
        await producer.submit()
    await producer.watched()
    leaver = await trial.member(group, max_in_flight=20)
    await trial.take(leaver, 3)
    other = await trial.member(group)
    await leaver.leave()
    loop = asyncio.get_running_loop()
    began = loop.time()
    for _ in range(30):
        lent = await trial.next(other, "GRP-4", timeout=5.0 + trial.pace.slack)
        await lent.ack()
    took = loop.time() - began
    trial.that(took <= 5.0 + trial.pace.slack, "GRP-4", "all handed over within 5 s", f"{took:.2f} s")


@case("grp.all-gone", rules=("GRP-6",), sometimes=("acked", "left"))
async def all_gone(trial: Trial) -> None:
    """A group without members keeps its progress: those who return find the first unsettled message."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(10)]
    member = await trial.member(group)
    settled = set()
    for lent in await trial.take(member, 6):
        settled.add(lent.msg)
        await lent.ack()
    await member.leave()
    names += [(await producer.publish())[0] for _ in range(5)]
    fresh = await trial.member(group)
    got = set()
    for _ in range(9):
        lent = await trial.next(fresh, "GRP-6")
        got.add(lent.msg)
        await lent.ack()
    trial.equal(got, set(names) - settled, "GRP-6", "deliveries after the return")


@case("grp.conflict", rules=("GRP-3",), tier=Tier.SMOKE)
async def conflict(trial: Trial) -> None:
    """Creating a group again is fine; with other settings it raises GroupConflictError and keeps the old ones."""
    topic = await trial.topic()
    group = await trial.group(topic, "settled", lease=20.0)
    await group.create()
    other = trial.client.group("settled", topic, lease=40.0)
    await trial.raises(GroupConflictError, other.create(), "GRP-3")
    await group.create()


@case("grp.ephemeral", rules=("GRP-5",), sometimes=("seen",))
async def ephemeral(trial: Trial) -> None:
    """Each consumer of an ephemeral group sees all messages from entry to close, and leaves nothing behind."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    await producer.publish()
    group = trial.client.group(None, topic)
    async with group.consumer() as one, group.consumer() as two:
        published = [(await producer.publish())[1].id for _ in range(5)]
        for consumer in (one, two):
            got = []
            for _ in range(5):
                delivery = await consumer.receive(trial.pace.patience)
                trial.that(delivery is not None, "GRP-5", "a delivery", delivery)
                if delivery is not None:
                    got.append(delivery.id)
                    await delivery.ack()
                    trial.tally("seen")
            trial.equal(got, published, "GRP-5", "messages seen")
            trial.that(await consumer.receive(0.2) is None, "GRP-5", "nothing from before entry", "a delivery")
    left = [spec.name for spec in await trial.client.groups(topic)]
    trial.equal(left, [], "GRP-5", "groups left behind")
