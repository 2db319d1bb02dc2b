"""Declares and deletes the exchanges and queues of topics and groups, in step with the registry."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pika.exceptions import ChannelClosed

from unistream.driver.types import GroupSpec, TopicSpec
from unistream.errors import GroupMissingError, TopicMissingError
from unistream_rabbitmq.delays import declare_return
from unistream_rabbitmq.errors import NOT_FOUND, code_of
from unistream_rabbitmq.link import Channel, Line
from unistream_rabbitmq.names import RETURN, GroupQueues, exchange_of
from unistream_rabbitmq.registry import Registry, State

__all__ = ["Topology"]

_ONE_MESSAGE = {"x-max-length": 1, "x-overflow": "drop-head"}
"""For the queue that holds the last owner's notes on a partition."""


def _moved_to(suspects: str) -> dict[str, Any]:
    """What is rejected goes there, at least once; RabbitMQ does that only where the overflow is `reject-publish`."""
    return {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": suspects,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


class Topology:
    """
    The topics and groups of one virtual host.

    Args:
        control: The connection to declare on.
        registry: What is written down.
        settles: Seconds that creating a group waits at its end, so that its queues survive kill -9 of the server.
        unlimited_returns: RabbitMQ 4 drops a message of a quorum queue that came back 20 times unless told otherwise;
            earlier ones never do, and do not know how to be told.
    """

    def __init__(self, control: Line, registry: Registry, settles: float, *, unlimited_returns: bool) -> None:
        self._control = control
        self._settles = settles
        self._registry = registry
        self._quorum: dict[str, Any] = {"x-queue-type": "quorum"}
        if unlimited_returns:
            self._quorum["x-delivery-limit"] = -1

    # Topics

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Create it, or return the one that is there."""
        async with self._registry.changing(spec.name) as (state, edit):
            there = state.topic(spec.name)
            # Declared again if it is there: a registry entry without its exchange heals.
            await self._declare_exchange(there or spec)
            if there is None:
                await edit(lambda state: state.put_topic(spec, ready=True))
            return there or spec

    async def _declare_exchange(self, spec: TopicSpec) -> None:
        channel = await self._channel()
        try:
            kind = "direct" if spec.ordering == "key" else "fanout"
            await channel.call(channel.raw.exchange_declare, exchange_of(spec.name), kind, durable=True)
        finally:
            await channel.close()

    async def delete_topic(self, name: str) -> None:
        """Delete it with its groups; what does not exist is deleted already."""
        async with self._registry.changing(name) as (state, edit):
            entry = state.topics.get(name)
            channel = await self._channel()
            try:
                # First nothing more comes in, then the queues go, last the record: a crash between leaves what a
                # second call deletes.
                await channel.call(channel.raw.exchange_delete, exchange_of(name))
                if entry is not None:
                    for group in entry["groups"]:
                        await self._delete_queues(channel, state, name, group)
                    await edit(lambda state: state.topics.pop(name, None))
            finally:
                await channel.close()

    async def topic(self, name: str) -> TopicSpec:
        """
        A topic as it stands.

        Raises:
            TopicMissingError: There is none.
        """
        there = (await self._registry.read()).topic(name)
        if there is not None:
            return there
        channel = await self._channel()
        try:
            await channel.call(channel.raw.exchange_declare, exchange_of(name), passive=True)
        except ChannelClosed as error:
            if code_of(error) != NOT_FOUND:
                raise
            raise TopicMissingError(f"there is no topic {name!r}", driver="amqp", topic=name) from error
        finally:
            await channel.close()
        return TopicSpec(name)

    # Groups

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """
        Create it with its queues, or return the one that is there.

        Raises:
            TopicMissingError: There is no such topic.
        """
        topic = await self.topic(spec.topic)
        there = (await self._registry.read()).group(spec.topic, spec.name)
        if there is not None and await self._stands(GroupQueues(topic, there.name, ordered=there.ordering == "key")):
            return there
        async with self._registry.changing(spec.topic) as (state, edit):
            topic = await self.topic(spec.topic)  # it may have been deleted meanwhile
            adopted = state.topic(spec.topic) is None  # made by a foreign program
            there = state.group(spec.topic, spec.name)

            def enter(state: State, *, ready: bool) -> None:
                if adopted:
                    state.put_topic(topic, ready=True)
                state.put_group(spec, ready=ready)

            if there is None:
                # Until its queues are bound it counts as missing: publishing to the topic goes on meanwhile, and a
                # crash between leaves no bound queue that nobody knows of.
                await edit(lambda state: enter(state, ready=False))
            found = there or spec
            await self._declare_queues(topic, GroupQueues(topic, spec.name, ordered=found.ordering == "key"))
            if there is None:
                await edit(lambda state: enter(state, ready=True))
        if there is None:
            await asyncio.sleep(self._settles)
        return found

    async def _stands(self, queues: GroupQueues) -> bool:
        try:
            await self._look_at(queues.all)
        except GroupMissingError:
            return False
        return True

    async def _declare_queues(self, topic: TopicSpec, queues: GroupQueues) -> None:
        channel = await self._channel()
        raw = channel.raw
        exchange = exchange_of(topic.name)
        try:
            await declare_return(channel)
            await channel.call(raw.queue_declare, queues.roll, durable=True)
            notes = {**self._quorum, **_ONE_MESSAGE}
            for partition in range(len(queues.partitions)):
                await channel.call(raw.queue_declare, queues.ledger(partition), durable=True, arguments=notes)
            for name in queues.holding:
                arguments = dict(self._quorum)
                if queues.partitions:
                    arguments["x-single-active-consumer"] = True
                if not queues.partitions and name != queues.suspects:
                    arguments |= _moved_to(queues.suspects)
                if topic.max_backlog is not None and name in (queues.main, *queues.partitions):
                    # A quorum queue refuses what comes once it is above its limit.
                    arguments["x-max-length"] = topic.max_backlog - 1
                    arguments["x-overflow"] = "reject-publish"
                await channel.call(raw.queue_declare, name, durable=True, arguments=arguments)
            # Bound last: from here on the group gets every message.
            for partition, name in enumerate(queues.partitions):
                await channel.call(raw.queue_bind, name, exchange, routing_key=str(partition))
            if not queues.partitions:
                await channel.call(raw.queue_bind, queues.again, RETURN, routing_key=queues.again)
                keys = [str(number) for number in range(topic.partitions)] if topic.ordering == "key" else ["#"]
                for key in keys:
                    await channel.call(raw.queue_bind, queues.main, exchange, routing_key=key)
        finally:
            await channel.close()

    async def delete_group(self, topic: str, name: str) -> None:
        """Delete it with its queues; what does not exist is deleted already."""
        async with self._registry.changing(topic) as (state, edit):
            if name not in state.topics.get(topic, {"groups": {}})["groups"]:
                return
            channel = await self._channel()
            try:
                await self._delete_queues(channel, state, topic, name)
            finally:
                await channel.close()
            await edit(lambda state: state.topics[topic]["groups"].pop(name, None))

    async def _delete_queues(self, channel: Channel, state: State, topic: str, group: str) -> None:
        spec = state.topic(topic) or TopicSpec(topic)
        ordered = state.topics[topic]["groups"][group]["spec"]["ordering"] == "key"
        queues = GroupQueues(spec, group, ordered=ordered)
        for name in queues.all:
            await channel.call(channel.raw.queue_delete, name)
        if ordered:
            await channel.call(channel.raw.exchange_delete, queues.gossip)

    async def count(self, queues: GroupQueues) -> tuple[int, int]:
        """
        The messages that wait in a group's queues, and its members.

        Raises:
            GroupMissingError: A queue of it is missing.
        """
        *waiting, members = await self._look_at((*queues.holding, queues.roll))
        return sum(count for count, _ in waiting), members[1]

    async def room(self, topic: TopicSpec) -> int:
        """How many messages the fullest queue of a bounded topic still takes; many where there is no group."""
        assert topic.max_backlog is not None
        groups = (await self._registry.read()).groups(topic.name)
        queues = [GroupQueues(topic, group.name, ordered=group.ordering == "key") for group in groups]
        bounded = [name for each in queues for name in (each.partitions or (each.main,))]
        try:
            waiting = [count for count, _ in await self._look_at(bounded)]
        except GroupMissingError:
            return 0  # one is being deleted: message by message they say themselves what they take
        return max(0, topic.max_backlog - max(waiting, default=0))

    async def _look_at(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """The messages that wait in each queue, and its consumers."""
        channel = await self._channel()
        found = []
        try:
            for name in names:
                frame = await channel.call(channel.raw.queue_declare, name, passive=True)
                found.append((frame.method.message_count, frame.method.consumer_count))
        except ChannelClosed as error:
            if code_of(error) != NOT_FOUND:
                raise
            raise GroupMissingError(f"the queue {name!r} is missing", driver="amqp") from error
        finally:
            await channel.close()
        return found

    async def _channel(self) -> Channel:
        wire = await self._control.wire()
        return await wire.channel()
