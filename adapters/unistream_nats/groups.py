"""Knows how groups live in JetStream: as one consumer, or one per partition, made, moved and deleted together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from unistream.driver.types import GroupSpec, Member, StartAt, TopicSpec
from unistream.errors import GroupMissingError, UnsupportedError
from unistream_nats.errors import ApiError, Code
from unistream_nats.link import Link
from unistream_nats.names import INTERNAL, escape, guard_name, lane_filters, stream_name, who_subject
from unistream_nats.notes import Notes
from unistream_nats.registry import consumer_config, group_spec, is_ours, start_config
from unistream_nats.upkeep import consumers_of

__all__ = ["Groups"]

_EPHEMERAL_SECONDS = 60.0
"""How long an ephemeral group outlives its consumer, if that can't remove it."""
_GUARD_SECONDS = 3600.0
_ANSWERS_WITHIN = 0.5
"""Seconds that members get to answer who they are."""


class Groups:
    """
    The groups of one topic.

    Its methods raise the server's own errors; the driver translates.
    """

    def __init__(self, link: Link, topic: str, notes: Notes) -> None:
        self._link = link
        self._topic = topic
        self._stream = stream_name(topic)
        self._notes = notes

    async def create(self, spec: GroupSpec, topic: TopicSpec) -> GroupSpec:
        """Make a group that is not there; it as it stands."""
        there = await self._consumer(escape(spec.name))
        if there is None:
            refused = await self.create_lanes(spec, topic, spec.start)
            there = await self._consumer(escape(spec.name))
            if there is None:
                raise refused or self._missing(spec.name)
        return group_spec(self._topic, {"name": escape(spec.name), **there["config"]})

    async def create_lanes(self, spec: GroupSpec, topic: TopicSpec, start: StartAt) -> ApiError | None:
        """Make the consumers of a group that are not there; what the server said of one that is there otherwise."""
        idle = _EPHEMERAL_SECONDS if spec.ephemeral else None
        refused: ApiError | None = None
        for name, subject in lane_filters(spec, topic).items():
            config = consumer_config(spec, name, subject, spec.start, idle_seconds=idle) | start_config(start)
            verb = f"CONSUMER.{'CREATE' if spec.ephemeral else 'DURABLE.CREATE'}.{self._stream}.{name}"
            if spec.ephemeral and subject is not None:
                verb += f".{subject}"
            try:
                await self._link.api(verb, {"stream_name": self._stream, "config": config, "action": "create"})
            except ApiError as error:
                if error.code not in Code.CONSUMER_EXISTS:
                    raise
                refused = error
        return refused

    async def _consumer(self, name: str) -> dict[str, Any] | None:
        try:
            return await self._link.api(f"CONSUMER.INFO.{self._stream}.{name}")
        except ApiError as error:
            if error.code != Code.CONSUMER_MISSING:
                raise
            return None

    async def delete(self, name: str, *, keep: str = "") -> None:
        """Delete a group with its notes; the consumer `keep` stays."""
        escaped = escape(name)
        names = [consumer["name"] for consumer in await consumers_of(self._link, self._stream)]
        # The one named like the group first: without it there is no group.
        for consumer in sorted(names):
            if consumer != keep and (consumer == escaped or consumer.startswith(escaped + INTERNAL)):
                try:
                    await self._link.api(f"CONSUMER.DELETE.{self._stream}.{consumer}")
                except ApiError as error:
                    if error.code != Code.CONSUMER_MISSING:
                        raise
                await self._notes.purge(consumer)

    async def all(self) -> Sequence[GroupSpec]:
        """The groups, by name."""
        configs = [consumer["config"] for consumer in await consumers_of(self._link, self._stream)]
        found = [
            group_spec(self._topic, {"name": config["durable_name"], **config})
            for config in configs
            if config.get("durable_name")
            and INTERNAL not in config["durable_name"]
            and (is_ours(config) or not config.get("deliver_subject"))
        ]
        return sorted(found, key=lambda group: group.name)

    async def lanes(self, name: str, topic: TopicSpec) -> tuple[GroupSpec, list[dict[str, Any]]]:
        """A group, and its consumers as the server describes them."""
        marker = await self._consumer(escape(name))
        if marker is None:
            raise self._missing(name)
        found = group_spec(self._topic, {"name": escape(name), **marker["config"]})
        names = [lane for lane in lane_filters(found, topic) if lane != escape(name)]
        others = await asyncio.gather(*(self._consumer(lane) for lane in names))
        return found, [marker, *(other for other in others if other is not None)]

    async def members(self, name: str) -> Sequence[Member]:
        """Those who answer."""
        wire = await self._link.wire()
        found: dict[str, Member] = {}

        def answer(subject: bytes, reply: bytes, head: bytes, body: bytes) -> None:
            if body:
                said = json.loads(body)
                found[said["name"]] = Member(said["name"], said["in_flight"])

        inbox = f"{wire.inbox}{wire.expect_none()}.who"
        sid = wire.subscribe(inbox, answer)
        try:
            wire.write((f"PUB {who_subject(self._topic, name)} {inbox} 0\r\n\r\n".encode(),))
            await asyncio.sleep(_ANSWERS_WITHIN)
        finally:
            wire.unsubscribe(sid)
        return [found[member] for member in sorted(found)]

    async def seek(self, name: str, topic: TopicSpec, to: StartAt) -> None:
        """
        Move a group without members: its consumers are made anew.

        A guard stands at the new place meanwhile, so that nobody trims it away.
        """
        place = start_config(to)
        spec, lanes = await self.lanes(name, topic)
        if any(lane["num_waiting"] for lane in lanes) or await self.members(name):
            raise UnsupportedError(
                f"seek group {name!r} of topic {self._topic!r}: members are joined; close them first",
                capability="seek",
                driver="nats",
                topic=self._topic,
            )
        guard = guard_name(name)
        idle = round(_GUARD_SECONDS * 1e9)
        config = {"name": guard, "ack_policy": "explicit", "inactive_threshold": idle, **place}
        asked = {"stream_name": self._stream, "config": config, "action": "create"}
        await self._link.api(f"CONSUMER.CREATE.{self._stream}.{guard}", asked)
        await self.delete(name, keep=guard)
        refused = await self.create_lanes(spec, topic, to)
        if refused is not None:
            raise refused
        await self._link.api(f"CONSUMER.DELETE.{self._stream}.{guard}")

    def _missing(self, name: str) -> GroupMissingError:
        return GroupMissingError(f"topic {self._topic!r} has no group {name!r}", driver="nats", topic=self._topic)
