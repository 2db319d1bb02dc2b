"""Moving messages aside: published to the dead letter topic, confirmed, and only then acked (DEL-3)."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from unistream._producer import Producer
from unistream.core.lifecycle import Move
from unistream.driver.envelope import DEAD_PREFIX
from unistream.driver.types import GroupSpec, RawMessage, Verb
from unistream.errors import LeaseLostError, PublishError, TopicConflictError, TopicMissingError, UnistreamError

if TYPE_CHECKING:
    from unistream._delivery import Delivery
    from unistream._group import Group

__all__ = ["DEAD_LETTER_GROUP", "DeadLetters"]

DEAD_LETTER_GROUP = "dead-letters"
"""Pinned on a dead letter topic where the broker keeps nothing for groups that come later (RabbitMQ)."""

_READABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_MAX_REASON = 4096
# The escapes at the end of a text that was cut, which may be part of one character.
_CUT_ESCAPES = re.compile(r"(?:%[0-9A-F]{0,2})+$")
PUBLISH_SECONDS = 30.0

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
            # Created by somebody else in between, with settings of their own: as good.
            with suppress(TopicConflictError):
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
            burial = self._start(token, self._bury(delivery, move, reason))
        try:
            await asyncio.wait([burial])
        except asyncio.CancelledError:
            # Nobody is left to hear how it ends.
            burial.add_done_callback(partial(_tell, delivery._name))
            raise
        if burial.cancelled():
            raise LeaseLostError(
                f"{delivery._name} was given back while its dead letter was under way: the consumer left",
                topic=self._spec.topic,
            )
        burial.result()

    def bury_later(self, delivery: Delivery, reason: str) -> None:
        """Move a message aside that is not handed to the application; if that fails, its next lending comes here."""
        self._start(delivery._raw.token, self._bury_quietly(delivery, reason))

    def _start(self, token: object, burial: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(burial)
        self._burials[token] = task
        task.add_done_callback(lambda _: self._burials.pop(token))
        return task

    async def _bury_quietly(self, delivery: Delivery, reason: str) -> None:
        try:
            await self._bury(delivery, Move.REJECT, reason)
        except UnistreamError as error:
            _log.error("%s could not be dead-lettered: %s", delivery._name, error)
            # Still lent; its lease ends, and it comes again.
            delivery._loans.settler.stop_renewing(delivery._raw.token)

    async def _bury(self, delivery: Delivery, move: Move, reason: str) -> None:
        loans = delivery._loans
        if self._producer is not None:
            try:
                await self._producer._publish_raw(self._letter(delivery, reason), timeout=PUBLISH_SECONDS)
            except PublishError:
                raise
            except UnistreamError as error:
                failed = PublishError(f"the dead letter of {delivery._name} was not confirmed: {error}")
                failed.stored = error.stored or "unknown"
                raise failed from error
        await loans.settle(delivery, move, Verb.ACK)
        # Counted now: a message whose lease was lost meanwhile comes again, and is moved aside and counted then.
        if self._producer is None:
            _log.warning("%s dropped: %r (the group has no dead letter topic)", delivery._name, reason)
            loans.stats.dropped += 1
        else:
            _log.warning("%s dead-lettered to %r: %r", delivery._name, self._producer.topic, reason)
            loans.stats.dead_lettered += 1

    def _letter(self, delivery: Delivery, reason: str) -> RawMessage:
        spec = self._spec
        origin = {
            "topic": spec.topic,
            "group": spec.name,
            # Any text, as one readable line of ASCII that every broker's headers carry.
            "reason": _line(reason),
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

    async def settle(self, timeout: float) -> None:
        """Wait for the burials under way; those that are not through after `timeout` seconds are given up."""
        burials = list(self._burials.values())
        if burials:
            _, late = await asyncio.wait(burials, timeout=timeout)
            for burial in late:
                burial.cancel()
            if late:
                await asyncio.wait(late)

    async def close(self) -> None:
        """Close the producer of dead letters."""
        if self._producer is not None:
            await self._producer.close()


def _line(reason: str) -> str:
    """Any text as one readable line of ASCII, cut between two characters."""
    text = quote(reason, safe=_READABLE, errors="replace").strip()
    return text if len(text) <= _MAX_REASON else _CUT_ESCAPES.sub("", text[:_MAX_REASON])


def _tell(name: str, burial: asyncio.Task[None]) -> None:
    if not burial.cancelled() and (error := burial.exception()) is not None:
        _log.error("%s could not be dead-lettered: %s", name, error)
