"""One consumer at the broker as one member sees it: what was asked of it, what came, and what is missing.

A pull asks for up to n messages and waits for the first; the server ends it with a status as soon as nothing more is
there (`no_wait` with `expires`, the same in 2.9 and 2.15). So nothing arrives while nobody asked, and a pull that gets
no status in time was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from unistream_nats.registry import NANOSECONDS
from unistream_nats.wire import Wire

__all__ = ["Arrival", "Lane", "NativeMessage"]

_GRACE = 1.0
"""Seconds beyond its end after which a pull without a status counts as lost."""
_REST = 0.1
"""Seconds before the next pull after the server refused one."""
_ACK = b"$JS.ACK."


class NativeMessage(NamedTuple):
    """A message as it came: what `Delivery.native` is."""

    subject: bytes
    reply: bytes
    headers: bytes
    data: bytes


class Arrival(NamedTuple):
    """
    A message that came.

    Attributes:
        lane: Where.
        native: The message.
        lending: How often it was lent, this time included.
        sequence: Its place in the stream.
        nanoseconds: When the server stored it, since the epoch.
        asked: When it was asked for, by the loop's clock: not before that it was lent.
        at: When it came. What came while the whole process stood still seems to come later.
    """

    lane: Lane
    native: NativeMessage
    lending: int
    sequence: int
    nanoseconds: int
    asked: float
    at: float


class Lane:
    """
    One consumer.

    Args:
        api: In front of the subjects of JetStream's API.
        stream: Its stream.
        name: Its name.
        most: The most messages that one pull may ask for.
        counts: Whether gaps in the sequence are losses: the consumer gets every message of the stream.
        arrived: Takes what comes.
        changed: Called when a pull has ended or got its first message.

    Attributes:
        gone: The server says that the consumer is not there.
        lost: Messages that were removed before they were lent, and are not reported yet.
        asked_at: When the last pull was made.
        served: Whether the last pull that ended brought something.
    """

    def __init__(
        self,
        api: str,
        stream: str,
        name: str,
        *,
        most: int | None,
        counts: bool,
        arrived: Callable[[Arrival], None],
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.most = most
        self.gone = False
        self.lost = 0
        self.asked_at = 0.0
        self.served = True
        self._next = f"{api}CONSUMER.MSG.NEXT.{stream}.{name}"
        self._counts = counts
        self._arrived = arrived
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._sid = 0
        self._inbox = ""
        self._pulls = 0
        self._left = 0
        self._flowing = False
        self._until = 0.0
        self._rest_until = 0.0
        # The last lending that is known, of all members: its number, and how far in the stream; -1: not known.
        self._lent = 0
        self._passed = -1
        self._reported = 0
        # At the last look: how many lendings there had been, and how many messages waited.
        self._looked = (0, 0)

    @property
    def open(self) -> bool:
        """Whether a pull is under way."""
        return self._left > 0

    @property
    def left(self) -> int:
        """How many messages may still come."""
        return self._left

    @property
    def flowing(self) -> bool:
        """Whether a pull is under way that messages have come by: the rest, or its end, comes at once."""
        return self._left > 0 and self._flowing

    def still(self) -> None:
        """The rest did not come at once after all."""
        self._flowing = False

    @property
    def overdue_at(self) -> float:
        """When the pull that is under way counts as lost."""
        return self._until + _GRACE

    def ready(self, now: float) -> bool:
        """Whether a pull may be made."""
        return not self._left and now >= self._rest_until

    @property
    def rest_until(self) -> float:
        """When a pull may be made again."""
        return self._rest_until

    def attach(self, wire: Wire) -> None:
        """Listen on a connection. Pulls made before have a subject that nobody listens to, so they end unserved."""
        self.detach()
        self._wire = wire
        self._left = 0
        self._inbox = f"{wire.inbox}{wire.expect_none()}."
        self._sid = wire.subscribe(f"{self._inbox}*", self._take)

    def detach(self) -> None:
        """Stop listening."""
        if self._wire is not None:
            self._wire.unsubscribe(self._sid)
            self._wire = None

    def pull(self, count: int, seconds: float) -> bytes:
        """The request, to be written at once, for up to `count` messages, waiting for the first up to `seconds`."""
        self._pulls += 1
        self._left = count if self.most is None else min(count, self.most)
        self._flowing = False
        self.asked_at = self._loop.time()
        self._until = self.asked_at + seconds
        expires = max(1, round(seconds * NANOSECONDS))
        body = f'{{"batch":{self._left},"expires":{expires},"no_wait":true}}'
        return f"PUB {self._next} {self._inbox}{self._pulls} {len(body)}\r\n{body}\r\n".encode()

    def _take(self, subject: bytes, reply: bytes, head: bytes, body: bytes) -> None:
        if not reply.startswith(_ACK):
            self._status(subject, head)
            return
        words = reply.split(b".")
        # $JS.ACK.<stream>.<consumer>.<lending>.<sequence>.<number>.<time>.<left>, with domain and account before.
        first = 4 if len(words) == 9 else 6
        lending = int(words[first])
        sequence = int(words[first + 1])
        self._follow(lending, sequence, int(words[first + 2]))
        native = NativeMessage(subject, reply, head, body)
        self.served = True
        now = self._loop.time()
        self._arrived(Arrival(self, native, lending, sequence, int(words[first + 3]), self.asked_at, now))
        if self._left:
            self._left -= 1
        if not self._flowing or not self._left:
            self._flowing = True
            self._changed()

    def _status(self, subject: bytes, head: bytes) -> None:
        if subject != f"{self._inbox}{self._pulls}".encode():
            return
        code = head[9:12]
        if code == b"100":
            return
        if code == b"503" or b"Deleted" in head[:60]:
            self.gone = True
        self.served = self._flowing
        if code not in (b"404", b"408"):
            self._rest_until = self._loop.time() + _REST
        self._left = 0
        self._changed()

    # What was removed before it was lent

    def _follow(self, lending: int, sequence: int, number: int) -> None:
        """A message was lent, the group's `number`th lending: a gap behind the one before is a loss."""
        following = number == self._lent + 1
        self._lent = number
        if lending > 1:
            if not following:
                self._passed = -1
            return
        before, self._passed = self._passed, sequence
        if self._counts and following and before >= 0 and sequence > before + 1:
            self.lost += sequence - 1 - max(before, self._reported)

    def look(self, first: int, lent: int, passed: int, pending: int) -> None:
        """
        Compare what the server says of the group with what is known.

        Args:
            first: Where the stream begins.
            lent: Lendings of the group so far.
            passed: How far in the stream they are.
            pending: Messages that were not lent yet.
        """
        if self._counts:
            if lent > self._lent or self._passed < 0:
                self._lent, self._passed = lent, passed
            if first - 1 > max(passed, self._reported) and lent >= self._lent:
                self.lost += first - 1 - max(passed, self._reported)
                self._reported = first - 1
        else:
            # The sequence has other consumers' messages in it. Each lending takes one from those that wait, and
            # publishing adds: if there are fewer, some were removed.
            before, waited = self._looked
            if waited - (lent - before) > pending and lent >= before:
                self.lost += waited - (lent - before) - pending
            self._looked = lent, pending
