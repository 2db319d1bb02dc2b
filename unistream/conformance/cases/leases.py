"""Cases of leases: extended, renewed, ended, and what is tried with a delivery afterwards."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from unistream.conformance.cases.settling import MARGIN, one
from unistream.conformance.line import Line
from unistream.conformance.registry import GATED, case
from unistream.conformance.trial import CheckError, Trial
from unistream.errors import LeaseLostError, SettleError


@case("ack.stale-fenced", rules=("DEL-7", "GRP-2"), level=GATED("fencing"), sometimes=("refused", "redelivered"))
async def stale_fenced(trial: Trial) -> None:
    """A settle by a member whose lease ended is refused, and never settles another member's loan."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=trial.lease)
    producer = await trial.producer(topic)
    slow = await trial.member(group, max_in_flight=1)
    name, _ = await producer.publish()
    held = await trial.next(slow)
    other = await trial.member(group)
    again = await trial.next(other, "GRP-4", timeout=MARGIN * trial.recovery + trial.lease)
    trial.equal(again.msg, name, "GRP-4", "message lent to the other")
    await trial.raises(LeaseLostError, held.ack(confirm=bool(trial.claims.ack_confirm)), "DEL-7")
    trial.equal(str(held.delivery.state), "lost", "DEL-7", "state of the old delivery")
    await again.nack(0.0)
    third = await trial.next(other, "DEL-7")
    trial.equal(third.msg, name, "DEL-7", "message, which the old ack must not have settled,")
    await third.ack()


@case("grp.exclusive-over-outage", rules=("GRP-2", "GRP-4", "END-3"), sometimes=("faults", "acked", "drained"))
async def exclusive_over_outage(trial: Trial) -> None:
    """What a member was lent goes to nobody else while its lease lasts, though its connection is lost for a moment."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=max(trial.lease, 5.0))
    producer = await trial.producer(topic)
    member, line = await trial.doomed(group, max_in_flight=10)
    for _ in range(3):
        await producer.publish()
    held = await trial.take(member, 3)
    other = await trial.member(group)
    waiting = asyncio.create_task(member.receive(trial.pace.silence))
    await asyncio.sleep(trial.pace.silence / 10)  # so that it is on its way
    since = trial.recorder.now()
    line.interrupt()
    # Where leases end with the connection the other gets them now; else the checkers will object.
    held += [lent for _ in range(3) if (lent := await other.receive(trial.pace.silence)) is not None]
    line.restore()
    trial.recorder.record("fault", member=member.name, since=since, note="connection interrupted")
    await waiting
    for lent in held:
        with suppress(SettleError):
            await lent.ack(confirm=bool(trial.claims.ack_confirm))
    await member.leave()
    await trial.drain(group)


@case("ack.last-moment", rules=("DEL-1", "DEL-7"), level=GATED("ack_confirm"), sometimes=("acked", "drained"))
async def last_moment(trial: Trial) -> None:
    """An ack that is confirmed when little of the lease is left is as final as any other."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=trial.lease)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    for left in (0.1, 0.05, 0.025, 0.02):
        await producer.publish()
        lent = await trial.next(member, timeout=trial.recovery + trial.pace.patience)
        await asyncio.sleep(max(0.0, lent.remaining() - left * trial.lease))
        try:
            await lent.ack(confirm=True)
        except LeaseLostError:
            lent.expired()  # a slow machine: it was too late after all, and the message comes again
            await (await trial.next(member, "DEL-7", timeout=trial.recovery + trial.pace.patience)).ack(confirm=True)
    await member.leave()
    await trial.drain(group)


@case("ack.late-beside-holder", rules=("DEL-7", "GRP-2"), sometimes=("redelivered", "drained"))
async def late_beside_holder(trial: Trial) -> None:
    """Whatever a member tries with a delivery that it has lost, the one who holds the message now does not notice."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=trial.lease)
    producer = await trial.producer(topic)
    slow = await trial.member(group, max_in_flight=3)
    for _ in range(3):
        await producer.publish()
    lost = {lent.msg: lent for lent in await trial.take(slow, 3)}
    other = await trial.member(group)
    confirm = bool(trial.claims.ack_confirm)
    for turn in range(3):
        held = await trial.next(other, "GRP-4", timeout=MARGIN * trial.recovery + trial.lease)
        late = lost[held.msg]
        with suppress(SettleError):  # the history shows whether it was refused, and what came of it
            match turn:
                case 0:
                    await late.ack(confirm=confirm)
                case 1:
                    await late.extend(trial.lease)
                case _:
                    await late.reject()
        await held.ack(confirm=confirm)
    await trial.drain(group)


@case("ack.lost-refused", rules=("DEL-7",), sometimes=("refused",))
async def lost_refused(trial: Trial) -> None:
    """When a lease has ended the delivery says `lost`, and settling it raises LeaseLostError."""
    member, lent, _ = await one(trial, max_lease=trial.lease)
    await asyncio.sleep(MARGIN * trial.lease)
    lent.expired()
    trial.equal(str(lent.delivery.state), "lost", "DEL-7", "state after the lease")
    await trial.raises(LeaseLostError, lent.ack(), "DEL-7")
    again = await trial.next(member, "DEL-7", timeout=2 * trial.recovery)
    await again.ack()


@case(
    "ack.late-arrival",
    rules=("DEL-7", "GRP-2"),
    level=GATED("fencing", "ack_confirm"),
    sometimes=("refused", "redelivered"),
)
async def late_arrival(trial: Trial) -> None:
    """An ack that reaches the broker after the lease ended is refused there, and settles nobody else's loan."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=trial.lease)
    producer = await trial.producer(topic)
    line = Line()
    slow = await trial.member(trial.regroup(await trial.open(line), group), max_in_flight=1)
    name, _ = await producer.publish()
    held = await trial.next(slow)
    line.latency = 1.5 * trial.lease
    acking = asyncio.create_task(held.ack(confirm=True))
    other = await trial.member(group)
    again = await trial.next(other, "GRP-4", timeout=MARGIN * trial.recovery)
    trial.equal(again.msg, name, "GRP-4", "message lent to the other")
    await trial.raises(LeaseLostError, acking, "DEL-7")
    line.latency = 0.0
    await again.nack(0.0)
    third = await trial.next(other, "DEL-7")
    trial.equal(third.msg, name, "DEL-7", "message, which the late ack must not have settled,")
    await third.ack()


@case("ext.keeps-lease", rules=("DEL-6",), sometimes=("extended",))
async def keeps_lease(trial: Trial) -> None:
    """A delivery that is extended before its lease ends is not lent to another member, four leases long."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=20 * trial.lease)
    producer = await trial.producer(topic)
    holder = await trial.member(group, max_in_flight=1)
    await producer.publish()
    lent = await trial.next(holder)
    idle = await trial.member(group)
    for _ in range(8):
        await lent.extend(trial.lease)
        await trial.silent(idle, "DEL-6", seconds=trial.lease / 2)
    await lent.ack(confirm=bool(trial.claims.ack_confirm))
    await trial.silent(idle, "DEL-1", seconds=MARGIN * trial.lease)


@case("ext.renewed-by-library", rules=("DEL-6",), sometimes=("acked",))
async def renewed_by_library(trial: Trial) -> None:
    """The library renews a delivery until it is settled: a handler three leases long is not disturbed."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    holder = await trial.member(group, max_in_flight=1)
    await producer.publish()
    lent = await trial.next(holder)
    idle = await trial.member(group)
    for _ in range(3):
        await trial.silent(idle, "DEL-6", seconds=trial.lease)
        lent.renewed()
    trial.equal(str(lent.delivery.state), "lent", "DEL-6", "state after three leases")
    await lent.ack(confirm=bool(trial.claims.ack_confirm))
    await trial.silent(idle, "DEL-1", seconds=MARGIN * trial.lease)


@case("ext.max-lease", rules=("DEL-6", "GRP-4"), sometimes=("redelivered",))
async def max_lease(trial: Trial) -> None:
    """Renewal ends `max_lease` after lending, and the message goes to another member."""
    topic = await trial.topic()
    group = await trial.group(topic, max_lease=2 * trial.lease)
    producer = await trial.producer(topic)
    stuck = await trial.member(group, max_in_flight=1)
    await producer.publish()
    loop = asyncio.get_running_loop()
    began = loop.time()
    held = await trial.next(stuck)
    idle = await trial.member(group)
    again = await trial.next(idle, "DEL-6", timeout=2 * trial.lease + 2 * trial.recovery)
    took = loop.time() - began
    held.expired()
    trial.that(took >= 1.5 * trial.lease, "DEL-6", "renewal beyond the first lease", f"lent again after {took:.2f} s")
    await again.ack()


@case("ext.after-loss", rules=("DEL-6", "DEL-7"), sometimes=("refused",))
async def after_loss(trial: Trial) -> None:
    """Extending a lost delivery raises LeaseLostError."""
    member, lent, _ = await one(trial, max_lease=trial.lease)
    await asyncio.sleep(MARGIN * trial.lease)
    error = await trial.raises(SettleError, lent.extend(trial.lease), "DEL-7")
    if not isinstance(error, LeaseLostError):
        raise CheckError("DEL-7", "LeaseLostError", repr(error))
    again = await trial.next(member, "GRP-4", timeout=2 * trial.recovery)
    await again.ack()
