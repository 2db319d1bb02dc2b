"""Cases `dur.*`: what survives a broker that is restarted, killed or frozen. They need the user's hooks."""

from __future__ import annotations

import asyncio

from unistream.conformance.hooks import KILL9, PAUSE, RESTART, RESUME, broker
from unistream.conformance.recorded import RecordedMember, RecordedProducer
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.tasks import Together
from unistream.conformance.trial import Trial
from unistream.errors import UnistreamError

DURABLE = GATED(durability="process_crash")
STRUCK = ("struck", "faults")


def _hooks(*names: str) -> tuple[str, ...]:
    return ("socket", *(f"hook:{name}" for name in names))


async def _publish(producer: RecordedProducer, over: asyncio.Event, *, pace: float = 0.002) -> None:
    """Publish until told to end; errors are recorded, and the next message follows."""
    number = 0
    while not over.is_set():
        number += 1
        try:
            await producer.publish(key=b"k%d" % (number % 4), timeout=10.0)
        except UnistreamError:
            await asyncio.sleep(0.05)
        await asyncio.sleep(pace)


async def _consume(trial: Trial, member: RecordedMember, over: asyncio.Event) -> None:
    while not over.is_set():
        lent = await member.receive(0.5)
        if lent is not None:
            try:
                await lent.ack()
            except UnistreamError:
                lent.expired()


@case(
    "dur.clean-restart",
    rules=("PUB-1",),
    level=DURABLE,
    tier=Tier.BROKER,
    facilities=_hooks(RESTART),
    sometimes=(*STRUCK, "confirmed", "delivered", "drained"),
    limit=300.0,
)
async def clean_restart(trial: Trial) -> None:
    """What was confirmed before a restart of the broker is delivered after it."""
    topic = await trial.topic(partitions=2)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for number in range(100):
        await producer.submit(key=b"k%d" % (number % 7))
    await producer.watched()
    await (await broker(trial)).strike(RESTART)
    await trial.drain(group)


@case(
    "dur.kill9",
    rules=("PUB-1", "PUB-2"),
    level=DURABLE,
    tier=Tier.BROKER,
    facilities=_hooks(KILL9),
    sometimes=(*STRUCK, "under-fault", "confirmed", "delivered", "drained"),
    limit=300.0,
)
async def kill9(trial: Trial) -> None:
    """What the broker confirmed until the moment it was killed by SIGKILL is delivered after it is up again."""
    topic = await trial.topic(partitions=2)
    group = await trial.group(topic)
    handle = await broker(trial)
    over = asyncio.Event()
    async with Together() as tasks:
        for _ in range(4):
            tasks.create_task(_publish(await trial.producer(topic, client=await trial.open()), over))
        await asyncio.sleep(1.0)
        await handle.strike(KILL9)
        over.set()
    await trial.drain(group)


@case(
    "dur.acks-survive",
    rules=("DEL-1",),
    level=GATED(ack_confirm="crash", durability="process_crash"),
    tier=Tier.BROKER,
    facilities=_hooks(KILL9),
    sometimes=(*STRUCK, "acked", "redelivered", "drained"),
    limit=300.0,
)
async def acks_survive(trial: Trial) -> None:
    """A confirmed ack outlives SIGKILL of the broker: only what was not acked comes again."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(20):
        await producer.publish()
    handle = await broker(trial)
    member = await trial.member(group)
    lents = await trial.take(member, 20)
    await asyncio.gather(*(lent.ack(confirm=True) for place, lent in enumerate(lents) if place % 4))
    await handle.strike(KILL9)
    for lent in lents[::4]:
        try:
            await lent.nack(0.0)
        except UnistreamError:
            lent.expired()
    missing = {lent.msg for lent in lents[::4]}
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.recovery + 2 * trial.pace.patience
    while missing and loop.time() < ends:
        again = await member.receive(1.0)
        if again is not None:
            missing.discard(again.msg)
            await again.ack()
    trial.that(not missing, "GRP-4", "what was not acked, after the crash", f"missing {sorted(missing, key=str)}")
    await member.leave()
    await trial.drain(group)


@case(
    "dur.group-survives",
    rules=("GRP-6", "GRP-1"),
    level=DURABLE,
    tier=Tier.BROKER,
    facilities=_hooks(RESTART),
    sometimes=(*STRUCK, "delivered", "drained"),
    limit=300.0,
)
async def group_survives(trial: Trial) -> None:
    """A group without members keeps its place over a restart of the broker."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(10)]
    member = await trial.member(group)
    for lent in await trial.take(member, 6):
        await lent.ack(confirm=bool(trial.claims.ack_confirm))
    await member.leave()
    await (await broker(trial)).strike(RESTART)
    back = await trial.member(group)
    for name in names[6:]:
        lent = await trial.next(back, "GRP-6", timeout=2 * trial.pace.patience)
        trial.equal(lent.msg, name, "GRP-6", "message after the restart")
        await lent.ack()
    await back.leave()
    await trial.drain(group)


@case(
    "dur.producer-rides-through",
    rules=("END-3", "PUB-2"),
    tier=Tier.BROKER,
    facilities=_hooks(RESTART),
    sometimes=(*STRUCK, "under-fault", "confirmed"),
    limit=300.0,
)
async def producer_rides_through(trial: Trial) -> None:
    """A producer that publishes across a restart is back by itself, and every message has an honest outcome."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    handle = await broker(trial)
    over = asyncio.Event()
    async with Together() as tasks:
        tasks.create_task(_publish(producer, over))
        await asyncio.sleep(0.5)
        await handle.strike(RESTART)
        over.set()
    await trial.within(2 * trial.pace.patience, _confirmed(producer), "END-3", "a confirm after the restart")
    stats = producer.producer.stats
    total = stats.confirmed + stats.failed + stats.unknown + stats.dropped + stats.in_flight
    trial.equal(total, stats.published, "PUB-5", "confirmed + failed + unknown + dropped + in flight")
    if trial.terms.durable:
        await trial.drain(group)


async def _confirmed(producer: RecordedProducer) -> None:
    while True:
        try:
            await producer.publish(timeout=5.0)
        except UnistreamError:
            await asyncio.sleep(0.05)
        else:
            return


@case(
    "dur.consumer-rides-through",
    rules=("END-3", "GRP-1"),
    level=DURABLE,
    tier=Tier.BROKER,
    facilities=_hooks(RESTART),
    sometimes=(*STRUCK, "delivered", "drained"),
    limit=300.0,
)
async def consumer_rides_through(trial: Trial) -> None:
    """Members that consume across a restart are back by themselves, still members, and lose nothing."""
    topic = await trial.topic(partitions=2)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    members = [await trial.member(trial.regroup(await trial.open(), group), max_in_flight=10) for _ in range(2)]
    handle = await broker(trial)
    over = asyncio.Event()
    async with Together() as tasks:
        tasks.create_task(_publish(producer, over))
        for member in members:
            tasks.create_task(_consume(trial, member, over))
        await asyncio.sleep(0.5)
        await handle.strike(RESTART)
        await trial.within(2 * trial.pace.patience, _confirmed(producer), "END-3", "a confirm after the restart")
        over.set()
    await members[1].leave()
    fence, _ = await producer.publish()
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.recovery + 2 * trial.pace.patience
    came = False
    while not came and loop.time() < ends:
        lent = await members[0].receive(1.0)
        if lent is not None:
            came = lent.msg == fence
            await lent.ack()
    trial.that(came, "END-3", "the fence to a member from before the restart", "it did not come")
    await members[0].leave()
    await trial.drain(group)


@case(
    "dur.delay-survives",
    rules=("DEL-2",),
    level=GATED(durability="process_crash", nack_delay=5),
    tier=Tier.BROKER,
    facilities=_hooks(KILL9),
    sometimes=(*STRUCK, "nacked", "redelivered"),
    limit=300.0,
)
async def delay_survives(trial: Trial) -> None:
    """A delayed nack that the broker holds outlives its SIGKILL: not forgotten, and not before its time."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    handle = await broker(trial)
    name, _ = await producer.publish()
    lent = await trial.next(member)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await lent.nack(5.0)
    await trial.silent(member, "DEL-2", seconds=trial.pace.silence)
    await handle.strike(KILL9)
    again = await trial.next(member, "DEL-2", timeout=5.0 + trial.recovery + 2 * trial.pace.patience)
    took = loop.time() - began
    trial.equal(again.msg, name, "DEL-2", "the nacked message")
    trial.that(took >= 5.0 - trial.terms.resolution, "DEL-2", "no delivery before 5 s", f"{took:.3f} s")
    await again.ack()


@case(
    "dur.count-survives",
    rules=("DEL-4",),
    level=GATED(durability="process_crash", attempts="exact"),
    tier=Tier.BROKER,
    facilities=_hooks(RESTART),
    sometimes=(*STRUCK, "redelivered"),
    limit=300.0,
)
async def count_survives(trial: Trial) -> None:
    """Where attempts are exact they go on counting after a restart of the broker."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    handle = await broker(trial)
    await producer.publish()
    for _ in range(3):
        lent = await trial.next(member, "DEL-2")
        await lent.nack(0.0)
    lent = await trial.next(member, "DEL-2")
    attempt = lent.delivery.attempt
    await handle.strike(RESTART)
    try:
        await lent.nack(0.0)
    except UnistreamError:
        lent.expired()
    again = await trial.next(member, "DEL-4", timeout=trial.recovery + 2 * trial.pace.patience)
    trial.that(again.delivery.attempt > attempt, "DEL-4", f"an attempt above {attempt}", again.delivery.attempt)
    await again.ack()


@case(
    "dur.pause",
    rules=("END-3", "PUB-1", "GRP-1"),
    tier=Tier.BROKER,
    facilities=_hooks(PAUSE, RESUME),
    sometimes=("paused", "faults", "confirmed", "delivered", "drained"),
    limit=300.0,
)
async def pause(trial: Trial) -> None:
    """A broker that freezes for longer than `dead_peer_after` and goes on finds its clients back, with nothing lost."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group, max_in_flight=10)
    handle = await broker(trial)
    over = asyncio.Event()
    async with Together() as tasks:
        tasks.create_task(_publish(producer, over))
        tasks.create_task(_consume(trial, member, over))
        await asyncio.sleep(0.5)
        async with handle.paused():
            await asyncio.sleep(trial.claims.lease.dead_peer_after + trial.pace.silence)
        await trial.within(2 * trial.pace.patience, _confirmed(producer), "END-3", "a confirm after the pause")
        over.set()
    fence, _ = await producer.publish()
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.recovery + 2 * trial.pace.patience
    came = False
    while not came and loop.time() < ends:
        lent = await member.receive(1.0)
        if lent is not None:
            came = lent.msg == fence
            await lent.ack()
    trial.that(came, "END-3", "the fence to the member from before the pause", "it did not come")
    await member.leave()
    await trial.drain(group)
