"""Saboteurs of topics, groups and claims: starts, names, lag, and saying what is not so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import ClassVar

from unistream.capabilities import Capabilities, Fencing, Level, NackDelay, Seek
from unistream.conformance.saboteurs.table import saboteur
from unistream.conformance.wrap import DriverLayer, ProducerLayer, resolve
from unistream.driver.contract import ConsumerDriver, ProducerDriver
from unistream.driver.types import GroupSpec, Lag, PublishOutcome, RawMessage, Receipt, StartAt, Token, TopicSpec
from unistream.errors import GroupMissingError, TopicConflictError, TopicMissingError


@saboteur("group-starts-at-join", "GRP-1", "GRP-3")
class GroupStartsAtJoin(DriverLayer):
    """Says that it created the group, and creates it when the first member joins."""

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Answer without acting."""
        return spec

    async def lag(self, topic: str, group: str) -> Lag:
        """Tell of no lag where there is no group yet."""
        try:
            return await self.inner.lag(topic, group)
        except GroupMissingError:
            return Lag(0, True)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """Create the group now."""
        if not group.ephemeral:
            await self.inner.create_group(group)
        return await super().consumer(group, topic, max_in_flight=max_in_flight, lost=lost)


@saboteur("latest-always", "GRP-3")
class LatestAlways(DriverLayer):
    """Starts every group at the end."""

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Ignore the start."""
        await self.inner.create_group(replace(spec, start="latest"))
        return spec


@saboteur("earliest-always", "GRP-3")
class EarliestAlways(DriverLayer):
    """Starts every group at the beginning."""

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Ignore the start."""
        await self.inner.create_group(replace(spec, start="earliest"))
        return spec


@saboteur("starts-over", "GRP-3", "GRP-6", by=("rep.second-start",))
class StartsOver(DriverLayer):
    """Begins at the beginning whenever a program that asks for the earliest is started."""

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Go back, also where the group exists."""
        made = await self.inner.create_group(spec)
        if spec.start == "earliest":
            await self.inner.seek(spec.topic, spec.name, "earliest")
        return made


@saboteur("seek-ignored", "GRP-1", "GRP-3")
class SeekIgnored(DriverLayer):
    """Says that it moved the group, and leaves it where it was."""

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """Answer without acting."""


@saboteur("lag-zero", "GRP-1")
class LagZero(DriverLayer):
    """Tells of no lag, ever."""

    async def lag(self, topic: str, group: str) -> Lag:
        """Ask whether the group exists, and invent the rest."""
        await self.inner.lag(topic, group)
        return Lag(0, True)


@saboteur("group-name-global", "GRP-1")
class GroupNameGlobal(DriverLayer):
    """Takes groups of one name on two topics for one group, of the topic that had it first."""

    _topics: ClassVar[dict[str, str]] = {}

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Create the group on the topic where the name came first."""
        first = self._topics.setdefault(spec.name, spec.topic)
        await self.inner.create_group(replace(spec, topic=first))
        return spec

    async def lag(self, topic: str, group: str) -> Lag:
        """Ask about the group of that name."""
        return await self.inner.lag(self._topics.get(group, topic), group)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """Join the group of that name."""
        first = self._topics.setdefault(group.name, group.topic)
        there = await self.inner.topic(first)
        return await super().consumer(replace(group, topic=first), there, max_in_flight=max_in_flight, lost=lost)

    async def delete_topic(self, name: str) -> None:
        """Forget the names with their topic."""
        for group, topic in list(self._topics.items()):
            if topic == name:
                del self._topics[group]
        await self.inner.delete_topic(name)


@saboteur("create-twice-fails", "GRP-7")
class CreateTwiceFails(DriverLayer):
    """Refuses to create what exists."""

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Refuse the second time."""
        try:
            await self.inner.topic(spec.name)
        except TopicMissingError:
            return await self.inner.create_topic(spec)
        raise TopicConflictError("it exists", topic=spec.name)


@saboteur("create-hides-conflict", "GRP-7")
class CreateHidesConflict(DriverLayer):
    """Agrees to every setting of a topic that exists with others."""

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Answer with what was asked for."""
        await self.inner.create_topic(spec)
        return spec


@saboteur("delete-keeps-data", "GRP-7")
class DeleteKeepsData(DriverLayer):
    """Says that it deleted the topic, and keeps it."""

    async def delete_topic(self, name: str) -> None:
        """Answer without acting."""


@saboteur("unknown-auto-creates", "PUB-8")
class UnknownAutoCreates(DriverLayer):
    """Creates topics that are asked for and do not exist."""

    async def topic(self, name: str) -> TopicSpec:
        """Create what is missing."""
        try:
            return await self.inner.topic(name)
        except TopicMissingError:
            return await self.inner.create_topic(TopicSpec(name))


@saboteur("topic-alias", "GRP-1")
class TopicAlias(DriverLayer):
    """Takes `a.b` and `a-b` for one topic."""

    def _alias(self, name: str) -> str:
        return name.replace(".", "-")

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Create under the alias."""
        return replace(await self.inner.create_topic(replace(spec, name=self._alias(spec.name))), name=spec.name)

    async def topic(self, name: str) -> TopicSpec:
        """Look under the alias, and keep it, so that all that follows goes there."""
        return await self.inner.topic(self._alias(name))

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Create on the alias."""
        made = await self.inner.create_group(replace(spec, topic=self._alias(spec.topic)))
        return replace(made, topic=spec.topic)

    async def delete_topic(self, name: str) -> None:
        """Delete the alias."""
        await self.inner.delete_topic(self._alias(name))

    async def topics(self) -> Sequence[TopicSpec]:
        """Delegate."""
        return await self.inner.topics()

    async def lag(self, topic: str, group: str) -> Lag:
        """Ask the alias."""
        return await self.inner.lag(self._alias(topic), group)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """Join on the alias."""
        alias = replace(group, topic=self._alias(group.topic))
        return await super().consumer(alias, topic, max_in_flight=max_in_flight, lost=lost)


@saboteur("nameless", "CAP-3")
class Nameless(DriverLayer):
    """Does not say what broker it speaks to."""

    def claims(self, capabilities: Capabilities) -> Capabilities:
        """Forget the product."""
        return replace(capabilities, product="")


@saboteur("unroutable-fails", "PUB-8")
class UnroutableFails(DriverLayer):
    """Refuses to publish to a topic that has no group."""

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """Refuse to open one."""
        if not await self.inner.groups(topic.name):
            raise TopicMissingError("nobody would receive it", topic=topic.name)
        return await super().producer(topic)


class _IntoNothing(ProducerLayer):
    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Take a missing topic for a good one."""
        try:
            outcomes = await resolve(self.inner.publish(batch, timeout))
        except TopicMissingError:
            return [Receipt(message.id) for message in batch]
        return [
            Receipt(message.id) if isinstance(outcome, TopicMissingError) else outcome
            for message, outcome in zip(batch, outcomes, strict=True)
        ]


@saboteur("letters-into-nothing", "DEL-3", "PUB-8", by=("dlq.target-broken",))
class LettersIntoNothing(DriverLayer):
    """Confirms what was published to a topic that is gone."""

    producer_layer = _IntoNothing


@saboteur("under-claims", "CAP-1")
class UnderClaims(DriverLayer):
    """Claims less than it does: no fencing, no seek, no delay."""

    def claims(self, capabilities: Capabilities) -> Capabilities:
        """Withdraw some claims."""
        return replace(
            capabilities,
            fencing=Fencing(level=Level.NONE),
            seek=Seek(level=Level.NONE),
            nack_delay=NackDelay(level=Level.NONE),
        )
