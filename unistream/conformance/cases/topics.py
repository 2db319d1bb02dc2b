"""Cases `top.*`: creating, finding and deleting topics."""

from __future__ import annotations

from unistream.conformance.registry import Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import ConfigError, GroupMissingError, TopicConflictError, TopicMissingError, UnistreamError


@case("top.create-idempotent", rules=("GRP-7",), tier=Tier.SMOKE)
async def create_idempotent(trial: Trial) -> None:
    """Creating a topic that exists with the same settings succeeds."""
    topic = await trial.topic(partitions=2)
    await trial.works(trial.client.create_topic(topic, partitions=2), "GRP-7", "creating it again")
    names = [spec.name for spec in await trial.client.topics()]
    trial.equal(names.count(topic), 1, "GRP-7", "topics of that name")


@case("top.create-conflict", rules=("GRP-7",))
async def create_conflict(trial: Trial) -> None:
    """Creating a topic that exists with other settings raises TopicConflictError and keeps the old ones."""
    topic = await trial.topic(partitions=2)
    await trial.raises(TopicConflictError, trial.client.create_topic(topic, partitions=5), "GRP-7")
    [spec] = [spec for spec in await trial.client.topics() if spec.name == topic]
    trial.equal(spec.partitions, 2, "GRP-7", "partitions")


@case("top.delete-recreate", rules=("GRP-7",), sometimes=("delivered",))
async def delete_recreate(trial: Trial) -> None:
    """A topic that was deleted and created again is empty, and its groups are gone."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    for _ in range(3):
        await producer.publish()
    await trial.client.delete_topic(topic)
    await trial.client.delete_topic(topic)
    trial.that(
        topic not in [spec.name for spec in await trial.client.topics()], "GRP-7", "no such topic", "it is there"
    )
    await trial.client.create_topic(topic)
    trial.equal([spec.name for spec in await trial.client.groups(topic)], [], "GRP-7", "groups of the new topic")
    await group.create()
    fresh = await trial.producer(topic)
    name, _ = await fresh.publish()
    member = await trial.member(group)
    lent = await trial.next(member)
    trial.equal(lent.msg, name, "GRP-7", "first delivery of the new topic")
    await lent.ack()


@case("top.unknown", rules=("PUB-8",), tier=Tier.SMOKE)
async def unknown(trial: Trial) -> None:
    """Publishing to a topic that does not exist, and joining a group on it, raise TopicMissingError."""
    missing = f"us-{trial.run}-missing"

    async def publish() -> None:
        async with trial.client.producer(missing) as producer:
            await producer.publish(b"x", timeout=5.0)

    await trial.raises(TopicMissingError, publish(), "PUB-8")
    await trial.raises(TopicMissingError, trial.client.group("g", missing).create(), "GRP-7")
    there = [spec.name for spec in await trial.client.topics()]
    trial.that(missing not in there, "PUB-8", "nothing created on the way", "the topic exists now")


@case("top.deleted-under-member", rules=("GRP-7",))
async def deleted_under_member(trial: Trial) -> None:
    """Members of a deleted topic are told so within `dead_peer_after`, and the client says that it is not healthy."""
    topic = await trial.topic()
    group = await trial.group(topic)
    member = await trial.member(group)
    await trial.client.delete_topic(topic)
    limit = trial.claims.lease.dead_peer_after + trial.pace.patience
    error = await trial.raises(UnistreamError, _forever(member), "GRP-7", within=limit)
    trial.that(
        isinstance(error, TopicMissingError | GroupMissingError),
        "GRP-7",
        "TopicMissingError or GroupMissingError",
        error,
    )
    health = await trial.client.health()
    trial.that(not health.ok, "END-3", "a client that says it is not healthy", health)


async def _forever(member) -> None:  # type: ignore[no-untyped-def]
    while True:
        await member.consumer.receive(1.0)


@case("top.group-deleted-under-member", rules=("GRP-7",))
async def group_deleted_under_member(trial: Trial) -> None:
    """Members of a deleted group are told so, and deleting it twice succeeds."""
    topic = await trial.topic()
    group = await trial.group(topic)
    member = await trial.member(group)
    await group.delete()
    await group.delete()
    limit = trial.claims.lease.dead_peer_after + trial.pace.patience
    error = await trial.raises(UnistreamError, _forever(member), "GRP-7", within=limit)
    trial.that(isinstance(error, GroupMissingError | TopicMissingError), "GRP-7", "GroupMissingError", error)


@case("top.names", rules=("END-6",), tier=Tier.SMOKE)
async def names(trial: Trial) -> None:
    """Names of letters, digits, `.`, `_` and `-` up to 200 characters work; others are refused before any I/O."""
    for bad in ("", "a b", "a*", "a>", "a/b", "\u00fc", "x" * 201):
        await trial.raises(ConfigError, trial.client.create_topic(bad), "END-6")
    prefix = f"us-{trial.run}-"
    good = [prefix + "A.b_c-9", prefix + "x" * (200 - len(prefix))]
    try:
        for name in good:
            await trial.client.create_topic(name)
        there = {spec.name for spec in await trial.client.topics()}
        trial.that(set(good) <= there, "END-6", "both topics listed under their names", sorted(there))
    finally:
        for name in good:
            await trial.client.delete_topic(name)


@case("top.no-crosstalk", rules=("GRP-1",), sometimes=("delivered",))
async def no_crosstalk(trial: Trial) -> None:
    """Topics whose names look alike have nothing in common."""
    base = await trial.topic()
    twins = [base + ending for ending in (".a", "-a", "_a", ".A", "..a")]
    try:
        for topic in twins:
            await trial.client.create_topic(topic)
        groups = [await trial.group(topic, "g") for topic in twins]
        names = []
        for topic in twins:
            producer = await trial.producer(topic)
            names.append((await producer.publish())[0])
        for group, name in zip(groups, names, strict=True):
            member = await trial.member(group)
            lent = await trial.next(member)
            trial.equal(lent.msg, name, "GRP-1", f"delivery from {group.topic}")
            await lent.ack()
            trial.that(await member.receive(0.1) is None, "GRP-1", "one message alone", "another topic's message")
    finally:
        for topic in twins:
            await trial.client.delete_topic(topic)
