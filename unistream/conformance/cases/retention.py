"""Cases `ret.*` and `idm.*`: what is removed, what must not be, and how long an id is remembered."""

from __future__ import annotations

import asyncio

from unistream import Client, Group, Retention
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial, VacuousError
from unistream.driver.types import DataLoss


@case(
    "ret.gap-reported", rules=("END-4",), level=GATED(retention="max_messages"), sometimes=("lost", "kept"), limit=90.0
)
async def gap_reported(trial: Trial) -> None:
    """What a declared retention removed before a slow group read it is told as DataLoss, with the count."""
    topic = await trial.topic(retention=Retention(max_messages=20))
    slow = trial.client.group("slow", topic, lease=trial.lease)
    await slow.create()
    losses: list[DataLoss] = []
    client = await trial.open()
    watching = asyncio.create_task(_watch(client, losses))
    async with trial.client.producer(topic) as producer:
        for number in range(400):
            await producer.publish(b"%d" % number)
    kept: list[int] = []
    async with client.group("slow", topic, lease=trial.lease).consumer(max_in_flight=5) as consumer:
        while delivery := await consumer.receive(trial.pace.silence + trial.claims.lease.recover_within):
            kept.append(int(delivery.value))
            await delivery.ack()
    watching.cancel()
    await asyncio.wait({watching})
    trial.tally("kept", len(kept))
    trial.tally("lost", 400 - len(kept))
    told = [loss.count for loss in losses]
    trial.that(bool(losses), "END-4", f"a DataLoss event for {400 - len(kept)} messages", "none")
    trial.equal((losses[0].topic, losses[0].group), (topic, "slow"), "END-4", "topic and group of the loss")
    if None not in told:
        trial.equal(sum(count or 0 for count in told), 400 - len(kept), "END-4", "messages that are told lost")
    trial.equal(kept, list(range(400 - len(kept), 400)), "END-4", "the latest messages, and all of these:")


async def _watch(client: Client, losses: list[DataLoss]) -> None:
    async for event in client.events():
        if isinstance(event, DataLoss):
            losses.append(event)


@case("ret.unsettled-protected", rules=("GRP-1",), sometimes=("acked", "drained"))
async def unsettled_protected(trial: Trial) -> None:
    """Without a declared retention nothing that a group has not settled is removed, however fast another group is."""
    topic = await trial.topic()
    fast = await trial.group(topic)
    slow = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(300):
        await producer.submit()
    await producer.watched()
    await trial.drain(fast)
    await trial.drain(slow)
    got = sum(event.op == "deliver" and event.group == slow.name for event in trial.recorder.events)
    trial.equal(got, 300, "GRP-1", "deliveries to the slow group")


@case("idm.distinct", rules=("PUB-3", "PUB-1"), sometimes=("confirmed", "drained"))
async def distinct(trial: Trial) -> None:
    """Different ids are never taken for the same, however much they look alike."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    ids = [f"{'same-beginning-' * 7}{number:05d}" for number in range(300)]
    ids += [f"{number:05d}{'-same-end' * 12}" for number in range(300)] + ["A", "a", "a.", "0", "00"]
    for name in ids:
        _, receipt = await producer.publish(id=name)
        trial.that(receipt.duplicate is not True, "PUB-3", f"{name} not taken for a duplicate", receipt.duplicate)
    await trial.drain(group)
    got = sum(event.op == "deliver" for event in trial.recorder.events)
    trial.equal(got, len(ids), "PUB-3", "deliveries")


@case("idm.producer-restart", rules=("PUB-3",), level=GATED("dedupe"), sometimes=("confirmed", "delivered"))
async def producer_restart(trial: Trial) -> None:
    """What a program publishes once more after it was started anew, under the same ids, is stored once."""
    topic = await trial.topic()
    group = trial.client.group("g", topic, lease=trial.lease)
    await group.create()
    for life in range(3):
        client = await trial.open()
        async with client.producer(topic) as producer:
            receipts = [await producer.publish(b"%d" % number, id=f"order-{number}") for number in range(5)]
        await client.close()
        trial.tally("confirmed", len(receipts))
        told = [each.duplicate for each in receipts]
        trial.equal(told, [life > 0] * 5, "PUB-3", f"duplicates told in life {life + 1}")
    await once(trial, group, [b"%d" % number for number in range(5)])


async def once(trial: Trial, group: Group, wanted: list[bytes]) -> None:
    """Check that the group gets each of these bodies once, and no more."""
    got: list[bytes] = []
    async with group.consumer() as consumer:
        for limit in (*[trial.pace.patience] * len(wanted), trial.pace.silence):
            delivery = await consumer.receive(limit)
            if delivery is None:
                break
            got.append(delivery.value)
            await delivery.ack()
    trial.tally("delivered", len(got))
    trial.equal(sorted(got), sorted(wanted), "PUB-3", "deliveries")


LONGEST_WINDOW = 300.0


@case("idm.window", rules=("PUB-3",), level=GATED("dedupe"), tier=Tier.LONG, sometimes=("delivered",), limit=900.0)
async def window(trial: Trial) -> None:
    """Within the declared window an id is stored once; what was forgotten after it is stored again."""
    seconds = trial.claims.dedupe.window
    if seconds > LONGEST_WINDOW:
        raise VacuousError(f"the window is {seconds} s; a case waits no more than {LONGEST_WINDOW} s")
    topic = await trial.topic()
    group = trial.client.group("g", topic, lease=trial.lease)
    await group.create()
    async with trial.client.producer(topic) as producer:
        await producer.publish(b"first", id="twice")
        await asyncio.sleep(max(0.0, 0.8 * seconds))
        again = await producer.publish(b"within", id="twice")
        trial.equal(again.duplicate, True, "PUB-3", f"duplicate told within {seconds} s")
        # Whether a repetition prolongs the memory is the broker's affair, so a whole window passes after it.
        await asyncio.sleep(1.5 * seconds + trial.pace.slack)
        late = await producer.publish(b"after", id="twice")
    got = []
    async with group.consumer() as consumer:
        while delivery := await consumer.receive(trial.pace.silence):
            got.append(delivery.value)
            await delivery.ack()
    trial.tally("delivered", len(got))
    trial.that(got in ([b"first"], [b"first", b"after"]), "PUB-3", "the first, and maybe the one after", got)
    trial.equal(late.duplicate, len(got) == 1, "PUB-3", "duplicate told of the one after")
