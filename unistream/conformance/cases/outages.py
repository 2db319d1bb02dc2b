"""Cases of producers while their broker can't be reached, and of dead letters that have nowhere to go."""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc

from unistream.conformance.cases.leaks import MIB
from unistream.conformance.registry import Tier, case
from unistream.conformance.trial import Trial
from unistream.conformance.wires import CARRIED, wire
from unistream.errors import UnistreamError, WindowFullError

WIRE = ("socket",)
ROOM = 5
OFFERED = 30


async def _offer(trial: Trial, when_full: str) -> int:
    """Offer thirty messages to a window of five on a wire that holds everything; return how many were turned away."""
    topic = await trial.topic()
    group = await trial.group(topic)
    line = await wire(trial)
    producer = await line.producer(topic, max_unconfirmed=ROOM, when_full=when_full)
    await producer.publish()
    with line.harm(producer, "held") as proxy:
        proxy.hold()
        tasks = [asyncio.create_task(producer.submit(timeout=trial.pace.patience)) for _ in range(OFFERED)]
        await asyncio.wait(tasks, timeout=trial.pace.silence)
        taken = sum(task.done() and task.exception() is None for task in tasks)
        if when_full in ("block", "fail"):
            trial.equal(taken, ROOM, "PUB-5", "messages taken while nothing passes")
    _, late = await asyncio.wait(tasks, timeout=4 * trial.pace.patience)
    trial.equal(len(late), 0, "PUB-5", "callers without an answer once the wire is whole")
    await trial.within(4 * trial.pace.patience, producer.watched(), "PUB-5", "all outcomes")
    stats = producer.producer.stats
    total = stats.confirmed + stats.failed + stats.unknown + stats.dropped + stats.in_flight
    trial.equal(total, 1 + OFFERED, "PUB-5", "confirmed + failed + unknown + dropped + in flight")
    await trial.within(2 * trial.pace.patience, _confirmed(producer), "END-3", "a receipt once the wire is whole")
    # Whoever was turned away was told that nothing is stored, and the checkers see to it that nothing is.
    await trial.drain(group)
    return sum((event.op, event.phase) == ("publish", "fail") for event in trial.recorder.events)


async def _confirmed(producer: object) -> None:
    while True:
        try:
            await producer.publish(timeout=5.0)  # type: ignore[attr-defined]
        except UnistreamError:
            await asyncio.sleep(0.05)
        else:
            return


def _outage(name: str, when_full: str, sentence: str) -> None:
    async def outage(trial: Trial) -> None:
        away = await _offer(trial, when_full)
        wanted = 0 if when_full == "block" else OFFERED - 2 * ROOM
        trial.that(away >= wanted, "PUB-5", f"at least {wanted} turned away", away)
        trial.that(away <= OFFERED - ROOM, "PUB-5", f"at most {OFFERED - ROOM} turned away", away)
        if when_full == "block":
            trial.equal(away, 0, "PUB-5", "messages turned away while callers have time to wait")

    outage.__doc__ = sentence
    enter = case(
        name,
        rules=("PUB-5", "PUB-2", "END-3"),
        tier=Tier.FAULTS,
        facilities=WIRE,
        sometimes=(*CARRIED, "harm", "confirmed", "drained"),
        limit=120.0,
    )
    enter(outage)


_outage("bpp.outage-block", "block", "While the broker can't be reached callers wait for room; afterwards all go on.")
_outage("bpp.outage-fail", "fail", "While the broker can't be reached a full window turns callers away at once.")
_outage("bpp.outage-drop-newest", "drop_newest", "While the broker can't be reached the newest are told to be dropped.")
_outage(
    "bpp.outage-drop-oldest", "drop_oldest", "While the broker can't be reached the oldest are dropped, and told so."
)


@case("bpp.memory-bounded", rules=("PUB-5",), alone=True, sometimes=("refused", "faults"), limit=120.0)
async def memory_bounded(trial: Trial) -> None:
    """A producer that offers far more than its window while its broker is away grows by its window, and no more."""
    topic = await trial.topic()
    client, line = await trial.mortal()
    room, body = 4 * MIB, 10_000
    async with client.producer(
        topic, max_unconfirmed=1 << 20, max_unconfirmed_bytes=room, when_full="fail"
    ) as producer:
        await producer.publish(b"x")
        since = trial.recorder.now()
        line.interrupt()
        gc.collect()
        tracemalloc.start()
        try:
            confirmations = []
            for number in range(4_000):
                try:
                    confirmations.append(await producer.submit(os.urandom(body), timeout=trial.pace.silence))
                except WindowFullError:
                    trial.tally("refused")
                if number % 100 == 0:
                    await asyncio.sleep(0)
            gc.collect()  # what nobody holds any more is not what the producer grows by
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            line.restore()
        trial.recorder.record("fault", since=since, note="connection interrupted")
        trial.that(grown < 3 * room, "PUB-5", f"less than {3 * room / MIB:.0f} MiB of growth", f"{grown / MIB:.1f} MiB")
        await asyncio.gather(*confirmations, return_exceptions=True)


@case("dlq.target-broken", rules=("DEL-3",), sometimes=("refused", "delivered"), limit=120.0)
async def target_broken(trial: Trial) -> None:
    """While the dead letter topic is gone a reject raises and the message stays; later the letter arrives after all."""
    topic, dead = await trial.topic(), await trial.topic()
    group = await trial.group(topic, dead_letter=dead)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    name, _ = await producer.publish()
    lent = await trial.next(member)
    await trial.client.delete_topic(dead)
    try:
        await lent.reject()
    except UnistreamError:
        trial.tally("refused")
    else:
        trial.that(False, "DEL-3", "an error while the letter can't be stored", "it was said to be done")
    await trial.client.create_topic(dead)
    graves = await trial.member(await trial.group(dead, "graves"))
    if lent.delivery.state == "lent":
        await lent.nack(0.0)
    again = await trial.next(member, "DEL-3", timeout=2 * trial.recovery + trial.pace.patience)
    trial.equal(again.msg, name, "DEL-3", "message that could not be moved aside")
    await again.reject()
    letter = await trial.next(graves, "DEL-3")
    trial.equal(letter.msg, name, "DEL-3", "the dead letter")
    await letter.ack()
