"""Cases of groups whose members, in processes of their own, come and go: joining, leaving, killed under load."""

from __future__ import annotations

import asyncio

from unistream.conformance.cases.processes import KILLED, PROCESS, take
from unistream.conformance.members import Worker, worker
from unistream.conformance.plan import Handling
from unistream.conformance.recorded import RecordedProducer
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.tasks import Together
from unistream.conformance.trial import Trial
from unistream.errors import UnistreamError

BUSY = Handling(hold=(0.0, 0.05), nack=0.0, reject=0.0, extend=0.0, overstay=0.0)
"""Members that ack everything, half of it confirmed, after a moment."""


async def _workers(trial: Trial, count: int) -> list[Worker]:
    return await asyncio.gather(*(worker(trial) for _ in range(count)))


async def _publish(producer: RecordedProducer, count: int) -> None:
    async with Together() as tasks:
        for number in range(count):
            tasks.create_task(producer.publish(key=b"k%d" % (number % 16)))
            if number % 10 == 0:
                await asyncio.sleep(0.01)


@case(
    "reb.kill9",
    rules=("GRP-4", "GRP-1", "GRP-2"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "confirmed", "delivered", "drained"),
    limit=180.0,
)
async def kill9(trial: Trial) -> None:
    """With one of four processes killed under load, the others take over what it held, and nothing is lost."""
    topic = await trial.topic(partitions=4)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    workers = await _workers(trial, 4)
    for each in workers:
        await each.join(group, max_in_flight=10)
        await each.work(BUSY)
    await _publish(producer, 200)
    victim = workers[0]
    held_back = await worker(trial)
    await held_back.join(group, max_in_flight=3)
    await _publish(producer, 200)
    await victim.kill()
    await held_back.kill()
    await _publish(producer, 200)
    for each in workers[1:]:
        await each.call("rest")
        await each.leave()
    await trial.drain(group)


@case(
    "reb.join-under-load",
    rules=("GRP-1", "GRP-2", "DEL-9"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("confirmed", "delivered", "drained"),
    limit=180.0,
)
async def join_under_load(trial: Trial) -> None:
    """Members that join while a group is busy take part, and nothing is lost or lent without a cause."""
    topic = await trial.topic(partitions=4)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    workers = await _workers(trial, 4)
    for each in workers:
        await each.join(group, max_in_flight=10)
        await each.work(BUSY)
        await _publish(producer, 150)
    settled = [int(await each.call("rest")) for each in workers]
    trial.that(min(settled) > 0, "GRP-2", "work for every member", settled)
    for each in workers:
        await each.leave()
    await trial.drain(group)


@case(
    "reb.leave-graceful",
    rules=("GRP-4", "GRP-1", "END-1"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("left", "delivered", "drained"),
    limit=120.0,
)
async def leave_graceful(trial: Trial) -> None:
    """A member that leaves hands over within 5 s what it held, long before its lease would end."""
    topic = await trial.topic(partitions=4)
    group = await trial.group(topic, lease=60.0)
    producer = await trial.producer(topic)
    names = {(await producer.publish())[0] for _ in range(6)}
    leaver = await worker(trial)
    await leaver.join(group, max_in_flight=6)
    await take(trial, leaver, 6)
    other = await trial.member(group)
    await leaver.leave()
    await trial.collect(other, names, "GRP-4", seconds=5.0 + trial.pace.slack)
    await other.leave()
    await trial.drain(group, quiet=5.0)


@case(
    "reb.settle-during",
    rules=("DEL-1", "DEL-7", "GRP-2"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("acked", "left", "drained"),
    limit=180.0,
)
async def settle_during(trial: Trial) -> None:
    """Acks given while members come and go are kept, or reported lost: never confirmed and forgotten."""
    topic = await trial.topic(partitions=4)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    settler = await trial.member(group, max_in_flight=20)
    guest = await worker(trial)

    async def settle() -> None:
        while not over.is_set():
            lent = await settler.receive(0.5)
            if lent is not None:
                try:
                    await lent.ack(confirm=bool(trial.claims.ack_confirm))
                except UnistreamError:
                    lent.expired()

    over = asyncio.Event()
    async with Together() as tasks:
        tasks.create_task(settle())
        for _ in range(4):
            await guest.join(group, max_in_flight=5)
            await _publish(producer, 60)
            await guest.leave()
        over.set()
    await settler.leave()
    await trial.drain(group)


@case(
    "reb.mass-join",
    rules=("GRP-2", "GRP-1"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=("confirmed", "delivered", "drained"),
    limit=180.0,
)
async def mass_join(trial: Trial) -> None:
    """Eight members that join at once share the work: each message goes to one of them."""
    topic = await trial.topic(partitions=8)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    workers = await _workers(trial, 2)
    joins = [each.join(group, max_in_flight=4) for each in workers for _ in range(4)]
    await trial.within(4 * trial.pace.patience, asyncio.gather(*joins), "GRP-2", "eight joins")
    for each in workers:
        await each.work(BUSY)
    await _publish(producer, 200)
    await asyncio.gather(*(each.call("rest") for each in workers))
    for each in workers:
        await each.leave()
    await trial.drain(group)


@case(
    "ord.across-rebalance",
    rules=("ORD-2", "GRP-4"),
    level=GATED(ordering="key"),
    tier=Tier.FAULTS,
    facilities=PROCESS,
    sometimes=(*KILLED, "delivered", "drained"),
    limit=240.0,
)
async def across_rebalance(trial: Trial) -> None:
    """While members join, leave and are killed, no message is lent ahead of an unsettled older one of its key."""
    topic = await trial.topic(partitions=4, ordering="key")
    group = await trial.group(topic, ordering="key")
    producer = await trial.producer(topic)
    workers = await _workers(trial, 4)

    async def load() -> None:
        while not over.is_set():
            await _publish(producer, 30)

    over = asyncio.Event()
    async with Together() as tasks:
        tasks.create_task(load())
        for each in workers:
            await each.join(group, max_in_flight=10)
            await each.work(BUSY)
            await asyncio.sleep(0.3)
        await workers[0].kill()
        await workers[1].call("rest")
        await workers[1].leave()
        await asyncio.sleep(trial.lease)
        await workers[2].kill()
        await asyncio.sleep(trial.lease)
        over.set()
    await workers[3].call("rest")
    await workers[3].leave()
    await trial.drain(group)
