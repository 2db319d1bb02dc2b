"""Cases of publishing over a bad wire: what a receipt and an error are worth when the connection is harmed."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

from unistream.conformance.recorded import RecordedProducer
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial
from unistream.conformance.wires import CARRIED, Wire, wire
from unistream.errors import UnistreamError
from unistream.message import Receipt

if TYPE_CHECKING:
    from unistream import Group

WIRE = ("socket",)


async def publishing(trial: Trial, **options: object) -> tuple[Wire, Group, RecordedProducer]:
    """Return a wire, a group of a fresh topic, and a producer of that topic on the wire."""
    topic = await trial.topic()
    group = await trial.group(topic)
    line = await wire(trial)
    return line, group, await line.producer(topic, **options)


async def attempt(producer: RecordedProducer, *, size: int = 0, timeout: float) -> Receipt | UnistreamError:
    """Publish one message; return its receipt, or the error that was raised."""
    try:
        return (await producer.publish(size=size, timeout=timeout))[1]
    except UnistreamError as error:
        return error


async def works_again(trial: Trial, producer: RecordedProducer) -> None:
    """Publish until a message is confirmed; the first one may still meet the end of the harmed connection."""

    async def confirmed() -> None:
        while not isinstance(await attempt(producer, timeout=trial.pace.patience), Receipt):
            trial.tally("again")

    await trial.within(2 * trial.pace.patience, confirmed(), "END-3", "a receipt once the wire is whole")


@case(
    "net.cut-mid-publish",
    rules=("PUB-1", "PUB-2", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "confirmed", "drained"),
    limit=120.0,
)
async def cut_mid_publish(trial: Trial) -> None:
    """A connection cut inside a publish leaves a message confirmed and stored, or an error that tells the truth."""
    line, group, producer = await publishing(trial)
    dice = Random(trial.seed)
    for count in (1, 40, dice.randrange(100, 4000), dice.randrange(4000, 8000)):
        await attempt(producer, timeout=trial.pace.patience)
        with line.harm(producer, "cut inside a publish") as proxy:
            cut = proxy.more_broken()
            proxy.cut_after(count, "up")
            await attempt(producer, size=8000, timeout=trial.pace.patience)
            await trial.within(trial.pace.patience, cut, "END-3", f"a request of more than {count} bytes")
    await works_again(trial, producer)
    await trial.drain(group)


async def _unanswered(trial: Trial, line: Wire, producer: RecordedProducer, *, timeout: float) -> object:
    """Publish a message whose first answer is lost with its connection, and return the outcome."""
    with line.harm(producer, "reply lost") as proxy:
        answered = proxy.more_lost()
        proxy.drop("down")
        asked = asyncio.create_task(attempt(producer, timeout=timeout))
        await trial.within(trial.pace.patience, answered, "END-3", "an answer")
    return await asked


@case(
    "net.reply-lost",
    rules=("PUB-2", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "lost", "broken", "drained"),
    limit=90.0,
)
async def reply_lost(trial: Trial) -> None:
    """A message whose answer is lost with its connection is perhaps stored: never called surely not stored."""
    line, group, producer = await publishing(trial)
    await producer.publish()
    for _ in range(3):
        outcome = await _unanswered(trial, line, producer, timeout=trial.pace.patience)
        if not isinstance(outcome, Receipt):
            trial.equal(getattr(outcome, "stored", None), "unknown", "PUB-2", "stored, of a message that was sent,")
        elif not trial.claims.dedupe:
            trial.equal(outcome.duplicate, None, "PUB-3", "duplicate, where nothing removes duplicates,")
    await works_again(trial, producer)
    await trial.drain(group)


@case(
    "net.reply-lost-retry",
    rules=("PUB-3", "PUB-1"),
    level=GATED("dedupe"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "lost", "confirmed", "delivered"),
    limit=90.0,
)
async def reply_lost_retry(trial: Trial) -> None:
    """Where the backend removes duplicates, a publish whose answer was lost is retried, confirmed, and stored once."""
    line, group, producer = await publishing(trial)
    await producer.publish()
    for _ in range(3):
        outcome = await _unanswered(trial, line, producer, timeout=2 * trial.pace.patience)
        trial.that(isinstance(outcome, Receipt), "PUB-3", "a receipt after a retry with the same id", outcome)
    member = await trial.member(group)
    seen = [(await trial.next(member)).msg for _ in range(4)]
    trial.equal(len(set(seen)), 4, "PUB-3", "different messages among four deliveries")
    await trial.silent(member, "PUB-3")


@case(
    "net.publish-timeout",
    rules=("PUB-2", "END-2"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "harm", "unknown", "drained"),
    limit=90.0,
)
async def publish_timeout(trial: Trial) -> None:
    """On a silent wire a publish ends at its own timeout, unknown; later nothing is confirmed twice."""
    line, group, producer = await publishing(trial)
    await producer.publish()
    loop = asyncio.get_running_loop()
    with line.harm(producer, "held") as proxy:
        proxy.hold()
        began = loop.time()
        error = await trial.raises(UnistreamError, producer.publish(timeout=1.0), "END-2")
        took = loop.time() - began
    trial.that(0.95 <= took <= 1.3 + trial.pace.slack, "END-2", "an error after 1 s", f"{took:.2f} s")
    trial.equal(getattr(error, "stored", None), "unknown", "PUB-2", "stored")
    await trial.within(trial.pace.patience, producer.publish(), "END-3", "publishing again")
    stats = producer.producer.stats
    trial.equal((stats.confirmed, stats.unknown), (2, 1), "PUB-2", "confirmed and unknown messages")
    await trial.drain(group)


@case(
    "net.refused-publish",
    rules=("PUB-2", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "unpublished", "drained"),
    limit=90.0,
)
async def refused_publish(trial: Trial) -> None:
    """With nobody to hand it to, a publish raises, surely not stored; the producer works again by itself."""
    line, group, producer = await publishing(trial)
    await producer.publish()
    with line.harm(producer, "refused") as proxy:
        proxy.refuse()
        proxy.reset()
        error = await trial.raises(UnistreamError, producer.publish(timeout=2.0), "PUB-2")
        # The first one may have been written into the dying connection; the second one surely was not.
        error = await trial.raises(UnistreamError, producer.publish(timeout=1.0), "PUB-2")
        trial.equal(getattr(error, "stored", None), "no", "PUB-2", "stored, of a message that was never sent,")
    await works_again(trial, producer)
    await trial.drain(group)


@case(
    "pub.failed-is-absent",
    rules=("PUB-2",),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "lost", "unpublished", "unknown", "confirmed", "drained"),
    limit=120.0,
)
async def failed_is_absent(trial: Trial) -> None:
    """Of all the messages that bad wires made fail, none that was called not stored is ever delivered."""
    line, group, producer = await publishing(trial, max_unconfirmed=8)
    dice = Random(trial.seed)
    for turn in range(12):
        await attempt(producer, timeout=trial.pace.patience)
        with line.harm(producer, "made difficult") as proxy:
            match turn % 4:
                case 0:
                    proxy.cut_after(dice.randrange(1, 3000), "up")
                case 1:
                    proxy.cut_after(dice.randrange(0, 10), "down")
                case 2:
                    proxy.refuse()
                    proxy.reset()
                case _:
                    proxy.drop("down")
            await asyncio.gather(*(attempt(producer, size=500, timeout=0.7) for _ in range(12)))
    await works_again(trial, producer)
    await trial.drain(group)


@case(
    "net.order-pipelined",
    rules=("PUB-4", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "broken", "delivered"),
    limit=90.0,
)
async def order_pipelined(trial: Trial) -> None:
    """The order of one key holds for messages under way at once, also when their connection is reset in between."""
    line, group, producer = await publishing(trial)
    for number in range(300):
        if number in (100, 200):
            with line.harm(producer, "reset") as proxy:
                proxy.reset()
        await producer.submit(key=b"k")
    await trial.within(2 * trial.pace.patience, producer.watched(), "PUB-5", "all outcomes")
    # Nothing is promised across an unknown outcome, but what was confirmed between two of them is in order.
    pieces = {event.msg or "" for event in trial.recorder.events if (event.op, event.phase) == ("publish", "ok")}
    member = await trial.member(group)
    seen: dict[str, int] = {}
    while len(seen.keys() & pieces) < len(pieces):
        lent = await trial.next(member, "PUB-1")
        seen.setdefault(lent.msg or "", len(seen))
        await lent.ack()
    doubtful = sorted(
        _number(event.msg) for event in trial.recorder.events if event.op == "publish" and event.phase == "info"
    )
    places = sorted((_number(name), place) for name, place in seen.items() if name in pieces)
    for (first, before), (second, after) in pairwise(places):
        if not any(first < number < second for number in doubtful):
            trial.that(before < after, "PUB-4", f"message {first} before message {second}", "they came the other way")


def _number(msg: str | None) -> int:
    return int((msg or "x.0").rpartition(".")[2])
