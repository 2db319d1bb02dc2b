"""Cases `red.*`: attempts, dead letters, and what a redelivery looks like."""

from __future__ import annotations

import asyncio
from typing import Any

from unistream import DROP, Backoff, Retry
from unistream.conformance.recorded import RecordedMember, RecordedProducer
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import ConfigError

QUICK = Backoff(first=0.05, factor=1.0, max=0.05, jitter=0.0)


@case("red.count-increments", rules=("DEL-4",), tier=Tier.SMOKE, sometimes=("redelivered",))
async def count_increments(trial: Trial) -> None:
    """`attempt` starts at 1 and rises by one with every nack."""
    topic = await trial.topic()
    member = await trial.member(await trial.group(topic))
    producer = await trial.producer(topic)
    await producer.publish()
    seen = []
    for _ in range(4):
        lent = await trial.next(member)
        seen.append(lent.delivery.attempt)
        await lent.nack(0.0)
    lent = await trial.next(member)
    trial.equal([*seen, lent.delivery.attempt], [1, 2, 3, 4, 5], "DEL-4", "attempts")
    await lent.ack()


@case("red.count-survives-crash", rules=("DEL-4",), level=GATED(attempts="exact"), sometimes=("died", "redelivered"))
async def count_survives_crash(trial: Trial) -> None:
    """Where `attempts` is exact it goes on rising after the death of the member that counted."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    await producer.publish()
    member, line = await trial.doomed(group)
    for _ in range(2):
        lent = await trial.next(member)
        await lent.nack(0.0)
    held = await trial.next(member)
    trial.equal(held.delivery.attempt, 3, "DEL-4", "attempt before the death")
    trial.kill(member, line)
    fresh = await trial.member(group)
    again = await trial.next(fresh, "GRP-4", timeout=2 * trial.recovery + trial.lease)
    trial.equal(again.delivery.attempt, 4, "DEL-4", "attempt after the death")
    await again.ack()


@case("red.count-per-group", rules=("DEL-4", "GRP-1"), sometimes=("nacked",))
async def count_per_group(trial: Trial) -> None:
    """Nacks in one group do not count in another."""
    topic = await trial.topic()
    first, second = await trial.group(topic), await trial.group(topic)
    producer = await trial.producer(topic)
    await producer.publish()
    member = await trial.member(first)
    for _ in range(2):
        await (await trial.next(member)).nack(0.0)
    await (await trial.next(member)).ack()
    other = await trial.next(await trial.member(second))
    trial.equal(other.delivery.attempt, 1, "DEL-4", "attempt in the other group")
    await other.ack()


async def _shared_out(trial: Trial, producer: RecordedProducer, members: list[RecordedMember]) -> None:
    """Publish and ack until every member has had something, so that each has its partition and none moves any more."""
    idle = list(members)
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.pace.patience + trial.lull
    left = 0
    while idle or left:
        trial.that(loop.time() < ends, "GRP-2", "a partition for every member", f"none for {len(idle)}")
        for _ in members if idle else ():
            await producer.publish()
            left += 1
        for member in members:
            for lent in await member.receive_many(10, 0.3):
                await lent.ack()
                left -= 1
                if member in idle:
                    idle.remove(member)


@case("red.never-early", rules=("DEL-9",), sometimes=("acked",))
async def never_early(trial: Trial) -> None:
    """Handlers that take most of the lease are not disturbed by a second lending."""
    # Where a group is shared out by partitions there is one for each member.
    topic = await trial.topic(partitions=3)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    members = [await trial.member(group, max_in_flight=2) for _ in range(3)]
    if trial.terms.rebalances:
        await _shared_out(trial, producer, members)
    for _ in range(6):
        await producer.publish()
    held = [lent for member in members for lent in await trial.take(member, 2)]
    await asyncio.sleep(0.8 * trial.lease)
    for lent in held:
        trial.equal(str(lent.delivery.state), "lent", "DEL-6", "state after 0.8 leases")
        await lent.ack()
    trial.equal({lent.delivery.attempt for lent in held}, {1}, "DEL-9", "attempts")
    await trial.drain(group)


@case("red.identity-stable", rules=("DEL-2", "GRP-1"), sometimes=("redelivered",))
async def identity_stable(trial: Trial) -> None:
    """A redelivery has the same id, value, key, headers and position."""
    topic = await trial.topic()
    member = await trial.member(await trial.group(topic))
    producer = await trial.producer(topic)
    await producer.publish(key=b"\x00key", headers=[("a", b"1"), ("a", b"2"), ("B", "\u00fc")])
    first = await trial.next(member)
    await first.nack(0.0)
    again = await trial.next(member)
    for name in ("id", "value", "key", "headers", "position", "partition", "topic"):
        was, now = getattr(first.delivery, name), getattr(again.delivery, name)
        trial.equal(now, was, "DEL-2", f"{name} of the redelivery")
    await again.ack()


@case("red.lease-expiry", rules=("DEL-6", "GRP-4", "DEL-7"), sometimes=("redelivered", "expired"))
async def lease_expiry(trial: Trial) -> None:
    """A message held beyond its lease by a living member goes to another one, and that one is the only holder."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=trial.lease)
    producer = await trial.producer(topic)
    stuck = await trial.member(group, max_in_flight=1)
    await producer.publish()
    held = await trial.next(stuck)
    other = await trial.member(group)
    again = await trial.next(other, "GRP-4", timeout=2 * trial.recovery)
    trial.that(held.expired(), "DEL-7", "the state lost on the first delivery", str(held.delivery.state))
    await again.ack()


@case("red.double-expiry", rules=("DEL-4", "GRP-2"), sometimes=("redelivered", "expired"))
async def double_expiry(trial: Trial) -> None:
    """Over three lost leases in a row `attempt` rises and there is one holder at a time."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=trial.lease)
    producer = await trial.producer(topic)
    members = [await trial.member(group, max_in_flight=1) for _ in range(2)]
    await producer.publish()
    attempts = []
    for turn in range(3):
        waiting = [asyncio.create_task(member.receive(3 * trial.recovery)) for member in members]
        done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        lents = [lent for task in done if (lent := task.result()) is not None]
        trial.equal(len(lents), 1, "GRP-2", f"holders at turn {turn}")
        attempts.append(lents[0].delivery.attempt)
        if turn == 2:
            await lents[0].ack()
        else:
            await asyncio.sleep(1.2 * trial.lease)
            lents[0].expired()
    trial.that(attempts == sorted(set(attempts)), "DEL-4", "rising attempts", attempts)


@case("red.max-attempts", rules=("DEL-4", "DEL-3"), tier=Tier.SMOKE, sometimes=("nacked",))
async def max_attempts(trial: Trial) -> None:
    """A message nacked on its last attempt is dead-lettered at once, unchanged, with its origin."""
    topic, dead = await trial.topic(), await trial.topic()
    watch = await trial.group(dead)
    group = await trial.group(topic, retry=Retry(max_attempts=3, backoff=QUICK), dead_letter=dead)
    producer = await trial.producer(topic)
    await producer.publish(key=b"k", headers={"a": b"1"}, id="the-id")
    member = await trial.member(group)
    for number in range(1, 4):
        lent = await trial.next(member)
        trial.equal(lent.delivery.attempt, number, "DEL-4", "attempt")
        await lent.nack(0.0, "no luck")
    letter = await trial.next(await trial.member(watch), "DEL-4")
    trial.equal(letter.msg, lent.msg, "DEL-3", "message in the dead letter topic")
    for name, expected in (("id", "the-id"), ("key", b"k"), ("value", lent.delivery.value)):
        trial.equal(getattr(letter.delivery, name), expected, "DEL-3", f"{name} of the dead letter")
    trial.equal(letter.delivery.headers.items(), (("a", b"1"),), "DEL-3", "headers of the dead letter")
    origin = letter.delivery.origin
    trial.that(origin is not None, "DEL-3", "an origin", origin)
    assert origin is not None
    trial.equal(
        (origin.topic, origin.group, origin.reason, origin.attempts),
        (topic, group.name, "no luck", 3),
        "DEL-3",
        "origin",
    )
    await letter.ack()
    await trial.silent(member, "DEL-3")


@case("red.reject", rules=("DEL-3",), tier=Tier.SMOKE, sometimes=("rejected",))
async def reject(trial: Trial) -> None:
    """A rejected message is never seen again by its group, and is found in the dead letter topic with the reason."""
    topic, dead = await trial.topic(), await trial.topic()
    watch = await trial.group(dead)
    group = await trial.group(topic, dead_letter=dead)
    other = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish(key=b"k")
    lent = await trial.next(member)
    await lent.reject("h\u00f6chst seltsam\n100 %")
    letter = await trial.next(await trial.member(watch), "DEL-3")
    trial.equal(letter.msg, lent.msg, "DEL-3", "message in the dead letter topic")
    origin = letter.delivery.origin
    trial.equal(origin and origin.reason, "h\u00f6chst seltsam\n100 %", "DEL-3", "reason")
    await letter.ack()
    # The other group goes its own way (GRP-1).
    beside = await trial.next(await trial.member(other), "GRP-1")
    trial.equal(beside.delivery.attempt, 1, "GRP-1", "attempt in the other group")
    await beside.ack()
    fence, _ = await producer.publish()
    lent = await trial.next(member)
    trial.equal(lent.msg, fence, "DEL-3", "next delivery, the fence,")
    await lent.ack()


@case("red.two-groups-reject", rules=("DEL-3",), sometimes=("rejected",))
async def two_groups_reject(trial: Trial) -> None:
    """Two groups may reject the same message into one dead letter topic, and both letters arrive."""
    topic, dead = await trial.topic(), await trial.topic()
    watch = await trial.group(dead)
    groups = [await trial.group(topic, dead_letter=dead) for _ in range(2)]
    producer = await trial.producer(topic)
    await producer.publish()
    for group in groups:
        await (await trial.next(await trial.member(group))).reject("by one of two")
    watcher = await trial.member(watch)
    letters = await trial.take(watcher, 2, "DEL-3")
    origins = {letter.delivery.origin.group for letter in letters if letter.delivery.origin}
    trial.equal(origins, {group.name for group in groups}, "DEL-3", "groups that the letters come from")
    for letter in letters:
        await letter.ack()


@case("red.reject-without-topic", rules=("DEL-3",), sometimes=("rejected",))
async def reject_without_topic(trial: Trial) -> None:
    """Without a dead letter topic a rejected message is dropped and counted, and never comes again."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    await (await trial.next(member)).reject()
    trial.equal(member.consumer.stats.rejected, 1, "DEL-3", "stats.rejected")
    fence, _ = await producer.publish()
    lent = await trial.next(member)
    trial.equal(lent.msg, fence, "DEL-3", "next delivery, the fence,")
    await lent.ack()


@case("red.drop", rules=("DEL-4",), sometimes=("nacked",))
async def drop(trial: Trial) -> None:
    """With `DROP` the last nack drops the message."""
    topic = await trial.topic()
    group = await trial.group(topic, retry=Retry(max_attempts=2, backoff=QUICK), dead_letter=DROP)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    for _ in range(2):
        await (await trial.next(member)).nack(0.0)
    fence, _ = await producer.publish()
    lent = await trial.next(member)
    trial.equal(lent.msg, fence, "DEL-4", "next delivery, the fence,")
    await lent.ack()


@case("red.killer-message", rules=("DEL-4", "GRP-4"), sometimes=("died",), limit=300.0)
async def killer_message(trial: Trial) -> None:
    """A message that kills its members is dead-lettered within 2 * max_attempts lendings; its neighbours are not."""
    topic, dead = await trial.topic(), await trial.topic()
    watch = await trial.group(dead)
    group = await trial.group(topic, retry=Retry(max_attempts=2, backoff=QUICK), dead_letter=dead)
    producer = await trial.producer(topic)
    killer, _ = await producer.publish()
    good = {(await producer.publish())[0] for _ in range(6)}
    done: set[str] = set()
    deaths = 0
    while deaths < 4:
        member, line = await trial.doomed(group, max_in_flight=8)
        while (lent := await member.receive(2 * trial.recovery)) is not None:
            if lent.msg == killer:
                trial.kill(member, line)
                deaths += 1
                break
            await lent.ack(confirm=bool(trial.claims.ack_confirm))
            done.add(lent.msg or "")
        else:
            await member.leave()
            break
    trial.that(deaths <= 4, "DEL-4", "at most 4 lendings of the killer", f"{deaths} deaths")
    watcher = await trial.member(watch)
    letter = await trial.next(watcher, "DEL-4", timeout=2 * trial.recovery)
    trial.equal(letter.msg, killer, "DEL-4", "message in the dead letter topic")
    await letter.ack()
    await trial.silent(watcher, "DEL-4")
    trial.equal(done, good, "GRP-4", "neighbours handled")


@case("red.no-loop", rules=("DEL-3",), sometimes=("nacked",))
async def no_loop(trial: Trial) -> None:
    """A dead letter that is nacked stays in its topic and keeps its origin."""
    topic, dead = await trial.topic(), await trial.topic()
    watch = await trial.group(dead)
    group = await trial.group(topic, dead_letter=dead)
    producer = await trial.producer(topic)
    await producer.publish()
    member = await trial.member(group)
    await (await trial.next(member)).reject("once")
    watcher = await trial.member(watch)
    letter = await trial.next(watcher)
    origin = letter.delivery.origin
    await letter.nack(0.0)
    again = await trial.next(watcher)
    trial.equal(again.delivery.origin, origin, "DEL-3", "origin after a nack")
    await again.ack()
    await trial.silent(member, "DEL-3")


@case("dlq.no-loop", rules=("DEL-3", "DEL-4", "END-6"), sometimes=("nacked", "delivered"))
async def dead_letter_ends(trial: Trial) -> None:
    """A dead letter that fails among the dead letters goes one topic further, or nowhere, and never round."""
    topic, dead, deeper = await trial.topic(), await trial.topic(), await trial.topic()
    last = await trial.group(deeper, "last")
    twice = Retry(max_attempts=2, backoff=QUICK)
    graves = await trial.group(dead, "graves", retry=twice, dead_letter=deeper)
    group = await trial.group(topic, "work", retry=twice, dead_letter=dead)
    producer = await trial.producer(topic)
    name, _ = await producer.publish()
    members = [await trial.member(each) for each in (group, graves, last)]
    for member, (came_from, whose) in zip(members, ((None, None), (topic, "work"), (dead, "graves")), strict=True):
        for _ in range(2):
            lent = await trial.next(member, "DEL-3")
            origin = lent.delivery.origin
            trial.equal(lent.msg, name, "DEL-3", "message")
            trial.equal(origin and origin.topic, came_from, "DEL-3", "topic that the letter comes from")
            trial.equal(origin and origin.group, whose, "DEL-3", "group that the letter comes from")
            await lent.nack(0.0, "it fails everywhere")
    # Nobody told the last topic's group how many attempts it has, so there it is nacked for as long as one likes.
    await (await trial.next(members[2], "DEL-2")).ack()
    for member in members:
        await trial.silent(member, "DEL-3")
    with_itself = {"retry": twice, "dead_letter": topic}
    await trial.raises(ConfigError, _group_of(trial, topic, with_itself), "END-6")


async def _group_of(trial: Trial, topic: str, options: dict[str, Any]) -> None:
    await trial.client.group("round", topic, **options).create()
