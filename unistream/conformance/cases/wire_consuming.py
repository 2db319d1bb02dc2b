"""Cases of consuming over a bad wire: nothing lost, nothing torn, nothing settled that the broker did not hear."""

from __future__ import annotations

import asyncio
from random import Random

from unistream.conformance.recorded import Lent, RecordedMember, RecordedProducer
from unistream.conformance.registry import Tier, case
from unistream.conformance.tasks import Together
from unistream.conformance.trial import Trial
from unistream.conformance.wires import CARRIED, Wire, wire
from unistream.driver.types import DataLoss
from unistream.errors import UnistreamError, UnsupportedError

WIRE = ("socket",)


def noticed(trial: Trial) -> float:
    """Return the seconds within which a dead connection is noticed and what was lent on it comes again."""
    return trial.claims.lease.dead_peer_after + trial.recovery + trial.lease + 2.0


async def answer(lent: Lent, *, confirm: bool = False) -> UnistreamError | None:
    """Ack; return the error where one was raised."""
    try:
        await lent.ack(confirm=confirm)
    except UnsupportedError:
        raise  # not an outcome of the ack: it was not even asked
    except UnistreamError as error:
        return error
    return None


async def come(trial: Trial, member: RecordedMember, names: set[str], *, seconds: float, rule: str = "GRP-4") -> None:
    """Ack what comes until every one of `names` has come."""
    await trial.collect(member, names, rule, seconds=seconds, settle=answer)


@case(
    "net.half-open",
    rules=("END-3", "GRP-4"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "harm", "delivered", "confirmed"),
    limit=120.0,
)
async def half_open(trial: Trial) -> None:
    """A half-open connection is noticed within `dead_peer_after`, idle or busy, and replaced."""
    topic = await trial.topic()
    group = await trial.group(topic)
    line = await wire(trial)
    member = await line.member(group)
    producer = await line.producer(topic)
    other = await trial.producer(topic)
    await producer.publish()
    await (await trial.next(member)).ack()
    with line.harm(member, "half open") as proxy:
        since = trial.recorder.now()
        trial.that(proxy.strand() > 0, "END-3", "connections through the wire", "none stood")
        name, _ = await other.publish()
        await come(trial, member, {name}, seconds=noticed(trial), rule="END-3")
        # Now the producer, which was not speaking meanwhile, speaks into its own half-open connection.
        limit = trial.claims.lease.dead_peer_after + trial.pace.patience
        for _ in range(2):
            await _publish_again(trial, producer, limit)
        trial.recorder.record("fault", member=producer.name, since=since, note="connection half open")
    # Where partitions are shared out, those of a member that asks for nothing stand still as long as it stays.
    await member.leave()
    await trial.drain(group)


async def _publish_again(trial: Trial, producer: RecordedProducer, limit: float) -> None:
    loop = asyncio.get_running_loop()
    ends = loop.time() + limit
    while True:
        try:
            await producer.publish(timeout=max(0.1, ends - loop.time()))
        except UnistreamError as error:
            trial.that(loop.time() < ends, "END-3", f"a confirm within {limit:.1f} s", error)
        else:
            return


@case(
    "net.cut-mid-delivery",
    rules=("GRP-1", "GRP-4", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "delivered"),
    limit=120.0,
)
async def cut_mid_delivery(trial: Trial) -> None:
    """A delivery that is cut in the middle is never handed on truncated: it comes again, whole."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    size = int(min(trial.claims.max_message_bytes.limit // 2, 1024 * 1024))
    line = await wire(trial)
    member = await line.member(group)
    dice = Random(trial.seed)
    for _ in range(3):
        with line.harm(member, "cut inside a delivery") as proxy:
            proxy.cut_after(dice.randrange(size // 10, size - size // 10), "down")
            cut = proxy.more_broken()
            name, _ = await producer.publish(size=size)
            taking = asyncio.create_task(come(trial, member, {name}, seconds=noticed(trial)))
            await trial.within(
                trial.pace.patience,
                cut,
                "END-3",
                "a delivery through the wire",
            )
            await taking
    await trial.drain(group)


@case(
    "net.isolate-one-member",
    rules=("GRP-4", "GRP-2", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "harm", "redelivered"),
    limit=120.0,
)
async def isolate_one_member(trial: Trial) -> None:
    """What a member holds that lost its network goes to the others, and back on the network it works again."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = {(await producer.publish())[0] for _ in range(5)}
    line = await wire(trial)
    lonely = await line.member(group, max_in_flight=5)
    held = await trial.take(lonely, 5)
    other = await trial.member(group)
    with line.harm(lonely, "isolated") as proxy:
        proxy.hold()
        await come(trial, other, names, seconds=noticed(trial) + trial.lease)
    for lent in held:
        lent.expired()
        error = await answer(lent, confirm=bool(trial.claims.ack_confirm))
        trial.that(
            error is not None or not trial.claims.fencing or not trial.claims.ack_confirm,
            "DEL-7",
            "refused acks of what another member has settled",
            f"{lent.msg} was acked",
        )
    await other.leave()
    fence, _ = await producer.publish()
    await come(trial, lonely, {fence}, seconds=noticed(trial), rule="END-3")


async def _round(trial: Trial, line: Wire) -> None:
    """Publish, deliver, ack, nack and redeliver, with bodies of many sizes."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=max(trial.lease, 10.0))
    producer = await line.producer(topic)
    member = await line.member(group)
    confirm = bool(trial.claims.ack_confirm)
    for size in (0, 100, 1000, 4000):
        outcomes = await producer.publish_many([b"k", None, b""], size=size)
        for name, outcome in outcomes:
            trial.that(not isinstance(outcome, UnistreamError), "END-3", f"a receipt for {name}", outcome)
        lents = await trial.take(member, 3)
        await lents[0].nack(0.0)
        for lent in lents[1:]:
            await lent.ack(confirm=confirm)
        again = await trial.next(member, "DEL-2")
        trial.equal(again.msg, lents[0].msg, "DEL-2", "message that comes again")
        await again.ack(confirm=confirm)
    await member.leave()
    await trial.drain(group)


@case(
    "net.latency",
    rules=("END-3", "GRP-1", "PUB-1"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "harm", "confirmed", "acked", "redelivered", "drained"),
    limit=120.0,
)
async def latency(trial: Trial) -> None:
    """On a wire of 200 ± 50 ms everything works as on a short one."""
    line = await wire(trial)
    line.proxy.delay(0.2, 0.05)
    await _round(trial, line)


@case(
    "net.one-byte-segments",
    rules=("END-3", "GRP-1", "PUB-1"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "harm", "confirmed", "acked", "redelivered", "drained"),
    limit=120.0,
)
async def one_byte_segments(trial: Trial) -> None:
    """Bytes that arrive one by one make the same messages."""
    line = await wire(trial)
    line.proxy.slice()
    await _round(trial, line)


@case(
    "net.flap",
    rules=("END-3", "GRP-1", "GRP-2", "PUB-1"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "confirmed", "delivered", "drained"),
    limit=180.0,
)
async def flap(trial: Trial) -> None:
    """Ten resets under load lose nothing that was confirmed, and producer and members work on by themselves."""
    topic = await trial.topic()
    group = await trial.group(topic)
    lines = [await wire(trial) for _ in range(3)]
    producer = await lines[0].producer(topic)
    members = [await line.member(group, max_in_flight=10) for line in lines[1:]]
    over = asyncio.Event()

    async def publish() -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                await producer.publish(key=b"k%d" % (number % 5), timeout=trial.pace.patience)
            except UnistreamError:
                trial.tally("failed")

    async def consume(member: RecordedMember) -> None:
        while not over.is_set():
            lent = await member.receive(0.5)
            if lent is not None:
                await answer(lent)

    dice = Random(trial.seed)
    async with Together() as tasks:
        tasks.create_task(publish())
        for member in members:
            tasks.create_task(consume(member))
        for turn in range(10):
            await asyncio.sleep(dice.uniform(0.2, 0.6))
            line, who = [(lines[0], producer), (lines[1], members[0]), (lines[2], members[1])][turn % 3]
            with line.harm(who, "reset") as proxy:  # type: ignore[arg-type]
                proxy.reset()
                # The fault lasts until it was felt: until then a client lends what it had read before.
                await line.client.health()
        over.set()
    # Liveness: after the last reset a message still goes all the way.
    fence, _ = await trial.within(trial.pace.patience, producer.publish(), "END-3", "publishing after the resets")
    await members[1].leave()
    await come(trial, members[0], {fence}, seconds=noticed(trial), rule="END-3")
    await members[0].leave()
    await trial.drain(group)


@case(
    "net.ephemeral-gap",
    rules=("GRP-5", "END-4"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken"),
    limit=120.0,
)
async def ephemeral_gap(trial: Trial) -> None:
    """An ephemeral group sees what came while its connection was down, or a DataLoss event tells of the gap."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    line = await wire(trial)
    group = line.client.group(None, topic)
    losses: list[DataLoss] = []

    async def listen() -> None:
        async for event in line.client.events():
            if isinstance(event, DataLoss):
                losses.append(event)

    listening = asyncio.create_task(listen())
    async with group.consumer() as consumer:
        await producer.publish()
        first = await consumer.receive(trial.pace.patience)
        trial.that(first is not None, "GRP-5", "a message published after entering", "none")
        assert first is not None
        await first.ack()
        line.proxy.refuse()
        line.proxy.reset()
        missed = [(await producer.publish())[0] for _ in range(5)]
        line.proxy.heal()
        _, receipt = await producer.publish()
        got: list[str] = []
        loop = asyncio.get_running_loop()
        ends = loop.time() + noticed(trial)
        while receipt.id not in got and loop.time() < ends:
            delivery = await consumer.receive(1.0)
            if delivery is not None:
                got.append(delivery.id)
                await delivery.ack()
                continue
            # What was published while it was away may be gone with the old group; what comes now must come.
            _, receipt = await producer.publish()
        trial.that(receipt.id in got, "GRP-5", "messages after the connection came back", got)
        complete = len(got) > len(missed)
        trial.that(complete or bool(losses), "GRP-5", "all messages, or a DataLoss event", f"{len(got)} messages")
    listening.cancel()
