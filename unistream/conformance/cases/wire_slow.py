"""Cases of slow ends: a wire that carries little, and a consumer that reads so slowly that its broker gives it up."""

from __future__ import annotations

import asyncio

from unistream.conformance.cases.wire_consuming import WIRE, come, noticed
from unistream.conformance.cases.wire_publishing import attempt, works_again
from unistream.conformance.proxy import Proxy
from unistream.conformance.registry import SHOULD, Tier, case
from unistream.conformance.trial import Trial
from unistream.conformance.wires import CARRIED, wire

RATE = 64 * 1024
STALL_SECONDS = 15.0
"""How long a consumer takes nothing off its wire: NATS gives up after ten seconds."""
BACKLOG_BYTES = 24 * 1024 * 1024
"""More than the buffers between a broker and a consumer hold."""


@case(
    "net.thin-pipe",
    rules=("END-3", "PUB-1", "PUB-2", "GRP-1"),
    level=SHOULD,
    tier=Tier.LONG,
    facilities=WIRE,
    sometimes=(*CARRIED, "harm", "confirmed", "acked", "drained"),
    limit=300.0,
)
async def thin_pipe(trial: Trial) -> None:
    """On a wire of 64 kB/s a large message arrives at once, and of one too large for it the truth is told."""
    quiet = trial.claims.lease.dead_peer_after
    largest = min(trial.claims.max_message_bytes.limit // 2, 2 * 1024 * 1024)
    takes = min(0.5 * quiet, largest / RATE)
    topic = await trial.topic()
    # The lease runs from the time of the request (DEL-6), so it must leave room for the journey.
    group = await trial.group(topic, lease=trial.lease + 4 * quiet)
    line = await wire(trial)
    producer = await line.producer(topic)
    member = await line.member(group)
    await producer.publish()
    await (await trial.next(member)).ack()
    with line.harm(member, "thin") as proxy:
        proxy.thin(RATE)
        limit = 2 * takes + trial.pace.patience
        large = producer.publish(size=int(takes * RATE), timeout=limit)
        name, _ = await trial.works(large, "END-3", f"a receipt within {limit:.0f} s")
        lent = await trial.next(member, "END-3", timeout=limit)
        trial.equal((lent.msg, lent.delivery.attempt), (name, 1), "END-3", "the large message, at its first attempt,")
        await lent.ack(confirm=bool(trial.claims.ack_confirm))
        # An answer that takes longer than silence may last can't be told from a dead peer.
        since = trial.recorder.now()
        await attempt(producer, size=int(min(1.5 * quiet * RATE, largest)), timeout=2 * quiet)
        trial.recorder.record("fault", member=producer.name, since=since, note="connection thin")
    await works_again(trial, producer)
    await member.leave()
    await trial.drain(group)


@case(
    "ovl.slow-consumer-cutoff",
    rules=("END-3", "GRP-1", "GRP-4"),
    tier=Tier.LONG,
    facilities=WIRE,
    sometimes=(*CARRIED, "cut", "delivered", "drained"),
    limit=300.0,
)
async def slow_consumer_cutoff(trial: Trial) -> None:
    """A consumer that read too slowly, and was cut off by its broker, comes back by itself and gets everything."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    line = await wire(trial)
    size = int(min(trial.claims.max_message_bytes.limit // 2, 64 * 1024))
    member = await line.member(group, max_in_flight=1000)
    await producer.publish()
    await (await trial.next(member)).ack()
    with line.harm(member, "cut off for reading slowly") as proxy:
        proxy.hold("down")
        stalled = asyncio.create_task(member.receive(STALL_SECONDS))
        names = {(await producer.publish(size=size))[0] for _ in range(BACKLOG_BYTES // size)}
        lent = await stalled
        if lent is not None:
            await lent.ack()
            names.discard(lent.msg or "")
        proxy.heal()
        trial.tally("cut", await _cut_off(proxy, trial.pace.silence))
        # The fault lasts until it was felt: until then the client lends what it had read before.
        await line.client.health()
    await come(trial, member, names, seconds=noticed(trial) + trial.pace.patience, rule="END-3")
    health = await line.client.health()
    trial.that(health.ok, "END-3", "a healthy client afterwards", health)
    await member.leave()
    await trial.drain(group)


async def _cut_off(proxy: Proxy, seconds: float) -> int:
    """Return how many connections the broker ended. One that has more patience ended none; then this wire does."""

    def ended() -> int:
        return sum(each.ended == "broker" for each in proxy.connections)

    try:
        async with asyncio.timeout(seconds):
            await proxy.moved.until(lambda: ended() > 0)
    except TimeoutError:
        return proxy.reset()
    return ended()
