"""What the broker has pushed to a member of a shared group over one channel, and counts as unsettled there.

Knows delivery tags, loans, and in which turn messages are lent; publishes nothing and waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pika import BasicProperties

from unistream.driver.types import RawDelivery, RawMessage, Token
from unistream_rabbitmq.link import Channel
from unistream_rabbitmq.messages import arrived, put_back
from unistream_rabbitmq.relay import Hop

__all__ = ["Arrival", "Fetched"]


class Arrival:
    """
    A message that the broker pushed and that is not settled; `spent` lendings count before this one.

    Attributes:
        suspect: Its member may have died of it: it is lent alone.
    """

    __slots__ = ("body", "message", "properties", "published_at", "spent", "suspect", "tag")

    def __init__(self, method: Any, properties: BasicProperties, body: bytes, suspect: bool) -> None:
        said = arrived(method, properties, body)
        self.tag: int = method.delivery_tag
        self.message: RawMessage = said.message
        self.published_at = said.published_at
        self.spent = said.spent + said.lost
        self.suspect = suspect or said.lost > 0
        self.properties = properties
        self.body = body

    def hop(self, queue: str, delay: float, spent: int) -> Hop:
        """The message on its way back to a queue of its group, with `spent` lendings written on it."""
        return Hop(queue, delay, self.body, put_back(self.properties, spent, self.message.partition))


class Fetched:
    """
    One channel's unsettled messages.

    Args:
        channel: The channel.
        epoch: Its number among the member's channels: half of every token, so that a token fits one channel only.
        wake: Called when there is something new to lend.
        apart: There is a queue of suspects, to which the broker moves what is rejected.

    Attributes:
        open: Every unsettled delivery tag, in order.
        held: Those that are lent.
        over: The channel has ended, and with it everything here.
    """

    def __init__(self, channel: Channel, epoch: int, wake: Callable[[], None], *, apart: bool) -> None:
        self.channel = channel
        self.open: dict[int, None] = {}
        self.held: dict[Token, Arrival] = {}
        self.over = False
        self._epoch = epoch
        self._wake = wake
        self._apart = apart
        self._buffer: deque[Arrival] = deque()
        self._suspects: deque[Arrival] = deque()
        self._suspect_was_last = False

    # In

    def on_message(self, _: Any, method: Any, properties: BasicProperties, body: bytes) -> None:
        """Take what the broker pushed from a queue of ordinary messages; what a lost member had does not stay there."""
        arrival = Arrival(method, properties, body, False)
        if not arrival.suspect:
            self.open[arrival.tag] = None
            self._buffer.append(arrival)
        elif self._apart:
            # Nobody lends it from here, so one lending at most is behind it, however often it was returned. The broker
            # moves it in one step; put there and acked by a member it would be in both when that died in between.
            if self.channel.raw.is_open:
                self.channel.raw.basic_reject(arrival.tag, requeue=False)
            return
        else:
            self.open[arrival.tag] = None
            self._suspects.append(arrival)
        self._wake()

    def on_suspect(self, _: Any, method: Any, properties: BasicProperties, body: bytes) -> None:
        """Take what the broker pushed from the queue of suspects."""
        arrival = Arrival(method, properties, body, True)
        self.open[arrival.tag] = None
        self._suspects.append(arrival)
        self._wake()

    # Lending

    @property
    def ready(self) -> bool:
        """Whether an ordinary message can be lent at once."""
        return bool(self._buffer)

    @property
    def unlent(self) -> bool:
        """Whether anything here is not lent."""
        return bool(self._buffer or self._suspects)

    def take(self, limit: int) -> list[RawDelivery]:
        """Lend up to `limit` messages; a suspect alone, in turn with the others, so that many do not stop the group."""
        if self._suspects and not (self._suspect_was_last and self._buffer):
            self._suspect_was_last = True
            return [self._lend(self._suspects.popleft())]
        self._suspect_was_last = False
        buffer = self._buffer
        return [self._lend(buffer.popleft()) for _ in range(min(limit, len(buffer)))]

    def _lend(self, arrival: Arrival) -> RawDelivery:
        token = (self._epoch, arrival.tag)
        self.held[token] = arrival
        return RawDelivery(
            arrival.message,
            token,
            None,
            arrival.published_at,
            arrival.spent + 1,
            arrival.suspect,
            arrival.properties,
        )

    def take_unlent(self) -> list[Arrival]:
        """Take out everything that is not lent: it is to be given back."""
        left = [*self._suspects, *self._buffer]
        self._suspects.clear()
        self._buffer.clear()
        return left

    def put_first(self, arrivals: Iterable[Arrival]) -> None:
        """Put back what was taken out and could not be given back, in front, in order."""
        for arrival in reversed(list(arrivals)):
            (self._suspects if arrival.suspect else self._buffer).appendleft(arrival)

    # Ending

    def ack(self, tags: Iterable[int]) -> None:
        """Ack: everything up to the first unsettled tag in one frame, the rest one by one."""
        if self.over:
            return
        acked = set(tags)
        open_ = self.open
        raw = self.channel.raw
        highest = 0
        while open_:
            first = next(iter(open_))
            if first not in acked:
                break
            acked.discard(first)
            del open_[first]
            highest = first
        if highest:
            raw.basic_ack(highest, multiple=True)
        for tag in sorted(acked):
            del open_[tag]
            raw.basic_ack(tag)

    def requeue(self, tag: int) -> None:
        """Give one back to the broker, which counts that as if its member had been lost."""
        if not self.over and tag in self.open:
            del self.open[tag]
            self.channel.raw.basic_nack(tag, requeue=True)

    def expire(self, tag: int, arrival: Arrival) -> None:
        """The lease of a loan ended: it becomes a suspect, for others."""
        if self._apart and not arrival.suspect and not self.over:
            del self.open[tag]
            self.channel.raw.basic_reject(tag, requeue=False)
        else:
            self.requeue(tag)

    def end(self) -> list[Token]:
        """The channel has ended; the loans that ended with it."""
        self.over = True
        tokens = list(self.held)
        self.held.clear()
        self.open.clear()
        self.take_unlent()
        return tokens
