"""Cases of settling over a bad wire: nothing counts as settled that the broker did not hear."""

from __future__ import annotations

import asyncio
from random import Random

from unistream.conformance.cases.wire_consuming import WIRE, answer, come, noticed
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial
from unistream.conformance.wires import CARRIED, wire
from unistream.errors import LeaseLostError


@case(
    "net.cut-mid-ack",
    rules=("DEL-1", "DEL-7", "GRP-1"),
    level=GATED("ack_confirm"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "acked", "drained"),
    limit=120.0,
)
async def cut_mid_ack(trial: Trial) -> None:
    """An ack around which the connection is cut is confirmed and final, or not confirmed."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    line = await wire(trial)
    member = await line.member(group)
    dice = Random(trial.seed)
    for turn in range(6):
        await producer.publish()
        lent = await trial.next(member, "GRP-4", timeout=noticed(trial))
        with line.harm(member, "cut around an ack") as proxy:
            if turn % 2:
                proxy.cut_after(dice.randrange(0, 4), "down")
            else:
                proxy.cut_after(dice.randrange(1, 60), "up")
            await answer(lent, confirm=True)
    await member.leave()
    await trial.drain(group)


@case(
    "ack.after-reconnect",
    rules=("DEL-7", "DEL-1", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "drained"),
    limit=90.0,
)
async def after_reconnect(trial: Trial) -> None:
    """After a reset a delivery from before is settled, or said to be lost and comes again; the member works on."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=max(trial.lease, 5.0))
    producer = await trial.producer(topic)
    line = await wire(trial)
    member = await line.member(group)
    for _ in range(6):
        await producer.publish()
    lents = await trial.take(member, 6)
    with line.harm(member, "reset") as proxy:
        trial.that(proxy.reset() > 0, "END-3", "connections through the wire", "none stood")
    confirm = bool(trial.claims.ack_confirm)
    for place, lent in enumerate(lents):
        try:
            await (lent.ack(confirm=confirm) if place % 2 else lent.nack(0.0))
        except LeaseLostError as error:
            keeps = trial.claims.lease.scope == "message"
            trial.that(not keeps, "DEL-7", "loans that outlive the connection (lease scope message)", error)
    fence, _ = await producer.publish()
    await come(trial, member, {fence}, seconds=noticed(trial), rule="END-3")
    await member.leave()
    await trial.drain(group)


@case(
    "ack.during-outage",
    rules=("DEL-1", "DEL-7"),
    level=GATED("ack_confirm"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "harm", "drained"),
    limit=90.0,
)
async def during_outage(trial: Trial) -> None:
    """While nothing reaches the broker `ack(confirm=True)` waits or raises; it never says that the broker holds it."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=max(trial.lease, 5.0))
    producer = await trial.producer(topic)
    line = await wire(trial)
    member = await line.member(group)
    await producer.publish()
    lent = await trial.next(member)
    with line.harm(member, "held") as proxy:
        proxy.hold()
        acking = asyncio.create_task(answer(lent, confirm=True))
        done, _ = await asyncio.wait({acking}, timeout=trial.pace.silence)
        trial.that(not done or acking.result() is not None, "DEL-1", "no confirm while nothing passes", "it returned")
    await trial.within(noticed(trial), acking, "DEL-1", "an answer after the outage")
    await member.leave()
    await trial.drain(group)


@case(
    "net.ack-path-lost",
    rules=("END-3", "BPC-1", "GRP-1"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "lost", "drained"),
    limit=120.0,
)
async def ack_path_lost(trial: Trial) -> None:
    """When only the way to the broker is lost, the member keeps its bound, reconnects, and loses nothing."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    line = await wire(trial)
    member = await line.member(group, max_in_flight=5)
    for _ in range(30):
        await producer.publish()
    with line.harm(member, "acks lost") as proxy:
        lents = await trial.take(member, 5)
        proxy.drop("up")
        sent = proxy.more_lost()
        acks = [asyncio.create_task(answer(lent)) for lent in lents]
        await trial.within(trial.pace.patience, sent, "END-3", "acks on the wire")
        await asyncio.wait({asyncio.create_task(member.receive(trial.pace.silence))})
    await asyncio.wait(acks, timeout=noticed(trial))
    fence, _ = await producer.publish()
    await come(trial, member, {fence}, seconds=noticed(trial), rule="END-3")
    await member.leave()
    await trial.drain(group)
