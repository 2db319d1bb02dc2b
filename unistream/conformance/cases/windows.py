"""Cases `bpp.*` and `bpc.*`: what happens when producers outrun the broker, and consumers their handlers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

from unistream import Confirmation, Receipt
from unistream.conformance.line import Line
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import DroppedError, LeaseLostError, UnistreamError, WindowFullError


@case("bpp.block", rules=("PUB-5",), sometimes=("drained",))
async def block(trial: Trial) -> None:
    """With `when_full="block"` callers wait for room, and all is stored once there is some, in order."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, max_unconfirmed=5)
    most = 0
    for _ in range(100):
        await producer.submit(key=b"k")
        most = max(most, producer.producer.stats.in_flight)
    trial.that(most <= 5, "PUB-5", "at most 5 unconfirmed messages", most)
    await producer.watched()
    await trial.drain(group)


@case("bpp.block-timeout", rules=("PUB-5",), sometimes=("unpublished",))
async def block_timeout(trial: Trial) -> None:
    """Waiting for room ends at the caller's timeout with WindowFullError, surely not stored."""
    line = Line()
    topic = await trial.topic()
    producer = await trial.producer(topic, client=await trial.open(line), max_unconfirmed=2)
    await producer.publish()
    line.kill()
    for _ in range(2):
        await producer.submit(timeout=2.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    error = await trial.raises(WindowFullError, producer.publish(timeout=1.0), "PUB-5", within=5.0)
    took = loop.time() - began
    trial.equal(getattr(error, "stored", None), "no", "PUB-5", "stored")
    trial.that(0.95 <= took <= 1.3 + trial.pace.slack, "PUB-5", "an error after 1 s", f"{took:.2f} s")
    line.bury()


@case("bpp.fail", rules=("PUB-5",), tier=Tier.SMOKE, sometimes=("unpublished",))
async def fail(trial: Trial) -> None:
    """With `when_full="fail"` a full window raises WindowFullError at once."""
    line = Line()
    topic = await trial.topic()
    producer = await trial.producer(topic, client=await trial.open(line), max_unconfirmed=3, when_full="fail")
    await producer.publish()
    line.kill()
    for _ in range(3):
        await producer.submit(timeout=2.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    error = await trial.raises(WindowFullError, producer.publish(), "PUB-5", within=1.0)
    trial.equal(getattr(error, "stored", None), "no", "PUB-5", "stored")
    trial.that(
        loop.time() - began < 0.05 + trial.pace.slack, "PUB-5", "an error at once", f"{loop.time() - began:.3f} s"
    )
    line.bury()


async def _dropping(trial: Trial, when_full: str) -> tuple[list[int], list[int]]:
    """Publish 60 messages into a window of 10 while the line is down; return which were dropped and which confirmed."""
    line = Line()
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, client=await trial.open(line), max_unconfirmed=10, when_full=when_full)
    await producer.publish()
    line.refuse = 1_000_000
    confirmations: list[Confirmation | None] = []
    for _ in range(60):
        try:
            confirmations.append((await producer.submit())[1])
        except DroppedError:
            confirmations.append(None)
        await asyncio.sleep(0)
    line.refuse = 0
    dropped, stored = [], []
    for number, confirmation in enumerate(confirmations):
        try:
            if confirmation is None:
                raise DroppedError
            await asyncio.wait_for(asyncio.shield(_wait(confirmation)), trial.pace.patience)
            stored.append(number)
        except DroppedError:
            dropped.append(number)
    stats = producer.producer.stats
    total = stats.confirmed + stats.failed + stats.unknown + stats.dropped + stats.in_flight
    trial.equal(total, stats.published, "PUB-5", "confirmed + failed + unknown + dropped + in flight")
    trial.equal(stats.dropped, len(dropped), "PUB-5", "stats.dropped")
    await producer.watched()
    await trial.drain(group)
    return dropped, stored


async def _wait(confirmation: Confirmation) -> Receipt:
    return await confirmation


@case("bpp.drop-newest", rules=("PUB-5",), sometimes=("unpublished", "confirmed"))
async def drop_newest(trial: Trial) -> None:
    """With `when_full="drop_newest"` the late ones are dropped, and exactly those that were told so."""
    dropped, stored = await _dropping(trial, "drop_newest")
    trial.that(bool(dropped) and bool(stored), "PUB-5", "some dropped, some stored", (len(dropped), len(stored)))
    trial.that(min(dropped) > min(stored), "PUB-5", "the newest to be dropped", dropped[:3])


@case("bpp.drop-oldest", rules=("PUB-5",), sometimes=("unpublished", "confirmed"))
async def drop_oldest(trial: Trial) -> None:
    """With `when_full="drop_oldest"` older ones that were never handed over make room for the newest."""
    dropped, stored = await _dropping(trial, "drop_oldest")
    trial.that(bool(dropped) and bool(stored), "PUB-5", "some dropped, some stored", (len(dropped), len(stored)))
    trial.equal(max(stored), 59, "PUB-5", "the newest stored")


@case("bpp.no-deadlock", rules=("PUB-7",), sometimes=("acked",))
async def no_deadlock(trial: Trial) -> None:
    """A full producer window never stops a consumer of the same client from settling."""
    topic = await trial.topic()
    group = await trial.group(topic)
    feeder = await trial.producer(topic)
    for _ in range(20):
        await feeder.publish()
    client = await trial.open()
    member = await trial.member(trial.regroup(client, group))
    producer = await trial.producer(topic, client=client, max_unconfirmed=1)
    waiting = [asyncio.create_task(producer.publish()) for _ in range(20)]
    for _ in range(40):
        lent = await trial.next(member, "PUB-7")
        acking = trial.works(lent.ack(confirm=bool(trial.claims.ack_confirm)), "PUB-7", "an ack beside a full window")
        await trial.within(trial.pace.patience, acking, "PUB-7", "an ack beside a full window")
    await asyncio.gather(*waiting)


@case("bpp.max-backlog", rules=("PUB-6",), level=GATED(max_backlog="reject"), sometimes=("confirmed", "refusals"))
async def max_backlog(trial: Trial) -> None:
    """A topic with `max_backlog` refuses what is beyond it with TopicFullError, and takes more once some is settled."""
    topic = await trial.topic(max_backlog=10)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(5):
        await producer.publish()
    outcomes = [outcome for _, outcome in await producer.publish_many([None] * 8)]
    kinds = [type(outcome).__name__ for outcome in outcomes]
    trial.equal(kinds, ["Receipt"] * 5 + ["TopicFullError"] * 3, "PUB-6", "outcomes of a batch that fits in part")
    trial.tally("refusals")
    member = await trial.member(group)
    for lent in await trial.take(member, 10):
        await lent.ack(confirm=bool(trial.claims.ack_confirm))
    # What this member has asked for ahead would be its own, and nobody takes it up.
    await member.leave()
    await asyncio.sleep(trial.terms.settle_flush)
    await producer.publish(timeout=5.0)
    await trial.drain(group)


@case("bpc.in-flight-exact", rules=("BPC-1",), tier=Tier.SMOKE, sometimes=("delivered",))
async def in_flight_exact(trial: Trial) -> None:
    """A member holds `max_in_flight` unsettled deliveries and not one more, for as long as it settles none."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(50):
        await producer.submit()
    await producer.watched()
    member = await trial.member(group, max_in_flight=7)
    held = await trial.take(member, 7)
    await trial.silent(member, "BPC-1")
    await held[0].ack()
    again = await trial.next(member, "BPC-1")
    await trial.silent(member, "BPC-1")
    for lent in (*held[1:], again):
        await lent.ack()


@case("bpc.bound-after-mix", rules=("BPC-1", "DEL-7"), sometimes=("nacked", "rejected", "expired"))
async def bound_after_mix(trial: Trial) -> None:
    """The bound holds after any mix of acks, nacks, rejects and lost leases, and every one frees its place."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=trial.lease)
    producer = await trial.producer(topic)
    for _ in range(60):
        await producer.submit()
    await producer.watched()
    member = await trial.member(group, max_in_flight=4)
    for _ in range(3):
        held = await trial.take(member, 4, "BPC-1")
        # What was fetched ahead during the last pause may run out in hand: refusals are part of the mix.
        for settle in (held[0].ack, partial(held[1].nack, 0.0), held[2].reject):
            with suppress(LeaseLostError):
                await settle()
        await asyncio.sleep(1.3 * trial.lease)
        held[3].expired()
    held = await trial.take(member, 4, "BPC-1")
    for lent in held:
        with suppress(LeaseLostError):
            await lent.nack(0.0)


@case("bpc.per-member", rules=("BPC-4",), sometimes=("delivered",))
async def per_member(trial: Trial) -> None:
    """Each member has its own bound."""
    topic = await trial.topic(partitions=6)
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for number in range(120):
        await producer.submit(key=b"%d" % (number % 40))
    await producer.watched()
    members = [await trial.member(group, max_in_flight=limit) for limit in (1, 3, 9)]
    for member in members:
        held = await trial.take(member, member.limit, "BPC-4")
        await trial.silent(member, "BPC-4", seconds=trial.pace.silence / 2)
        trial.equal(len(held), member.limit, "BPC-4", f"deliveries held by {member.name}")


@case("bpc.bytes", rules=("BPC-1",), sometimes=("seen",))
async def bytes_bound(trial: Trial) -> None:
    """`max_in_flight_bytes` bounds what the application holds, plus one message."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(20):
        await producer.publish(size=10_000)
    async with group.consumer(max_in_flight_bytes=35_000) as consumer:
        held = []
        while (delivery := await consumer.receive(trial.pace.silence)) is not None:
            held.append(delivery)
        trial.that(1 <= len(held) <= 4, "BPC-1", "at most 35 kB and one message in hand", f"{len(held)} of 10 kB")
        while len(held) < 20:
            await held[-1].ack()
            delivery = await consumer.receive(trial.pace.patience)
            trial.that(delivery is not None, "BPC-1", "one more after each ack", f"{len(held)} of 20")
            if delivery is not None:
                held.append(delivery)
            trial.tally("seen")
        for delivery in held:
            if delivery.state == "lent":
                await delivery.ack()


@case("bpc.pause", rules=("BPC-3",), sometimes=("delivered",))
async def pause(trial: Trial) -> None:
    """A paused consumer receives nothing, keeps its membership and what it holds, and loses nothing."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    held = await trial.next(member)
    await member.pause()
    names = {(await producer.publish())[0] for _ in range(5)}
    await trial.silent(member, "BPC-3", seconds=2 * trial.lease)
    trial.equal(str(held.delivery.state), "lent", "BPC-3", "state of what it holds")
    await held.ack()
    await member.resume()
    got = set()
    for _ in range(5):
        lent = await trial.next(member, "BPC-3")
        got.add(lent.msg)
        await lent.ack()
    trial.equal(got, names, "BPC-3", "deliveries after resuming")


@case("bpc.backlog-stays", rules=("BPC-2",), level=GATED("lag"), sometimes=("held",))
async def backlog_stays(trial: Trial) -> None:
    """A stalled handler leaves the backlog at the broker: another member gets all that the first can't hold."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(500):
        await producer.submit()
    await producer.watched()
    stalled = await trial.member(group, max_in_flight=10)
    await trial.next(stalled)
    trial.tally("held")
    other = await trial.member(group)
    got = 0
    while (lent := await other.receive(trial.pace.silence)) is not None:
        await lent.ack()
        got += 1
    need = 490 if trial.claims.parallelism.bound == "unlimited" else 0
    trial.that(got >= need, "BPC-2", f"at least {need} for the other member", got)


@case("bpc.many-waiters", rules=("BPC-5", "BPC-1"), sometimes=("delivered",))
async def many_waiters(trial: Trial) -> None:
    """A full window makes `receive` wait until its timeout and return None; an ack lets a waiting one go on."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(5):
        await producer.publish()
    member = await trial.member(group, max_in_flight=2)
    held = await trial.take(member, 2)
    await trial.silent(member, "BPC-5")
    waiting = asyncio.create_task(member.receive(trial.pace.patience))
    await asyncio.sleep(0)
    await held[0].ack()
    lent = await trial.within(trial.pace.patience, waiting, "BPC-5", "a delivery after the ack")
    trial.that(lent is not None, "BPC-5", "a delivery", lent)
    for each in (held[1], lent):
        if each is not None:
            try:
                await each.ack()
            except UnistreamError as error:
                trial.that(False, "DEL-1", "an ack within the lease", error)
