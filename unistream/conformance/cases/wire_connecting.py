"""Cases of connecting over a bad wire: errors in time that say why, and patience with a broker that is not there."""

from __future__ import annotations

import asyncio

from unistream.conformance.cases.wire_publishing import WIRE, attempt
from unistream.conformance.registry import Tier, case
from unistream.conformance.trial import Trial
from unistream.conformance.wires import CARRIED, over, unwired, wire
from unistream.errors import BrokerUnavailableError, PublishError


@case(
    "net.connect-blackhole",
    rules=("END-2", "END-3"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=("harm", "raised"),
)
async def connect_blackhole(trial: Trial) -> None:
    """A broker that takes the connection and says nothing is an error after `connect_timeout`."""
    line = await unwired(trial)
    line.proxy.hold()
    url = trial.target.url
    target = over(trial, line.proxy, f"{url}{'&' if '?' in url else '?'}connect_timeout=1")
    loop = asyncio.get_running_loop()
    began = loop.time()
    await trial.raises(BrokerUnavailableError, target.connect().__aenter__(), "END-2")
    took = loop.time() - began
    trial.tally("raised")
    trial.that(bool(line.proxy.connections), "END-2", "a connection through the wire", "none came")
    trial.that(took <= 2.5 + trial.pace.slack, "END-2", "an error after 1 s", f"{took:.1f} s")
    line.prove()


@case(
    "net.start-before-broker",
    rules=("END-3", "END-5"),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "raised", "confirmed"),
)
async def start_before_broker(trial: Trial) -> None:
    """Connecting while nobody listens is an error at once that names the place; later the same program works."""
    topic = await trial.topic()
    line = await unwired(trial)
    line.proxy.refuse()
    target = over(trial, line.proxy)
    error = await trial.raises(BrokerUnavailableError, target.connect().__aenter__(), "END-3")
    trial.tally("raised")
    trial.that(error.__cause__ is not None, "END-5", "the client's own error as the cause", error)
    line.proxy.heal()
    line.client = await trial.keep(target.connect())
    await (await line.producer(topic)).publish()
    line.prove()


@case(
    "net.reconnect-backoff",
    rules=("END-3",),
    tier=Tier.FAULTS,
    facilities=WIRE,
    sometimes=(*CARRIED, "slammed", "confirmed", "delivered"),
    limit=90.0,
)
async def reconnect_backoff(trial: Trial) -> None:
    """Whoever is turned away knocks again ever more rarely, and is back by itself when the door opens."""
    topic = await trial.topic()
    group = await trial.group(topic)
    line = await wire(trial)
    producer = await line.producer(topic)
    member = await line.member(group)
    await producer.publish()
    await (await trial.next(member)).ack()
    with line.harm(member, "turned away") as proxy:
        since = trial.recorder.now()
        proxy.slam()
        publishing = asyncio.create_task(attempt(producer, timeout=60.0))
        await trial.silent(member, "END-3", seconds=4.0)
        tries = len(proxy.tries)
        trial.recorder.record("fault", member=producer.name, since=since, note="connection turned away")
    trial.that(tries <= 60, "END-3", "at most 60 tries in 4 s, of all connections together", tries)
    outcome = await trial.within(trial.pace.patience, publishing, "END-3", "the outcome of a publish")
    if isinstance(outcome, PublishError):
        await trial.within(trial.pace.patience, producer.publish(), "END-3", "publishing again")
    lent = await trial.next(member, "END-3", timeout=2 * trial.pace.patience)
    await lent.ack()
