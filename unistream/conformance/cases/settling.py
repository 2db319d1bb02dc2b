"""Cases `ack.*` and `nack.*`: what settling means, for the one who settles and for the others."""

from __future__ import annotations

import asyncio
from typing import Any

from unistream import Backoff, Retry
from unistream.conformance.recorded import Lent, RecordedMember
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import AlreadySettledError

MARGIN = 1.5
"""How many leases to wait where one must have ended."""


async def one(trial: Trial, **options: Any) -> tuple[RecordedMember, Lent, str]:
    """Publish one message and let a member hold it."""
    topic = await trial.topic()
    group = await trial.group(topic, **options)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    return member, await trial.next(member), topic


@case("ack.not-redelivered", rules=("DEL-1",), sometimes=("acked", "died", "delivered"))
async def not_redelivered(trial: Trial) -> None:
    """What was acked is never delivered to this group again, also after the member's death."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(10):
        await producer.publish()
    member, line = await trial.doomed(group)
    for lent in await trial.take(member, 10):
        await lent.ack(confirm=bool(trial.claims.ack_confirm))
    await asyncio.sleep(trial.terms.settle_flush)
    trial.kill(member, line)
    fresh = await trial.member(group)
    await asyncio.sleep(MARGIN * trial.recovery)
    fence, _ = await producer.publish()
    lent = await trial.next(fresh)
    trial.equal(lent.msg, fence, "DEL-1", "next delivery, the fence,")
    await lent.ack()


@case("ack.redeliver-unacked", rules=("GRP-4", "DEL-9"), sometimes=("died", "redelivered"))
async def redeliver_unacked(trial: Trial) -> None:
    """What a dead member held unsettled goes to others within the declared time."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = {(await producer.publish())[0] for _ in range(5)}
    member, line = await trial.doomed(group)
    await trial.take(member, 5)
    trial.kill(member, line)
    fresh = await trial.member(group)
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.recovery + trial.lease + trial.pace.slack
    got: set[str] = set()
    # A suspect is lent alone, so each is settled before the next one comes.
    while got != names and loop.time() < ends:
        lent = await fresh.receive(ends - loop.time())
        if lent is not None:
            got.add(lent.msg or "")
            await lent.ack()
    trial.equal(got, names, "GRP-4", f"redelivered within {trial.recovery:.1f} s of the lease")


@case("ack.out-of-order", rules=("DEL-1", "GRP-1"), sometimes=("died", "redelivered"))
async def out_of_order(trial: Trial) -> None:
    """An ack settles its own message and no other: only the one left out comes again."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(10):
        await producer.publish()
    member, line = await trial.doomed(group)
    lents = await trial.take(member, 10)
    for place, lent in enumerate(lents):
        if place != 3:
            await lent.ack(confirm=bool(trial.claims.ack_confirm))
    await asyncio.sleep(trial.terms.settle_flush)
    trial.kill(member, line)
    fresh = await trial.member(group)
    again = await trial.next(fresh, "GRP-4", timeout=2 * trial.recovery + trial.lease)
    trial.equal(again.msg, lents[3].msg, "DEL-1", "message that comes again")
    await again.ack()
    fence, _ = await producer.publish()
    lent = await trial.next(fresh)
    trial.equal(lent.msg, fence, "DEL-1", "next delivery, the fence,")
    await lent.ack()


@case("ack.confirmed", rules=("DEL-1",), level=GATED("ack_confirm"), tier=Tier.SMOKE, sometimes=("acked",))
async def confirmed(trial: Trial) -> None:
    """`ack(confirm=True)` returns when the broker holds the ack: the lag is one lower."""
    member, lent, _ = await one(trial)
    await lent.ack(confirm=True)
    if trial.claims.lag and trial.claims.lag.exact:
        trial.equal((await member.group.lag()).messages, 0, "DEL-1", "lag after a confirmed ack")


@case("ack.double", rules=("DEL-5",), tier=Tier.SMOKE, sometimes=("acked",))
async def double(trial: Trial) -> None:
    """Acking twice is the same as once, and settles nothing else."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    await producer.publish()
    first, second = await trial.take(member, 2)
    for _ in range(2):
        await first.ack()
    await second.nack(0.0)
    again = await trial.next(member, "DEL-5")
    trial.equal(again.msg, second.msg, "DEL-5", "the other message, not settled by the second ack,")
    await again.ack()


@case("ack.conflicting", rules=("DEL-5",), tier=Tier.SMOKE, sometimes=("acked", "nacked"))
async def conflicting(trial: Trial) -> None:
    """A second, different settle raises AlreadySettledError and changes nothing."""
    member, lent, _ = await one(trial)
    await lent.nack(0.0)
    await trial.raises(AlreadySettledError, lent.ack(), "DEL-5")
    again = await trial.next(member, "DEL-5")
    await again.ack(confirm=bool(trial.claims.ack_confirm))
    await trial.raises(AlreadySettledError, again.nack(0.0), "DEL-5")
    await trial.raises(AlreadySettledError, again.reject(), "DEL-5")
    trial.equal(str(again.delivery.state), "acked", "DEL-5", "state")


@case("ack.coalesced", rules=("DEL-1",), sometimes=("acked",))
async def coalesced(trial: Trial) -> None:
    """Plain acks reach the broker by themselves soon, without closing or confirming."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(30):
        await producer.submit()
    await producer.watched()
    member = await trial.member(group)
    for lent in await trial.take(member, 30):
        await lent.ack()
    await asyncio.sleep(MARGIN * trial.lease)
    fence, _ = await producer.publish()
    lent = await trial.next(member)
    trial.equal(lent.msg, fence, "DEL-1", "next delivery, the fence,")
    if trial.claims.lag and trial.claims.lag.exact:
        trial.equal((await group.lag()).messages, 1, "DEL-1", "lag, the fence alone,")
    await lent.ack()


@case("nack.redelivers", rules=("DEL-2", "DEL-4"), tier=Tier.SMOKE, sometimes=("nacked", "redelivered"))
async def redelivers(trial: Trial) -> None:
    """A nacked message is delivered again soon, with `attempt` one higher; the others are not."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(10):
        await producer.publish()
    member = await trial.member(group)
    nacked = set()
    for place, lent in enumerate(await trial.take(member, 10)):
        if place in (2, 5, 7):
            nacked.add(lent.msg)
            await lent.nack(0.0)
        else:
            await lent.ack()
    again = [await trial.next(member, "DEL-2", timeout=2.0 + trial.pace.slack) for _ in range(3)]
    trial.equal({lent.msg for lent in again}, nacked, "DEL-2", "messages that come again")
    trial.equal({lent.delivery.attempt for lent in again}, {2}, "DEL-4", "attempts")
    for lent in again:
        await lent.ack()


@case("nack.delay", rules=("DEL-2",), level=GATED(nack_delay=2), sometimes=("nacked", "redelivered"))
async def delay(trial: Trial) -> None:
    """A nacked message never comes before its delay and at most a second after it; others flow meanwhile."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    name, _ = await producer.publish()
    lent = await trial.next(member)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await lent.nack(2.0)
    done = loop.time()
    other, _ = await producer.publish()
    flowing = await trial.next(member, "DEL-2")
    trial.equal(flowing.msg, other, "DEL-2", "delivery while the nacked one waits")
    await flowing.ack()
    again = await trial.next(member, "DEL-2", timeout=2.0 + 1.0 + trial.pace.slack)
    now = loop.time()
    trial.equal(again.msg, name, "DEL-2", "the nacked message")
    trial.that(now >= began + 2.0 - trial.terms.resolution, "DEL-2", "no delivery before 2 s", f"{now - began:.3f} s")
    trial.that(now <= done + 3.0 + trial.pace.slack, "DEL-2", "a delivery within 3 s", f"{now - done:.3f} s")
    await again.ack()


@case(
    "nack.delay-survives-crash", rules=("DEL-2", "GRP-4"), level=GATED(nack_delay=3), sometimes=("died", "redelivered")
)
async def delay_survives_crash(trial: Trial) -> None:
    """The delay of a nack outlives the member that nacked: neither forgotten nor cut short."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member, line = await trial.doomed(group)
    name, _ = await producer.publish()
    lent = await trial.next(member)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await lent.nack(3.0)
    await asyncio.sleep(trial.terms.settle_flush)
    trial.kill(member, line)
    fresh = await trial.member(group)
    again = await trial.next(fresh, "DEL-2", timeout=4.0 + trial.recovery)
    trial.equal(again.msg, name, "DEL-2", "the nacked message")
    took = loop.time() - began
    trial.that(took >= 3.0 - trial.terms.resolution, "DEL-2", "no delivery before 3 s", f"{took:.3f} s")
    await again.ack()


@case("nack.backoff-grows", rules=("DEL-2",), level=GATED(nack_delay=3), sometimes=("redelivered",))
async def backoff_grows(trial: Trial) -> None:
    """With no delay given the backoff sets it: gaps of 0.5, 1 and 2 s, never less."""
    topic = await trial.topic()
    retry = Retry(backoff=Backoff(first=0.5, factor=2.0, max=2.0, jitter=0.0))
    group = await trial.group(topic, retry=retry)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    loop = asyncio.get_running_loop()
    lent = await trial.next(member)
    for gap in (0.5, 1.0, 2.0):
        began = loop.time()
        await lent.nack()
        lent = await trial.next(member, "DEL-2", timeout=gap + 1.0 + trial.pace.slack)
        took = loop.time() - began
        trial.that(took >= gap - trial.terms.resolution, "DEL-2", f"no delivery before {gap} s", f"{took:.3f} s")
    await lent.ack()


@case("nack.others-flow", rules=("DEL-2",), sometimes=("nacked",))
async def others_flow(trial: Trial) -> None:
    """In an unordered group a message that is nacked over and over does not hold up the others."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group, max_in_flight=4)
    poison, _ = await producer.publish()
    good = {(await producer.publish())[0] for _ in range(40)}
    done: set[str] = set()
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.pace.patience
    while done != good and loop.time() < ends:
        lent = await trial.next(member, "DEL-2")
        if lent.msg == poison:
            await lent.nack(0.2 if trial.claims.nack_delay else 0.0)
        else:
            await lent.ack()
            done.add(lent.msg or "")
    trial.equal(done, good, "DEL-2", "messages done beside the poison")
