"""What the owner of a partition leaves to the next one: attempts, due times, and which returns were no loss.

A quorum queue counts every return of a message, also when its owner left in good order, and forgets nothing else. So
the owner writes a note per unsettled message that needs one, as one message in a queue of length 1, replaced each time:
at a nack, before it lends a suspect, and when it leaves. What is pushed to it while it writes that last one can't be
named in it: `OTHERS` stands for all that is not named. The next owner takes that back before it lends anything.
"""

from __future__ import annotations

import asyncio
import json
from hashlib import sha256
from typing import NamedTuple

from pika import BasicProperties, spec
from pika.exceptions import ChannelClosed

from unistream.driver.types import RawMessage
from unistream_rabbitmq.errors import NOT_FOUND, code_of
from unistream_rabbitmq.link import Channel, Line
from unistream_rabbitmq.relay import Hop, Relay

__all__ = ["OTHERS", "Ledger", "Note", "identity"]

OTHERS = ""
"""Names the note on every message without one; no message's identity is empty."""


class Note(NamedTuple):
    """
    About one message.

    Attributes:
        spent: Lendings that count before the next one.
        due: Not to be lent before, in seconds since the epoch.
        returns: How often it may have come back without a member having been lost.
    """

    spent: int = 0
    due: float = 0.0
    returns: int = 0


def identity(message: RawMessage) -> str:
    """What a note names a message by; a foreign message without an id by its content."""
    return message.id or sha256(message.value).hexdigest()[:32]


class Ledger:
    """
    The notes on one partition of one group.

    Args:
        queue: Where they are kept; made with the group.
        control: The connection to declare and read on.
        relay: Writes.
    """

    def __init__(self, queue: str, control: Line, relay: Relay) -> None:
        self._queue = queue
        self._control = control
        self._relay = relay

    async def read(self) -> dict[str, Note]:
        """The last owner's notes."""
        wire = await self._control.wire()
        channel = await wire.channel()
        body: bytes | None = None
        try:
            while (found := await _get(channel, self._queue)) is not None:
                body = found
        except ChannelClosed as error:
            if code_of(error) != NOT_FOUND:
                raise
            return {}
        finally:
            await channel.close()
        return {} if body is None else {name: Note(*note) for name, note in json.loads(body).items()}

    async def write(self, notes: dict[str, Note]) -> None:
        """Replace the notes; confirmed when it returns."""
        body = json.dumps(notes).encode()
        await self._relay.put([Hop(self._queue, 0.0, body, BasicProperties(delivery_mode=2, message_id="ledger"))])


async def _get(channel: Channel, queue: str) -> bytes | None:
    """The next message of a queue, left unacked; `None` if there is none."""
    answer: asyncio.Future[bytes | None] = channel.wire.loop.create_future()

    def finish(body: bytes | None) -> None:
        if not answer.done():
            answer.set_result(body)

    def fail(reason: BaseException) -> None:
        if not answer.done():
            answer.set_exception(reason)

    channel.on_end(fail)
    channel.raw.add_callback(lambda _: finish(None), [spec.Basic.GetEmpty])
    channel.raw.basic_get(queue, lambda _, __, ___, body: finish(body))
    return await answer
