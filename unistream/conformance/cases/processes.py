"""Cases with members in processes of their own: killed, stopped and continued for real."""

from __future__ import annotations

import asyncio

from unistream.conformance.cases.retention import once
from unistream.conformance.members import Held, Worker, WorkerError, worker
from unistream.conformance.recorded import RecordedMember
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial

PROCESS = ("process",)
KILLED = ("killed", "died")


def within(trial: Trial) -> float:
    """Return the seconds within which what a dead process held comes again: its lease, and what recovery takes."""
    return trial.recovery + trial.lease + trial.claims.lease.dead_peer_after


async def take(trial: Trial, who: Worker, count: int) -> list[Held]:
    """Receive `count` deliveries that must come to a process."""
    return [await who.next() for _ in range(count)]


async def collect(trial: Trial, member: RecordedMember, names: set[str], rule: str = "GRP-4") -> None:
    """Ack what comes until all of `names` have come, in the time that a death allows."""
    await trial.collect(member, names, rule, seconds=within(trial))


@case(
    "ack.not-on-receive",
    rules=("GRP-1", "GRP-4", "DEL-1"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "redelivered"),
    limit=90.0,
)
async def not_on_receive(trial: Trial) -> None:
    """What a process had received and not acked when it was killed is delivered to another one."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = {(await producer.publish())[0] for _ in range(5)}
    victim = await worker(trial)
    await victim.join(group)
    await take(trial, victim, 5)
    await victim.kill()
    await collect(trial, await trial.member(group), names)


@case(
    "ack.confirmed-survives-kill",
    rules=("DEL-1",),
    level=GATED("ack_confirm"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "acked", "redelivered", "drained"),
    limit=120.0,
)
async def confirmed_survives_kill(trial: Trial) -> None:
    """A confirmed ack is final though its process is killed at once; only the one left out comes again."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(10):
        await producer.publish()
    victim = await worker(trial)
    await victim.join(group)
    helds = await take(trial, victim, 10)
    await asyncio.gather(*(held.ack(confirm=True) for place, held in enumerate(helds) if place != 3))
    await victim.kill()
    member = await trial.member(group)
    again = await trial.next(member, "GRP-4", timeout=within(trial))
    trial.equal(again.msg, helds[3].msg, "DEL-1", "message that comes again")
    await again.ack()
    await member.leave()
    await trial.drain(group)


@case(
    "ord.m3-m4-kill9",
    rules=("ORD-2", "GRP-4"),
    level=GATED(ordering="key"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "redelivered"),
    limit=120.0,
)
async def m3_m4_kill9(trial: Trial) -> None:
    """When the process that holds m3 is killed, the group sees m3 again before it ever sees m4 of the same key."""
    topic = await trial.topic(partitions=2, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    victim = await worker(trial)
    # With room for one only, so that what is not lent for the order's sake is free for the other.
    await victim.join(group, max_in_flight=1)
    names = [(await producer.publish(key=b"k"))[0] for _ in range(6)]
    for name in names[:2]:
        held = await victim.next("ORD-2")
        trial.equal(held.msg, name, "ORD-2", "message in its turn")
        await held.ack(confirm=bool(trial.claims.ack_confirm))
    held = await victim.next("ORD-2")
    trial.equal(held.msg, names[2], "ORD-2", "m3")
    other = await trial.member(group)
    await trial.silent(other, "ORD-2", seconds=trial.lease / 2)
    await victim.kill()
    for name in names[2:]:
        lent = await trial.next(other, "GRP-4", timeout=within(trial))
        trial.equal(lent.msg, name, "ORD-2", "message in its turn after the crash")
        await lent.ack()


@case(
    "ord.unordered-kill9",
    rules=("ORD-1", "GRP-1"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "redelivered"),
    limit=90.0,
)
async def unordered_kill9(trial: Trial) -> None:
    """In an unordered group m4 does not wait for m3, which comes again after the process that held it was killed."""
    topic = await trial.topic(partitions=4)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    victim = await worker(trial)
    await victim.join(group, max_in_flight=1)
    name, _ = await producer.publish()
    held = await victim.next()
    trial.equal(held.msg, name, "GRP-1", "message that the first process holds")
    other = await trial.member(group)
    later = {(await producer.publish())[0] for _ in range(8)}
    await victim.kill()
    await collect(trial, other, later | {name})


@case(
    "reb.zombie",
    rules=("DEL-7", "GRP-4", "GRP-2", "END-3"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("stopped", "redelivered", "drained"),
    limit=180.0,
)
async def zombie(trial: Trial) -> None:
    """A process that stood still beyond its lease settles nothing any more when it wakes up, and works as a member."""
    topic = await trial.topic(partitions=2)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = {(await producer.publish())[0] for _ in range(4)}
    sleeper = await worker(trial)
    await sleeper.join(group, max_in_flight=4)
    helds = await take(trial, sleeper, 4)
    sleeper.stop()
    other = await trial.member(group)
    await collect(trial, other, names)
    sleeper.resume()
    confirm = bool(trial.claims.ack_confirm)
    for held in helds:
        try:
            state = await held.ack(confirm=confirm)
        except WorkerError as error:
            trial.equal(error.kind, "LeaseLostError", "DEL-7", "error of the zombie's ack")
        else:
            trial.that(not (confirm and trial.claims.fencing), "DEL-7", "LeaseLostError", f"it was {state}")
    await other.leave()
    fence, _ = await producer.publish()
    held = await sleeper.next("END-3", timeout=within(trial))
    trial.equal(held.msg, fence, "END-3", "message that the woken member gets, the fence,")
    await held.ack(confirm=confirm)
    await sleeper.leave()
    await trial.drain(group)


@case(
    "red.double-lease",
    rules=("GRP-2", "GRP-4", "DEL-4"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("stopped", "redelivered"),
    limit=180.0,
)
async def double_lease(trial: Trial) -> None:
    """A message whose holders stand still one after another is held by one at a time, and its attempts rise."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    name, _ = await producer.publish()
    attempts = []
    sleepers = []
    for _ in range(2):
        sleeper = await worker(trial)
        await sleeper.join(group, max_in_flight=1)
        held = await sleeper.next("GRP-4", timeout=within(trial))
        trial.equal(held.msg, name, "GRP-4", "message lent again")
        attempts.append(held.attempt)
        sleeper.stop()
        sleepers.append(sleeper)
    member = await trial.member(group)
    lent = await trial.next(member, "GRP-4", timeout=within(trial))
    attempts.append(lent.delivery.attempt)
    await lent.ack()
    if trial.claims.attempts.count == "exact":
        trial.equal(attempts, [1, 2, 3], "DEL-4", "attempts")
    trial.equal(attempts[0], 1, "DEL-4", "first attempt")


@case(
    "red.count-survives-kill9",
    rules=("DEL-4",),
    level=GATED(attempts="exact"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "redelivered"),
    limit=120.0,
)
async def count_survives_kill9(trial: Trial) -> None:
    """Where attempts are exact they go on counting after the process that nacked was killed."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    await producer.publish()
    victim = await worker(trial)
    await victim.join(group)
    for attempt in (1, 2):
        held = await victim.next("DEL-2")
        trial.equal(held.attempt, attempt, "DEL-4", "attempt")
        await held.nack(0.0)
    held = await victim.next("DEL-2")
    await victim.kill()
    lent = await trial.next(await trial.member(group), "GRP-4", timeout=within(trial))
    trial.equal(lent.delivery.attempt, held.attempt + 1, "DEL-4", "attempt after the crash")
    await lent.ack()


@case(
    "nack.delay-survives-kill9",
    rules=("DEL-2", "GRP-4"),
    level=GATED(nack_delay=4),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "nacked", "redelivered"),
    limit=120.0,
)
async def delay_survives_kill9(trial: Trial) -> None:
    """The delay of a nack outlives the process that nacked: neither forgotten nor cut short."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    name, _ = await producer.publish()
    victim = await worker(trial)
    await victim.join(group)
    held = await victim.next()
    loop = asyncio.get_running_loop()
    began = loop.time()
    await held.nack(4.0)
    member = await trial.member(group)
    # A member that may keep it for a while says so, and lives that long here.
    await trial.silent(member, "DEL-2", seconds=max(trial.pace.silence, trial.claims.nack_delay.kept_for))
    await victim.kill()
    lent = await trial.next(member, "DEL-2", timeout=4.0 + within(trial))
    took = loop.time() - began
    trial.equal(lent.msg, name, "DEL-2", "the nacked message")
    trial.that(took >= 4.0 - trial.terms.resolution, "DEL-2", "no delivery before 4 s", f"{took:.3f} s")
    await lent.ack()


@case(
    "dlq.atomic",
    rules=("DEL-3",),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("died", "delivered"),
    limit=120.0,
)
async def dlq_atomic(trial: Trial) -> None:
    """A process that dies between the dead letter and the ack leaves the letter in its topic, and never nothing."""
    topic, dead = await trial.topic(), await trial.topic()
    graves = await trial.group(dead, "graves")
    group = await trial.group(topic, dead_letter=dead)
    producer = await trial.producer(topic)
    name, _ = await producer.publish(headers={"h": b"v"})
    victim = await worker(trial)
    await victim.join(group)
    held = await victim.next()
    await victim.call("mortal")
    rejecting = asyncio.create_task(held.reject())
    await trial.within(trial.pace.patience, victim.gone(), "DEL-3", "an ack after the dead letter")
    victim.mourn()
    await asyncio.wait({rejecting})
    trial.that(rejecting.exception() is not None, "DEL-3", "no answer from a dead process", "one came")
    letter = await trial.next(await trial.member(graves), "DEL-3")
    trial.equal(letter.msg, name, "DEL-3", "the dead letter")
    await letter.ack()
    again = await trial.next(await trial.member(group), "GRP-4", timeout=within(trial))
    trial.equal(again.msg, name, "GRP-4", "message whose settle never left")
    await again.ack()


@case(
    "idm.producer-kill9",
    rules=("PUB-3",),
    level=GATED("dedupe"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("killed", "confirmed", "delivered"),
    limit=90.0,
)
async def producer_kill9(trial: Trial) -> None:
    """What another process publishes again under the same ids, after the first one was killed, is stored once."""
    topic = await trial.topic()
    group = trial.client.group("g", topic, lease=trial.lease)
    await group.create()
    bodies = {f"order-{number}": str(number) for number in range(5)}
    for life in range(2):
        process = await worker(trial)
        told = await process.call("publish_again", topic=topic, bodies=bodies)
        trial.tally("confirmed", len(told))
        trial.equal(told, [life > 0] * len(bodies), "PUB-3", f"duplicates told in life {life + 1}")
        await process.kill()
    await once(trial, group, [body.encode() for body in bodies.values()])
