"""Cases `can.*` and `shu.*`, continued: cancelled at every step, closed from within, restarted in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from itertools import pairwise

import unistream
from unistream.conformance.checkers.timing import HAND_OVER_SECONDS
from unistream.conformance.history import NANO
from unistream.conformance.recorded import RecordedMember
from unistream.conformance.registry import case
from unistream.conformance.trial import Trial
from unistream.errors import LeaseLostError, UnistreamError

STEPS = 20


async def cancel_after(steps: int, doing: Awaitable[object]) -> bool:
    """Cancel after so many rounds of the event loop; tell whether it was cut short."""
    task = asyncio.ensure_future(doing)
    for _ in range(steps):
        if task.done():
            break
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError, UnistreamError):
        await task
    return task.cancelled()


@case("can.every-await-point", rules=("END-2", "PUB-2", "GRP-1"), sometimes=("cancelled", "drained"), limit=120.0)
async def every_await_point(trial: Trial) -> None:
    """Publish, receive, settle, flush and close, each cancelled after 0, 1, 2, … steps, lose and break nothing."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for steps in range(STEPS):
        member = await trial.member(group, max_in_flight=10)
        for _ in range(4):
            await producer.publish()
        trial.tally("cancelled", await cancel_after(steps, producer.publish()))
        trial.tally("cancelled", await cancel_after(steps, producer.producer.flush()))
        trial.tally("cancelled", await cancel_after(steps, _receive_and_keep(trial, member)))
        acked = await trial.next(member, "END-2")
        trial.tally("cancelled", await cancel_after(steps, acked.ack(confirm=bool(trial.claims.ack_confirm))))
        nacked = await trial.next(member, "END-2")
        trial.tally("cancelled", await cancel_after(steps, nacked.nack(0.0)))
        trial.tally("cancelled", await cancel_after(steps, member.leave()))
        await trial.within(trial.pace.patience, member.leave(), "END-1", "closing after a cancelled close")
    _, receipt = await trial.within(trial.pace.patience, producer.publish(), "END-2", "publishing afterwards")
    trial.that(bool(receipt.id), "PUB-2", "a receipt", receipt)
    stats = producer.producer.stats
    total = stats.confirmed + stats.failed + stats.unknown + stats.dropped + stats.in_flight
    trial.equal(total, stats.published, "PUB-5", "confirmed + failed + unknown + dropped + in flight")
    await trial.drain(group)


async def _receive_and_keep(trial: Trial, member: RecordedMember) -> None:
    """Receive; what came is recorded, held, and given back when the member leaves."""
    await member.receive(trial.pace.patience)


@case("shu.reentrant", rules=("END-1",), sometimes=("closed",))
async def reentrant(trial: Trial) -> None:
    """Closing the client from inside a handler does not wait for that handler, and ends `run`."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=10 * trial.lease)
    async with trial.client.producer(topic) as producer:
        for _ in range(3):
            await producer.publish(b"x")
    client = await trial.open()
    left = asyncio.Event()

    async def handler(delivery: unistream.Delivery) -> None:
        await client.close()
        trial.tally("closed")
        left.set()

    running = asyncio.create_task(trial.regroup(client, group).run(handler, concurrency=1))
    await trial.within(trial.pace.patience, left.wait(), "END-1", "closing from inside a handler")
    report = await trial.within(trial.pace.patience, running, "END-1", "the end of run()")
    trial.equal(report.abandoned, 0, "END-1", "deliveries abandoned")
    # All three are there for others, but what the handler settled after all.
    async with group.consumer() as consumer:
        again = 0
        while again + report.handled < 3:
            delivery = await consumer.receive(trial.pace.patience)
            trial.that(delivery is not None, "END-1", f"{3 - report.handled} messages for others", f"{again}")
            assert delivery is not None
            await delivery.ack()
            again += 1


@case("shu.close-while-opening", rules=("END-1", "END-2"), sometimes=("closed",))
async def close_while_opening(trial: Trial) -> None:
    """Closing a client, or cancelling it, while it connects or joins ends promptly and leaves the broker usable."""
    topic = await trial.topic()
    group = await trial.group(topic)
    for steps in range(STEPS):
        client = trial.target.connect()
        opening = asyncio.ensure_future(client.__aenter__())
        for _ in range(steps):
            await asyncio.sleep(0)
        await trial.within(trial.pace.patience, client.close(), "END-1", "closing while it connects")
        with suppress(UnistreamError):
            await trial.within(trial.pace.patience, opening, "END-1", "the end of connecting")
        await trial.within(trial.pace.patience, client.close(), "END-1", "closing again")
        async with trial.target.connect() as client:
            consumer = trial.regroup(client, group).consumer()
            await cancel_after(steps, consumer.__aenter__())
            await trial.within(trial.pace.patience, consumer.close(), "END-2", "closing a member that was joining")
        trial.tally("closed")
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    await (await trial.next(member, "END-2", timeout=trial.recovery + trial.pace.patience)).ack()


@case("shu.rolling-restart", rules=("END-1", "GRP-4", "DEL-9"), sometimes=("left", "drained"), limit=120.0)
async def rolling_restart(trial: Trial) -> None:
    """Two members restarted in turn under load: nothing is lost or stranded, and nothing settled comes again."""
    topic = await trial.topic(partitions=2)
    group = await trial.group(topic, lease=10 * trial.lease)
    producer = await trial.producer(topic)
    stop = asyncio.Event()

    async def publish() -> None:
        while not stop.is_set():
            # More than both can do, so that some is always fetched and waits.
            for _ in range(8):
                await producer.submit()
            await asyncio.sleep(0.01)
        await producer.watched()

    async def work(member: RecordedMember) -> None:
        with suppress(unistream.ClosedError):
            while True:
                lent = await member.receive(60.0)
                if lent is not None:
                    await asyncio.sleep(0.002)
                    with suppress(LeaseLostError):  # given back while it was handled: it comes again
                        await lent.ack()

    async with asyncio.TaskGroup() as tasks:
        publishing = tasks.create_task(publish())
        members = [await trial.member(group, max_in_flight=10) for _ in range(2)]
        working = [tasks.create_task(work(member)) for member in members]
        for turn in range(8):
            await asyncio.sleep(0.1)
            place = turn % 2
            report = await trial.within(
                trial.pace.patience + 5.0, members[place].leave(drain=5.0), "END-1", "a member leaving"
            )
            trial.equal(report.abandoned, 0, "END-1", "deliveries abandoned")
            await working[place]
            members[place] = await trial.member(group, max_in_flight=10)
            working[place] = tasks.create_task(work(members[place]))
        stop.set()
        await publishing
        for member in members:
            await member.leave(drain=5.0)
    left = trial.recorder.now()
    await trial.drain(group)
    # What one of them had fetched ahead is in nobody's history; stranded, it would come when its lease ends.
    times = [left, *(event.at for event in trial.recorder.events if event.op == "deliver" and event.at > left)]
    pause = max((after - before for before, after in pairwise(times)), default=0) / NANO
    trial.that(
        pause <= HAND_OVER_SECONDS + trial.pace.slack, "GRP-4", "all that was held, within 5 s", f"{pause:.1f} s"
    )
