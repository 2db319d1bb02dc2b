"""Cases `con.*`: what members receive, and when."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from unistream.conformance.identity import Identity
from unistream.conformance.registry import Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import ClosedError


@case("con.all-and-only", rules=("GRP-1",), tier=Tier.SMOKE, sometimes=("delivered", "drained"))
async def all_and_only(trial: Trial) -> None:
    """A group receives every message published after its creation, bytes and keys unchanged, and nothing else."""
    topic = await trial.topic()
    before = await trial.producer(topic)
    await before.publish()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for number in range(100):
        await producer.submit(key=None if number % 3 == 0 else b"key-%d" % (number % 5), size=(number * 37) % 3000)
    await producer.watched()
    await trial.drain(group)
    early = [
        lent
        for lent in trial.recorder.events
        if lent.op == "deliver" and (lent.msg or "").startswith(before.name + ".")
    ]
    trial.equal(len(early), 0, "GRP-3", "deliveries from before the group")


@case("con.no-phantom", rules=("PUB-1", "GRP-1"), sometimes=("strays", "delivered", "drained"))
async def no_phantom(trial: Trial) -> None:
    """Beside messages of others in its topic a group gets those as they are, and nothing that nobody published."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    # The first message of a producer of the same name, but of another run of the suite: it must not be taken for ours.
    strays = [Identity("0badcafe", producer.name, 1, None).body(200), b"nothing of the suite's", b""]
    names = []
    async with trial.client.producer(topic) as other:
        for body in strays:
            names.append((await producer.publish())[0])
            trial.stray(body)
            await other.publish(body)
    member = await trial.member(group)
    lents = await trial.take(member, 2 * len(strays))
    for lent in lents:
        await lent.ack()
    trial.equal(sorted(lent.msg for lent in lents if lent.msg), names, "GRP-1", "messages of this run")
    found = sorted(lent.delivery.value for lent in lents if lent.msg is None)
    trial.equal(found, sorted(strays), "GRP-1", "messages of others")
    # Whoever takes a sign of life for a message does so while nothing comes.
    await trial.silent(member, "PUB-1", seconds=2 * trial.pace.silence)
    await member.leave()
    await trial.drain(group)


@case("con.join-then-publish", rules=("GRP-1", "GRP-3"), tier=Tier.SMOKE, sometimes=("delivered",))
async def join_then_publish(trial: Trial) -> None:
    """What is published once a member has joined reaches it; nobody has to sleep first."""
    topic = await trial.topic()
    group = await trial.group(topic)
    member = await trial.member(group)
    producer = await trial.producer(topic)
    name, _ = await producer.publish()
    lent = await trial.next(member)
    trial.equal(lent.msg, name, "GRP-1", "first delivery")
    await lent.ack()


@case("con.group-without-members", rules=("GRP-3", "GRP-6"), tier=Tier.SMOKE, sometimes=("delivered",))
async def group_without_members(trial: Trial) -> None:
    """Nothing published between a group's creation and its first member is lost."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    published = [(await producer.publish())[0] for _ in range(20)]
    member = await trial.member(group)
    got = await trial.take(member, 20)
    trial.equal(sorted(lent.msg or "" for lent in got), sorted(published), "GRP-3", "deliveries")
    for lent in got:
        await lent.ack()


@case("con.empty-receive", rules=("BPC-5", "END-2"), tier=Tier.SMOKE)
async def empty_receive(trial: Trial) -> None:
    """`receive(timeout)` on an empty topic returns None when the time is up, not before and not long after."""
    topic = await trial.topic()
    member = await trial.member(await trial.group(topic))
    loop = asyncio.get_running_loop()
    began = loop.time()
    lent = await member.receive(1.0)
    took = loop.time() - began
    trial.that(lent is None, "BPC-5", "None", lent)
    trial.that(0.99 <= took <= 1.3 + trial.pace.slack, "END-2", "an answer after 1 s", f"{took:.3f} s")


@case("con.batch-bound", rules=("BPC-1", "BPC-5", "DEL-1"), sometimes=("delivered",))
async def batch_bound(trial: Trial) -> None:
    """`receive_many(max)` returns at least one and never more than `max`; `ack_many` is done with all of them."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(100):
        await producer.submit()
    await producer.watched()
    member = await trial.member(group)
    got = 0
    while got < 100:
        batch = await member.receive_many(7, trial.pace.patience)
        trial.that(1 <= len(batch) <= 7, "BPC-5", "1 to 7 deliveries", f"{len(batch)} after {got} of 100")
        got += len(batch)
        await member.ack_many(batch)
    trial.equal(got, 100, "GRP-1", "deliveries")
    await member.leave()
    fence, _ = await producer.publish()
    [lent] = await trial.take(await trial.member(group), 1)
    trial.equal(lent.msg, fence, "DEL-1", "what the next member gets")
    await lent.ack()


@case("con.iterate-until-close", rules=("BPC-5", "END-1"), tier=Tier.SMOKE, sometimes=("acked",))
async def iterate_until_close(trial: Trial) -> None:
    """`async for` ends without an exception when the consumer is closed, and receiving afterwards is an error."""
    topic = await trial.topic()
    group = await trial.group(topic)
    member = await trial.member(group)
    producer = await trial.producer(topic)
    await producer.publish()
    seen = asyncio.Event()

    async def iterate() -> int:
        count = 0
        async for delivery in member.consumer:
            await member.take(delivery).ack()
            count += 1
            seen.set()
        return count

    loop = asyncio.create_task(iterate())
    await trial.within(trial.pace.patience, seen.wait(), "GRP-1", "a delivery")
    await trial.within(trial.pace.patience, member.leave(), "END-1", "closing")
    count = await trial.within(trial.pace.patience, loop, "BPC-5", "the end of the iteration")
    trial.equal(count, 1, "BPC-5", "deliveries seen by the iteration")
    await trial.raises(ClosedError, member.consumer.receive(1.0), "BPC-5")


@case("con.several-receivers", rules=("BPC-5",), sometimes=("delivered",))
async def several_receivers(trial: Trial) -> None:
    """Several tasks may receive from one consumer; each is served, and each message goes to one of them."""
    topic = await trial.topic()
    group = await trial.group(topic)
    member = await trial.member(group)
    producer = await trial.producer(topic)
    waiting = [asyncio.create_task(member.receive(trial.pace.patience)) for _ in range(5)]
    await asyncio.sleep(0)
    for _ in range(5):
        await producer.publish()
    got = await trial.within(trial.pace.patience + 1, asyncio.gather(*waiting), "BPC-5", "five deliveries")
    trial.equal(len({lent.msg for lent in got if lent}), 5, "BPC-5", "different messages")
    for lent in got:
        if lent is not None:
            await lent.ack()


@case("con.context-acks", rules=("DEL-10",), tier=Tier.SMOKE, sometimes=("redelivered",))
async def context_acks(trial: Trial) -> None:
    """`async with delivery` acks on success; on an exception it nacks, and the exception goes on."""
    topic = await trial.topic()
    group = await trial.group(topic)
    member = await trial.member(group)
    producer = await trial.producer(topic)
    await producer.publish()
    first = await trial.next(member)
    call = trial.recorder.invoke("nack", lending=first.name, until=first.until())
    error: BaseException | None = None
    try:
        async with first.delivery:
            raise LookupError("the handler failed")
    except LookupError as raised:
        error = raised
    call.ok()
    trial.that(error is not None, "DEL-10", "the exception to go on", "it was suppressed")
    trial.equal(str(first.delivery.state), "nacked", "DEL-10", "state after the exception")
    again = await trial.next(member, "DEL-10")
    trial.equal(again.delivery.attempt, 2, "DEL-4", "attempt")
    call = trial.recorder.invoke("ack", lending=again.name, until=again.until())
    async with again.delivery as delivery:
        trial.equal(str(delivery.state), "lent", "DEL-10", "state while it is handled")
    call.ok()
    trial.equal(str(again.delivery.state), "acked", "DEL-10", "state after success")


@case("con.handler-raises", rules=("DEL-11",), tier=Tier.SMOKE)
async def handler_raises(trial: Trial) -> None:
    """A handler that raises on one message gets that one again; the others are handled once, and the loop lives."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(10)]
    handled: dict[str, list[int]] = {}
    done = asyncio.Event()

    async def handle(delivery) -> None:  # type: ignore[no-untyped-def]
        name = f"{producer.name}.{delivery.value.split(b'|')[3].decode()}"
        handled.setdefault(name, []).append(delivery.attempt)
        if name == names[4] and delivery.attempt == 1:
            raise LookupError("this one fails once")
        if sum(len(attempts) for attempts in handled.values()) == 11:
            done.set()

    running = asyncio.create_task(group.run(handle, concurrency=2))
    try:
        await trial.within(trial.pace.patience, done.wait(), "DEL-11", "ten messages handled, one of them twice")
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    trial.equal(
        handled, {name: [1, 2] if name == names[4] else [1] for name in names}, "DEL-11", "attempts per message"
    )


@case("pub.returns-before-handler", rules=("PUB-1",), sometimes=("confirmed",))
async def returns_before_handler(trial: Trial) -> None:
    """`publish` waits for the broker alone: it returns while nobody has settled, or even received, the message."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group, max_in_flight=1)
    await trial.within(trial.pace.patience, producer.publish(), "PUB-1", "a receipt before anybody receives")
    held = await trial.next(member)
    for _ in range(5):
        await trial.within(trial.pace.patience, producer.publish(), "PUB-1", "a receipt while a handler is busy")
    await held.ack()
    await member.leave()
    await trial.drain(group)


@case("con.idle-then-message", rules=("END-3", "GRP-1"), tier=Tier.LONG, sometimes=("delivered",), limit=300.0)
async def idle_then_message(trial: Trial) -> None:
    """After an idle time longer than every heartbeat and session a message arrives as ever."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    idle = min(3 * max(trial.lease, trial.claims.lease.dead_peer_after), 120.0)
    await trial.silent(member, "END-3", seconds=idle)
    await producer.publish()
    await (await trial.next(member, "END-3")).ack()
