"""Cases `can.*` and `shu.*`: cancelling at any moment, and leaving in good order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from random import Random

from unistream.conformance.line import Line
from unistream.conformance.registry import Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import ClosedError, PublishError


@case("can.receive-timeout-loses-nothing", rules=("END-2", "BPC-5"), tier=Tier.SMOKE, sometimes=("empty", "delivered"))
async def receive_timeout_loses_nothing(trial: Trial) -> None:
    """Hundreds of receives whose timeouts fall close to the arrivals lose nothing."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group, max_in_flight=1)
    dice = Random(trial.seed)

    async def publish() -> None:
        for _ in range(200):
            await asyncio.sleep(dice.uniform(0.0, 0.01))
            await producer.publish()

    publishing = asyncio.create_task(publish())
    got = 0
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.pace.patience + 5
    while got < 200 and loop.time() < ends:
        lent = await member.receive(0.005)
        if lent is None:
            trial.tally("empty")
            continue
        got += 1
        # What is lost does not come however long one waits; how fast the rest comes is not the promise.
        ends = loop.time() + trial.pace.patience + 5
        await lent.ack()
    await publishing
    trial.equal(got, 200, "END-2", "deliveries")


@case("can.receive-cancelled", rules=("END-2", "BPC-5"), tier=Tier.SMOKE, sometimes=("cancelled", "delivered"))
async def receive_cancelled(trial: Trial) -> None:
    """Cancelling a receive loses nothing: the next one gets it."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group, max_in_flight=2)
    dice = Random(trial.seed)
    got = 0
    for _ in range(100):
        waiting = asyncio.create_task(member.receive(trial.pace.patience))
        publishing = asyncio.create_task(producer.publish())
        await asyncio.sleep(dice.choice((0.0, 0.0, 0.001, 0.003)))
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            lent = await waiting
            if lent is not None:
                got += 1
                await lent.ack()
        trial.tally("cancelled", int(waiting.cancelled()))
        await publishing
    while got < 100:
        lent = await trial.next(member, "END-2")
        got += 1
        await lent.ack()
    trial.equal(got, 100, "END-2", "deliveries")


@case("can.publish-cancelled", rules=("PUB-2", "END-2"), sometimes=("cancelled", "confirmed"))
async def publish_cancelled(trial: Trial) -> None:
    """A cancelled publish shifts no other receipt, leaves the producer usable, and its message is there once or not."""
    topic = await trial.topic()
    group = await trial.group(topic)
    line = Line()
    line.latency = 0.005
    producer = await trial.producer(topic, client=await trial.open(line))
    dice = Random(trial.seed)
    for number in range(60):
        name = f"kept-{number}"
        doomed = asyncio.create_task(producer.publish())
        kept = asyncio.create_task(producer.publish(id=name))
        await asyncio.sleep(dice.uniform(0.0, 0.01))
        doomed.cancel()
        with suppress(asyncio.CancelledError):
            await doomed
        trial.tally("cancelled", int(doomed.cancelled()))
        _, receipt = await trial.within(trial.pace.patience, kept, "PUB-2", "the other receipt")
        trial.equal(receipt.id, name, "PUB-2", "id in the receipt")
    stats = producer.producer.stats
    total = stats.confirmed + stats.failed + stats.unknown + stats.dropped + stats.in_flight
    trial.equal(total, stats.published, "PUB-5", "confirmed + failed + unknown + dropped + in flight")
    await trial.drain(group)


@case("can.prompt", rules=("END-2",), sometimes=("cancelled",))
async def prompt(trial: Trial) -> None:
    """Every waiting call ends within a second of being cancelled, with CancelledError."""
    topic = await trial.topic()
    group = await trial.group(topic)
    line = Line()
    producer = await trial.producer(topic, client=await trial.open(line), max_unconfirmed=1)
    member = await trial.member(group)
    await producer.publish()
    lent = await trial.next(member)
    await lent.ack()
    line.kill()
    loop = asyncio.get_running_loop()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "receive": partial(member.consumer.receive, 60.0),
        "publish": partial(producer.publish, timeout=60.0),
        "publish waiting for room": partial(producer.publish, timeout=60.0),
        "flush": partial(producer.producer.flush, 60.0),
    }
    for what, call in calls.items():
        if what == "flush":
            await producer.submit(timeout=2.0)
        task: asyncio.Future[object] = asyncio.ensure_future(call())
        await asyncio.sleep(0.05)
        began = loop.time()
        task.cancel()
        await asyncio.wait({task}, timeout=5.0)
        took = loop.time() - began
        trial.that(
            task.cancelled() and took < 1.0, "END-2", f"{what} cancelled within 1 s", f"{task} after {took:.2f} s"
        )
        trial.tally("cancelled")
    line.bury()


@case("can.consumer-lives-on", rules=("END-2",), sometimes=("delivered",))
async def consumer_lives_on(trial: Trial) -> None:
    """After a hundred cancelled receives the consumer still gets the next message."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    for turn in range(100):
        waiting = asyncio.create_task(member.receive(60.0))
        await asyncio.sleep(0 if turn % 2 else 0.001)
        waiting.cancel()
        await asyncio.wait({waiting})
    await producer.publish()
    await (await trial.next(member, "END-2")).ack()


@case("shu.drain", rules=("END-1",), tier=Tier.SMOKE, sometimes=("acked", "left"))
async def drain(trial: Trial) -> None:
    """`close(drain)` takes nothing new, lets handlers settle what they hold, and hands the rest over."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(20):
        await producer.publish()
    member = await trial.member(group, max_in_flight=10)
    held = await trial.take(member, 5)

    async def finish() -> None:
        for lent in held:
            await asyncio.sleep(0.05)
            await lent.ack()

    finishing = asyncio.create_task(finish())
    await asyncio.sleep(0)
    report = await trial.within(trial.pace.patience, member.leave(drain=5.0), "END-1", "closing")
    await finishing
    trial.equal(report.handled, 5, "END-1", "handled in the report")
    trial.equal(report.abandoned, 0, "END-1", "abandoned in the report")
    await trial.drain(group)
    trial.equal(sum(event.op == "deliver" for event in trial.recorder.events), 20, "END-1", "deliveries altogether")


@case("shu.deadline", rules=("END-1", "GRP-4"), sometimes=("redelivered", "left"))
async def deadline(trial: Trial) -> None:
    """A handler that never finishes does not keep `close(drain)` beyond its time; its message comes again."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=20 * trial.lease)
    producer = await trial.producer(topic)
    name, _ = await producer.publish()
    member = await trial.member(group)
    stuck = await trial.next(member)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await member.leave(drain=1.0)
    took = loop.time() - began
    trial.that(took <= 1.5 + 2 * trial.pace.slack, "END-1", "closing within 1 s and a bit", f"{took:.2f} s")
    again = await trial.next(await trial.member(group), "GRP-4", timeout=5.0 + trial.pace.slack)
    trial.equal(again.msg, name, "END-1", "message handed over")
    await again.ack()
    trial.that(stuck.delivery.state != "acked", "END-1", "the old delivery not acked", str(stuck.delivery.state))


@case("shu.stop-and-restart", rules=("END-1", "GRP-6"), sometimes=("left", "acked"))
async def stop_and_restart(trial: Trial) -> None:
    """Stopped with a backlog fetched and started again, over and over: all is handled, nothing is stranded."""
    topic = await trial.topic(partitions=2)
    group = await trial.group(topic, lease=10 * trial.lease)
    producer = await trial.producer(topic)
    names = {(await producer.submit(key=b"%d" % (number % 7)))[0] for number in range(300)}
    await producer.watched()
    done: set[str] = set()
    for _ in range(60):
        member = await trial.member(group, max_in_flight=50)
        for _ in range(7):
            lent = await member.receive(trial.pace.patience if len(done) < 290 else trial.pace.silence)
            if lent is None:
                break
            await lent.ack()
            done.add(lent.msg or "")
        await member.leave()
        if done == names:
            break
    trial.equal(len(done), 300, "END-1", "messages handled over all starts")


@case("shu.producer-close", rules=("END-1", "PUB-5"), tier=Tier.SMOKE, sometimes=("confirmed", "drained"))
async def producer_close(trial: Trial) -> None:
    """Leaving a producer flushes it: everything submitted has an outcome, and nothing is dropped in silence."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(500):
        await producer.submit()
    await trial.within(trial.pace.patience, producer.producer.__aexit__(None, None, None), "END-1", "closing")
    trial.equal(producer.producer.stats.in_flight, 0, "PUB-5", "in flight after closing")
    await producer.watched()
    await trial.drain(group)


@case("shu.unseen-failures", rules=("PUB-5",), sometimes=("raised",))
async def unseen_failures(trial: Trial) -> None:
    """Failures that nobody looked at are raised on leaving the producer, as an ExceptionGroup."""
    line = Line()
    topic = await trial.topic()
    client = await trial.open(line)
    try:
        async with client.producer(topic) as producer:
            await producer.submit(b"x")
            await producer.flush()
            await trial.client.delete_topic(topic)
            await producer.submit(b"y")
    except ExceptionGroup as group:
        trial.tally("raised", len(group.exceptions))
    else:
        trial.that(False, "PUB-5", "an ExceptionGroup on leaving", "nothing was raised")


@case("shu.close-twice", rules=("END-1",), sometimes=("left",))
async def close_twice(trial: Trial) -> None:
    """Closing is idempotent, for consumers, producers and clients, also at once."""
    topic = await trial.topic()
    group = await trial.group(topic)
    client = await trial.open()
    member = await trial.member(trial.regroup(client, group))
    producer = await trial.producer(topic, client=client)
    await producer.publish()
    await trial.next(member)
    closing = asyncio.gather(member.leave(), member.consumer.close(), producer.producer.close(), client.close())
    await trial.within(trial.pace.patience, closing, "END-1", "closing at once")
    await member.consumer.close()
    await client.close()
    await trial.raises(ClosedError, client.create_topic("after-close"), "END-6")


@case("shu.client-close-with-work", rules=("END-1", "END-2"), sometimes=("redelivered",))
async def client_close_with_work(trial: Trial) -> None:
    """Closing a client ends what waits on it with a clear error, and gives its deliveries back."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=20 * trial.lease)
    producer = await trial.producer(topic)
    name, _ = await producer.publish()
    client = await trial.open()
    member = await trial.member(trial.regroup(client, group))
    await trial.next(member)
    waiting = asyncio.create_task(member.consumer.receive(60.0))
    await asyncio.sleep(0.01)
    call = trial.recorder.invoke("leave", member=member.name)
    await trial.within(trial.pace.patience, client.close(), "END-1", "closing the client")
    call.ok()
    await trial.raises(ClosedError, waiting, "END-1")
    again = await trial.next(await trial.member(group), "END-1", timeout=5.0 + trial.pace.slack)
    trial.equal(again.msg, name, "END-1", "message given back")
    await again.ack()


@case("shu.publish-while-closing", rules=("PUB-2", "END-1"), sometimes=("confirmed", "drained"))
async def publish_while_closing(trial: Trial) -> None:
    """Publishing while the producer closes gives every message an outcome, and the right one."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)

    async def publish() -> None:
        for _ in range(50):
            with suppress(ClosedError, PublishError):
                await producer.publish(timeout=5.0)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(publish())
        await asyncio.sleep(0.002)
        await producer.producer.close()
    await trial.drain(group)
