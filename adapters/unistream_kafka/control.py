"""What needs no member and no producer: topics, offsets, groups and their claims. Blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from kafka import KafkaConsumer, TopicPartition
from kafka.admin import (
    ConfigResource,
    ConfigResourceType,
    KafkaAdminClient,
    MemberToRemove,
    OffsetSpec,
    OffsetTimestamp,
)
from kafka.errors import (
    InvalidTopicError,
    KafkaError,
    NoError,
    NotControllerError,
    NotCoordinatorError,
    TopicAlreadyExistsError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    for_code,
)
from kafka.structs import OffsetAndMetadata

from unistream.driver.types import GroupSpec, Lag, Member, StartAt, TopicSpec
from unistream.errors import ConfigError, GroupMissingError, TopicMissingError, UnsupportedError
from unistream_kafka.client import Place, connect
from unistream_kafka.progress import settled_beyond
from unistream_kafka.registry import Claim, Registry, group_id
from unistream_kafka.topics import SUBSTITUTE, Standing, configs_of, place_in, standing_of, substitute

__all__ = ["Control"]

T = TypeVar("T")

_END_SECONDS = 5.0
_LOOK_SECONDS = 0.01


class Control:
    """An admin client, opened when needed and again after it failed; `replication` copies (-1: the default)."""

    def __init__(self, place: Place, replication: int) -> None:
        self._place = place
        self._replication = replication
        self._client: KafkaAdminClient | None = None
        self._registry = Registry(place, self.admin)

    def admin(self) -> KafkaAdminClient:
        """The admin client; one attempt to open it if there is none."""
        if self._client is None:
            self._client = connect(KafkaAdminClient, self._place)
        return self._client

    def run(self, work: Callable[[Control], T]) -> T:
        """Do some work; after a failure of Kafka's or the network's the next call connects anew."""
        try:
            return work(self)
        except (NotCoordinatorError, NotControllerError):
            # The client keeps addresses of coordinators for good; a new one asks.
            self.close()
            return work(self)
        except (KafkaError, OSError, RuntimeError):
            self.close()
            raise

    def close(self) -> None:
        """Close every connection."""
        client, self._client = self._client, None
        try:
            self._registry.close()
        finally:
            if client is not None:
                client.close()

    # Topics

    def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Create a topic unless it exists; as it now stands."""
        if self._find(spec.name) is None:
            self._make(spec)
        return self.topic(spec.name, spec).spec

    def _make(self, spec: TopicSpec) -> None:
        wanted = {
            "num_partitions": spec.partitions,
            "replication_factor": self._replication,
            "configs": configs_of(spec),
        }
        for stored in (spec.name, substitute(spec.name)):
            try:
                made = self.admin().create_topics({stored: wanted}, wait_for_metadata=True)
            except TopicAlreadyExistsError:
                self.admin().wait_for_topics([stored])
                return
            except InvalidTopicError:
                if stored != spec.name:
                    raise
                continue
            self._registry.declare(spec.name, str(made["topics"][0]["topic_id"]), spec.ordering)
            return

    def delete_topic(self, name: str) -> None:
        """Delete a topic, the claims of its groups, and the groups without members."""
        admin = self.admin()
        ids = [group_id(name, claim.spec.name) for claim in self._claims_of(name)]
        told = self._find(name)
        self._registry.remove(name)
        if told is None:
            return
        try:
            admin.delete_topics([told["name"]])
        except UnknownTopicOrPartitionError:
            return
        self._await_end(told["name"])
        if ids:
            # Members of it notice by themselves that the topic is gone; an id without members is forgotten here.
            admin.delete_groups(ids)

    def _await_end(self, stored: str) -> None:
        """
        Wait until a deleted topic takes no messages any more, for a bounded time.

        (Kafka 4.4 answers when the controller has decided; until the broker has read that, it confirms what comes.)
        """
        until = time.monotonic() + _END_SECONDS
        while self._describe([stored]) and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)

    def _claims_of(self, name: str) -> list[Claim]:
        try:
            return self._registry.groups(name, self.topic(name).topic_id)
        except TopicMissingError:
            return []

    def topic(self, name: str, like: TopicSpec | None = None) -> Standing:
        """A topic as it stands; of what Kafka can't tell as in `like`."""
        told = self._find(name)
        standing = [] if told is None else self._standing([told], like)
        if not standing:
            raise TopicMissingError(f"there is no topic {name!r}", driver="kafka", topic=name)
        [found] = standing
        return found if found.spec.name == name else replace(found, spec=replace(found.spec, name=name))

    def topics(self) -> list[TopicSpec]:
        """All topics but Kafka's and our own internal ones, by name."""
        names = [
            name for name in self.admin().list_topics() if not name.startswith("__") or name.startswith(SUBSTITUTE)
        ]
        specs = [standing.spec for standing in self._standing(self._describe(names))] if names else []
        return sorted(specs, key=lambda spec: spec.name)

    def _find(self, name: str) -> Mapping[str, Any] | None:
        """What Kafka says of a topic, under its own name or its substitute; `None`: there is none."""
        plain = "." not in name and "_" not in name
        told = {each["name"]: each for each in self._describe([name] if plain else [name, substitute(name)])}
        return told.get(name) or told.get(substitute(name))

    def _describe(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """What Kafka says of those topics that are there."""
        found = []
        for each in self.admin().describe_topics(list(names)):
            kind = for_code(each["error_code"])
            if kind is NoError:
                found.append(each)
            elif not issubclass(kind, UnknownTopicOrPartitionError | InvalidTopicError):
                raise kind()
        return found

    def _standing(self, told: Sequence[Mapping[str, Any]], like: TopicSpec | None = None) -> list[Standing]:
        resources = [ConfigResource(ConfigResourceType.TOPIC, each["name"]) for each in told]
        configs = self.admin().describe_configs(resources, config_filter="all").get("topic", {})
        return [
            standing_of(each, configs[each["name"]], like, *self._registry.declared(str(each["topic_id"])))
            for each in told
            # One that is deleted between the two questions has no settings.
            if configs.get(each["name"])
        ]

    # Groups

    def create_group(self, spec: GroupSpec) -> Claim:
        """Create a group unless it exists; the claim that counts, its offsets pinned in Kafka."""
        topic = self.topic(spec.topic)
        claim = self._registry.find(spec.topic, spec.name, topic.topic_id)
        if claim is None:
            there = self._committed(topic.stored, spec)
            offsets = self._starts(topic.stored, topic.spec.partitions, spec.start)
            # Offsets without a claim are those of a group that foreign tools made: it is adopted where it stands.
            offsets = [there.get(partition, (offset, ""))[0] for partition, offset in enumerate(offsets)]
            claim = self._registry.claim(Claim.new(spec, topic.topic_id, offsets))
        if not claim.pinned:
            self._pin(topic.stored, claim)
        return claim

    def _pin(self, stored: str, claim: Claim) -> None:
        there = self._committed(stored, claim.spec)
        missing = {at: offset for at, offset in enumerate(claim.offsets) if at not in there}
        if missing:
            self._commit(stored, claim.spec, missing)
        self._registry.pinned(claim)

    def _commit(self, stored: str, group: GroupSpec, offsets: Mapping[int, int]) -> None:
        """
        Store offsets for a group without members.

        Raises:
            UnknownMemberIdError: It has members.
        """
        wanted = {TopicPartition(stored, at): OffsetAndMetadata(offset, "", -1) for at, offset in offsets.items()}
        for error in self.admin().alter_group_offsets(group_id(group.topic, group.name), wanted).values():
            if error is not NoError:
                raise error()

    def _committed(self, stored: str, group: GroupSpec) -> dict[int, tuple[int, str]]:
        name = group_id(group.topic, group.name)
        told = self.admin().list_group_offsets({name: None})[name]
        return {
            at.partition: (found.offset, found.metadata or "")
            for at, found in told.items()
            if at.topic == stored and found.offset >= 0
        }

    def group(self, topic: str, name: str) -> Claim:
        """The claim of a group that must exist."""
        return self._claim(self.topic(topic), name)

    def _claim(self, standing: Standing, name: str) -> Claim:
        topic = standing.spec.name
        claim = self._registry.find(topic, name, standing.topic_id)
        if claim is None:
            raise GroupMissingError(f"topic {topic!r} has no group {name!r}", driver="kafka", topic=topic)
        return claim

    def check(self, topic: str, topic_id: str, group: str | None) -> None:
        """Look whether a topic, and a group of it, are still the same."""
        told = self._find(topic)
        if told is None or str(told["topic_id"]) != topic_id:
            raise TopicMissingError(f"topic {topic!r} was deleted", driver="kafka", topic=topic)
        if group is not None and self._registry.find(topic, group, topic_id) is None:
            raise GroupMissingError(f"group {group!r} of topic {topic!r} was deleted", driver="kafka", topic=topic)

    def groups(self, topic: str) -> list[GroupSpec]:
        """The groups of a topic, by name."""
        claims = self._registry.groups(topic, self.topic(topic).topic_id)
        return sorted((claim.spec for claim in claims), key=lambda spec: spec.name)

    def delete_group(self, topic: str, name: str) -> None:
        """Delete a group; its members are put out, and find no claim when they come again."""
        self._registry.remove(topic, name)
        admin = self.admin()
        identity = group_id(topic, name)
        while True:
            result = admin.delete_groups([identity])[identity]
            if result in ("OK", "GroupIdNotFoundError"):
                return
            if result == "NotCoordinatorError":
                raise NotCoordinatorError(identity)
            if result != "NonEmptyGroupError":
                raise KafkaError(f"deleting group {identity}: {result}")
            described = admin.describe_groups([identity])[identity]
            leavers = [MemberToRemove(member["member_id"]) for member in described["members"]]
            admin.remove_group_members(identity, leavers)

    def lag(self, topic: str, name: str) -> Lag:
        """Messages after the stored cursor that are not settled."""
        standing = self.topic(topic)
        claim = self._claim(standing, name)
        there = self._committed(standing.stored, claim.spec)
        partitions = standing.spec.partitions
        first, end = (self._offsets(standing.stored, partitions, at) for at in (OffsetSpec.EARLIEST, OffsetSpec.LATEST))
        total = 0
        for at in range(partitions):
            start = claim.offsets[at] if at < len(claim.offsets) else 0
            cursor, text = there.get(at, (start, ""))
            cursor, settled = (cursor, settled_beyond(cursor, text)) if cursor >= first[at] else (first[at], 0)
            total += max(0, end[at] - cursor - settled)
        return Lag(total, True)

    def members(self, topic: str, name: str) -> list[Member]:
        """The members that Kafka believes alive."""
        self.group(topic, name)
        identity = group_id(topic, name)
        described = self.admin().describe_groups([identity])[identity]
        return [Member(member["member_id"]) for member in described["members"]]

    def seek(self, topic: str, name: str, to: StartAt) -> None:
        """Move a group without members."""
        standing = self.topic(topic)
        group = self._claim(standing, name).spec
        starts = self._starts(standing.stored, standing.spec.partitions, to)
        try:
            self._commit(standing.stored, group, dict(enumerate(starts)))
        except UnknownMemberIdError as error:
            raise UnsupportedError(
                f"seek group {name!r} of topic {topic!r}: members are joined; close them first",
                capability="seek",
                driver="kafka",
                topic=topic,
            ) from error

    # Offsets

    def _offsets(self, topic: str, partitions: int, at: Any) -> list[int]:
        wanted = {TopicPartition(topic, partition): at for partition in range(partitions)}
        told = self.admin().list_partition_offsets(wanted)
        return [told[partition].offset for partition in wanted]

    def ends(self, topic: str, partitions: int) -> list[int]:
        """The offset that the next message of each partition will have."""
        return self._offsets(topic, partitions, OffsetSpec.LATEST)

    def _starts(self, topic: str, partitions: int, start: StartAt) -> list[int]:
        if start == "earliest":
            return self._offsets(topic, partitions, OffsetSpec.EARLIEST)
        ends = self.ends(topic, partitions)
        if start == "latest":
            return ends
        if isinstance(start, datetime):
            since = start - datetime(1970, 1, 1, tzinfo=UTC)
            # Exact arithmetic: a float's microseconds could fall into the millisecond before.
            return self._since(topic, ends, max(0, -(-since // timedelta(milliseconds=1))))
        partition, offset = place_in(start)
        if partition >= partitions:
            raise ConfigError(f"position {start!r}: topic {topic!r} has {partitions} partitions", topic=topic)
        # A position names a place in its own partition; in the others the group begins at the same time.
        when = self._time_at(TopicPartition(topic, partition), offset, ends[partition])
        starts = ends if when is None else self._since(topic, ends, when)
        starts[partition] = min(offset, ends[partition])
        return starts

    def _since(self, topic: str, ends: Sequence[int], milliseconds: int) -> list[int]:
        found = self._offsets(topic, len(ends), OffsetTimestamp(milliseconds))
        return [end if offset < 0 else offset for offset, end in zip(found, ends, strict=True)]

    def _time_at(self, partition: TopicPartition, offset: int, end: int) -> int | None:
        """When the message at `offset`, or the next one after it, was stored; `None`: there is none."""
        if offset >= end:
            return None
        reader = connect(
            KafkaConsumer,
            self._place,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            metrics_enabled=False,
        )
        try:
            reader.assign([partition])
            reader.seek(partition, offset)
            found = reader.poll(timeout_ms=int(self._place.connect_timeout * 1000), max_records=1).get(partition)
            return int(found[0].timestamp) if found else None
        finally:
            reader.close(autocommit=False, timeout_ms=0)
