"""Cases `rep.*`: where a group starts, and moving it."""

from __future__ import annotations

from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial


@case("rep.earliest", rules=("GRP-3",), level=GATED(start="earliest"), tier=Tier.SMOKE, sometimes=("drained",))
async def earliest(trial: Trial) -> None:
    """A group that starts at the earliest message receives what was published before it."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    for _ in range(30):
        await producer.publish()
    group = await trial.group(topic, start="earliest")
    await trial.drain(group)
    got = sum(event.op == "deliver" for event in trial.recorder.events)
    trial.equal(got, 30, "GRP-3", "deliveries from the earliest")


@case("rep.second-start", rules=("GRP-3", "GRP-6"), level=GATED(start="earliest"), sometimes=("acked", "left"))
async def second_start(trial: Trial) -> None:
    """A program that asks for the earliest and is started again gets what is new, and nothing that it has settled."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(5)]
    group = await trial.group(topic, start="earliest")
    for life in range(3):
        again = trial.regroup(await trial.open(), group)
        await again.create()
        member = await trial.member(again)
        lents = await trial.take(member, len(names), "GRP-3")
        trial.equal(sorted(str(lent.msg) for lent in lents), sorted(names), "GRP-6", f"deliveries in life {life + 1}")
        for lent in lents:
            await lent.ack()
        await member.leave()
        names = [(await producer.publish())[0] for _ in range(3)]


@case("rep.latest", rules=("GRP-3",), tier=Tier.SMOKE, sometimes=("delivered",))
async def latest(trial: Trial) -> None:
    """A group that starts at the latest receives nothing from before its creation."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    for _ in range(10):
        await producer.publish()
    group = await trial.group(topic, start="latest")
    name, _ = await producer.publish()
    member = await trial.member(group)
    lent = await trial.next(member)
    trial.equal(lent.msg, name, "GRP-3", "first delivery")
    await lent.ack()


@case("rep.from-position", rules=("GRP-3",), level=GATED(start="position"), sometimes=("delivered",))
async def from_position(trial: Trial) -> None:
    """A group that starts at a position receives that message first."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    published = [await producer.publish() for _ in range(10)]
    group = await trial.group(topic, start=published[4][1].position or "1")
    member = await trial.member(group)
    for name, _ in published[4:]:
        lent = await trial.next(member)
        trial.equal(lent.msg, name, "GRP-3", "delivery from the position on")
        await lent.ack()


@case("rep.from-time", rules=("GRP-3",), level=GATED(start="time"), sometimes=("delivered",))
async def from_time(trial: Trial) -> None:
    """A group that starts at a time receives the first message published then or later."""
    topic = await trial.topic()
    early = await trial.group(topic)
    producer = await trial.producer(topic)
    await producer.publish()
    first = await trial.next(await trial.member(early))
    await first.ack()
    moment = first.delivery.published_at
    trial.that(moment is not None, "GRP-3", "a time of publishing", moment)
    assert moment is not None
    group = await trial.group(topic, start=moment)
    lent = await trial.next(await trial.member(group))
    trial.equal(lent.msg, first.msg, "GRP-3", "first delivery from its own time on")
    await lent.ack()


@case("rep.seek-back", rules=("GRP-1",), level=GATED(seek=True), sometimes=("acked",))
async def seek_back(trial: Trial) -> None:
    """After a seek the next delivery is the message sought, also when it was settled; other groups are unmoved."""
    topic = await trial.topic()
    group, other = await trial.group(topic), await trial.group(topic)
    producer = await trial.producer(topic)
    published = [await producer.publish() for _ in range(10)]
    for each in (group, other):
        member = await trial.member(each)
        for lent in await trial.take(member, 10):
            await lent.ack()
        await member.leave()
    call = trial.recorder.invoke("seek", topic=topic, group=group.name)
    await group.seek(published[3][1].position or "1")
    call.ok()
    member = await trial.member(group)
    for name, _ in published[3:]:
        lent = await trial.next(member)
        trial.equal(lent.msg, name, "GRP-1", "delivery after the seek")
        await lent.ack()
    await trial.silent(await trial.member(other), "GRP-1")


@case("rep.seek-ends", rules=("GRP-1",), level=GATED(seek=True), sometimes=("delivered",))
async def seek_ends(trial: Trial) -> None:
    """Seeking to the latest skips what is there, to the earliest brings it back."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(5)]
    call = trial.recorder.invoke("seek", topic=topic, group=group.name)
    await group.seek("latest")
    call.ok()
    member = await trial.member(group)
    await trial.silent(member, "GRP-1")
    await member.leave()
    call = trial.recorder.invoke("seek", topic=topic, group=group.name)
    await group.seek("earliest")
    call.ok()
    member = await trial.member(group)
    got = []
    for _ in names:
        lent = await trial.next(member)
        got.append(lent.msg)
        await lent.ack()
    trial.equal(got, names, "GRP-1", "deliveries after seeking to the earliest")


@case("rep.resume-settled", rules=("GRP-6",), tier=Tier.SMOKE, sometimes=("acked", "left"))
async def resume_settled(trial: Trial) -> None:
    """A group goes on at its first unsettled message after all members were gone, through another client."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(10)]
    member = await trial.member(group)
    for lent in (await trial.take(member, 10))[:6]:
        await lent.ack()
    await member.leave()
    fresh = await trial.member(trial.regroup(await trial.open(), group))
    got = []
    for _ in range(4):
        lent = await trial.next(fresh)
        got.append(lent.msg)
        await lent.ack()
    trial.equal(sorted(map(str, got)), sorted(names[6:]), "GRP-6", "deliveries after the return")
