"""Moving messages aside: published to the dead letter topic, confirmed, and only then acked (DEL-3)."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING
from urllib.parse import quote

from unistream._producer import Producer
from unistream.core.lifecycle import Move
from unistream.driver.envelope import DEAD_PREFIX
from unistream.driver.types import GroupSpec, RawMessage, Verb
from unistream.errors import TopicMissingError, UnistreamError

if TYPE_CHECKING:
    from unistream._delivery import Delivery
    from unistream._group import Group

__all__ = ["DEAD_LETTER_GROUP", "DeadLetters"]

DEAD_LETTER_GROUP = "dead-letters"
"""Pinned on a dead letter topic where the broker keeps nothing for groups that come later (RabbitMQ)."""

_READABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_MAX_REASON = 4096

_log = logging.getLogger("unistream.consumer")


class DeadLetters:
    """The dead letter side of one consumer. Without a dead letter topic messages are dropped, counted and logged."""

    def __init__(self, group: Group, spec: GroupSpec, producer: Producer | None) -> None:
        self._group = group
        self._spec = spec
        self._producer = producer
        self._burials: dict[object, asyncio.Task[None]] = {}

    @classmethod
    async def open(cls, group: Group, spec: GroupSpec) -> DeadLetters:
        """Open the dead letter topic of a group, creating it if there is none."""
        topic = group.dead_letter
        if not isinstance(topic, str):
            return cls(group, spec, None)
        client = group._client
        try:
            await client._use().topic(topic)
        except TopicMissingError:
            await client.create_topic(topic)
        if "earliest" not in client.capabilities.start.at:
            await client.group(DEAD_LETTER_GROUP, topic).create()
        producer = client.producer(topic)
        await producer.__aenter__()
        return cls(group, spec, producer)

    async def bury(self, delivery: Delivery, move: Move, reason: str) -> None:
        """
        Move a message aside and settle its delivery with `move`.

        Raises:
            PublishError: The dead letter was not confirmed; the delivery is still lent.

        Cancellation: The burial goes on; asking again waits for the same one.
        """
        token = delivery._raw.token
        burial = self._burials.get(token)
        if burial is None:
            burial = asyncio.get_running_loop().create_task(self._bury(delivery, move, reason))
            self._burials[token] = burial
            burial.add_done_callback(lambda _: self._burials.pop(token, None))
        await asyncio.shield(burial)

    def bury_later(self, delivery: Delivery, reason: str) -> None:
        """Move a message aside that is not handed to the application, and try again later if that fails."""
        token = delivery._raw.token
        self._burials[token] = asyncio.get_running_loop().create_task(self._bury_quietly(delivery, reason))

    async def _bury_quietly(self, delivery: Delivery, reason: str) -> None:
        try:
            await self._bury(delivery, Move.REJECT, reason)
        except UnistreamError as error:
            # Still lent: its lease ends, and its next lending comes here again.
            _log.error("%s could not be dead-lettered: %s", delivery._name, error)
            delivery._consumer._settler.stop_renewing(delivery._raw.token)
        finally:
            self._burials.pop(delivery._raw.token, None)

    async def _bury(self, delivery: Delivery, move: Move, reason: str) -> None:
        consumer = delivery._consumer
        if self._producer is None:
            _log.warning("%s dropped: %s (the group has no dead letter topic)", delivery._name, reason)
            consumer.stats.dropped += 1
        else:
            _log.warning("%s dead-lettered to %r: %s", delivery._name, self._producer.topic, reason)
            await self._producer._publish_raw(self._letter(delivery, reason), timeout=30.0)
            consumer.stats.dead_lettered += 1
        await consumer._settle(delivery, move, Verb.ACK)

    def _letter(self, delivery: Delivery, reason: str) -> RawMessage:
        spec = self._spec
        origin = {
            "topic": spec.topic,
            "group": spec.name,
            # Any text, as one readable line of ASCII that every broker's headers carry.
            "reason": quote(reason, safe=_READABLE).strip()[:_MAX_REASON],
            "attempts": str(delivery.attempt),
        }
        marks = tuple((DEAD_PREFIX + name, text.encode()) for name, text in origin.items())
        identity = delivery.id
        return RawMessage(
            identity,
            delivery.value,
            delivery.key,
            delivery.headers.items() + marks,
            0,
            f"{identity}/{spec.topic}/{spec.name}",
        )

    async def settle(self) -> None:
        """Wait for the burials under way."""
        if self._burials:
            await asyncio.wait(list(self._burials.values()))

    async def close(self) -> None:
        """Close the producer of dead letters."""
        if self._producer is not None:
            await self._producer.close()
