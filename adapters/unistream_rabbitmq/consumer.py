"""What members of shared, ordered and ephemeral groups have in common; knows no queue layout."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from unistream.driver.types import Event, GroupSpec, Token, TopicSpec
from unistream.errors import (
    GroupMissingError,
    LeaseLostError,
    TopicMissingError,
    UnistreamError,
)
from unistream_rabbitmq.delays import declare_return
from unistream_rabbitmq.errors import NOT_FOUND, code_of, translated
from unistream_rabbitmq.link import Channel, Line, Place
from unistream_rabbitmq.names import RETURN, GroupQueues, exchange_of
from unistream_rabbitmq.registry import Registry
from unistream_rabbitmq.relay import Relay

__all__ = ["PATIENCE_SECONDS", "Setting", "declare_ephemeral"]

PATIENCE_SECONDS = 1.0
"""A member that was not asked for messages for so long, or up to twice as long, lets others have what it was pushed."""


@dataclass(frozen=True, slots=True)
class Setting:
    """
    All that a member needs.

    Attributes:
        place: Where the server is, for connections of its own.
        consuming: The connection for consuming, shared by the members of one client.
        control: The connection for declaring.
        relay: Puts messages back; this member's own.
        registry: To tell what was deleted.
        group: The group as it stands.
        topic: Its topic as it stands.
        queues: The group's queues.
        max_in_flight: The most loans.
        lost: Takes tokens of loans that ended unasked.
        emit: Takes events.
        closed: Told when the member has left.
    """

    place: Place
    consuming: Line
    control: Line
    relay: Relay
    registry: Registry
    group: GroupSpec
    topic: TopicSpec
    queues: GroupQueues
    max_in_flight: int
    lost: Callable[[Collection[Token], str], None]
    emit: Callable[[Event], None]
    closed: Callable[[object], None]

    @property
    def what(self) -> str:
        """The group, in messages."""
        return f"group {self.group.name!r} of topic {self.topic.name!r}"

    def gone(self, reason: str) -> LeaseLostError:
        """The outcome for a loan that had ended."""
        return LeaseLostError(f"{self.what}: {reason}", driver="amqp", topic=self.topic.name)

    async def failed(self, error: BaseException) -> UnistreamError:
        """What a failed attempt to join means: a missing queue is a deleted group or topic."""
        if code_of(error) != NOT_FOUND:
            return translated(error, self.what, self.topic.name)
        missing: UnistreamError
        try:
            state = await self.registry.read()
        except Exception as unread:
            return translated(unread, self.what, self.topic.name)
        if state.topic(self.topic.name) is None:
            missing = TopicMissingError(f"topic {self.topic.name!r} was deleted", driver="amqp", topic=self.topic.name)
        else:
            missing = GroupMissingError(f"{self.what} was deleted", driver="amqp", topic=self.topic.name)
        missing.__cause__ = error
        return missing

    async def consumers(self, queue: str) -> int:
        """How many members the broker pushes messages of a queue to."""
        channel = await (await self.control.wire()).channel()
        try:
            frame = await channel.call(channel.raw.queue_declare, queue, passive=True)
        finally:
            await channel.close()
        return int(frame.method.consumer_count)


async def declare_ephemeral(channel: Channel, setting: Setting) -> None:
    """Make the queue of an ephemeral group, which lives as long as the connection, and bind it."""
    raw = channel.raw
    queue, exchange = setting.queues.main, exchange_of(setting.topic.name)
    await channel.call(raw.exchange_declare, exchange, passive=True)
    await channel.call(raw.queue_declare, queue, exclusive=True, auto_delete=True)
    await declare_return(channel)
    await channel.call(raw.queue_bind, queue, RETURN, routing_key=queue)
    keys = [str(number) for number in range(setting.topic.partitions)] if setting.topic.ordering == "key" else ["#"]
    for key in keys:
        await channel.call(raw.queue_bind, queue, exchange, routing_key=key)
